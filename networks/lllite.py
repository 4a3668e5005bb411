"""ControlNet-LLLite: small networks that steer attention by a picture, each with an embedding of its own of that picture.

    c = conditioning1(picture)                             strided convolutions down to the layer's feature map
    y = layer(x + strength * up(dropout(relu(mid [c, relu(down x)]))))

Shapes: B batch, H and W of the picture in pixels, N positions of a layer's feature map, D its channels, C of the embedding, M of the
small network. Files, names and mathematics: contract, formats.md section 8 and training_math.md section 9.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.control import AttentionControl, BlockControl, ControlInputs, LLLiteModulation
from library.models.unet import UNet
from library.models.unet_blocks import CrossAttention

PREFIX = "lllite_unet"
TRAINED_BLOCKS = (
    "input_blocks",
    "middle_block",
)  # where sd-scripts has modules; files from elsewhere may have more


class Place(NamedTuple):
    """A projection of an attention whose input may be steered.

    Attributes:
        block, number: where it is: "input_blocks.4", and the number of its transformer block there.
        attention, projection: which of that block's: "attn1" or "attn2"; "q", "k" or "v".
        name: what files call the module there.
        channels: of the projection's input.
        depth: 1, 2 or 3: each halves the feature map once more, from an eighth of the picture.
    """

    block: str
    number: int
    attention: str
    projection: str
    name: str
    channels: int
    depth: int


def places(unet: UNet) -> Iterator[Place]:
    """Every projection that sees the feature map, in the checkpoint's order."""
    for path, module in unet.named_modules():
        if isinstance(module, CrossAttention):
            before, after = path.split(".transformer_blocks.")
            number, attention = after.split(".")
            block = before.rpartition(".")[0]
            for projection in ("q", "k", "v") if attention == "attn1" else ("q",):
                name = f"{PREFIX}_{path.replace('.', '_')}_to_{projection}"
                yield Place(
                    block,
                    int(number),
                    attention,
                    projection,
                    name,
                    module.to_q.in_features,
                    _depth(block),
                )


def _depth(block: str) -> int:
    first, _, number = block.partition(".")
    if first == "middle_block":
        return 3
    return int(number) // 3 + 1 if first == "input_blocks" else 3 - int(number) // 3


def trained_places(unet: UNet, blocks: Sequence[str] | None = None) -> list[Place]:
    """Those that get modules: of these blocks ("input_blocks.4", or "input_blocks" for all of them), or where sd-scripts has them."""
    chosen = blocks or TRAINED_BLOCKS
    return [
        place
        for place in places(unet)
        if place.block in chosen or place.block.partition(".")[0] in chosen
    ]


def _embedding(channels: int, depth: int) -> nn.Sequential:
    """The picture's own convolutions: [B, 3, H, W] -> [B, C, H / 2^(2 + depth), W / 2^(2 + depth)]."""
    half = channels // 2
    first = nn.Conv2d(3, half, 4, stride=4)
    if depth == 1:
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(half, channels, 2, stride=2))
    if depth == 2:
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(half, channels, 4, stride=4))
    return nn.Sequential(
        first,
        nn.ReLU(),
        nn.Conv2d(half, half, 4, stride=4),
        nn.ReLU(),
        nn.Conv2d(half, channels, 2, stride=2),
    )


class LLLiteModule(nn.Module):
    """What steers one layer. Its children have the names that files give them."""

    def __init__(self, place: Place, embedding_channels: int, channels: int):
        super().__init__()
        self.shape = (place.depth, embedding_channels, channels)
        self.conditioning1 = _embedding(embedding_channels, place.depth)
        self.down = nn.Sequential(nn.Linear(place.channels, channels))
        self.mid = nn.Sequential(nn.Linear(embedding_channels + channels, channels))
        self.up = nn.Sequential(nn.Linear(channels, place.channels))
        nn.init.zeros_(self.part("up").weight)

    def part(self, name: str) -> nn.Linear:
        part = self.get_submodule(name)[0]  # type: ignore[index]
        assert isinstance(part, nn.Linear)
        return part

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self.conditioning1 if isinstance(layer, nn.Conv2d)]

    @property
    def middle_weights(self) -> tuple[Tensor, Tensor]:
        """Those of the embedding, [M, C], and of what comes from the layer's input, [M, M]."""
        weight = self.part("mid").weight
        embedding_channels = self.shape[1]
        return weight[:, :embedding_channels], weight[:, embedding_channels:]

    def steering(self, condition: Tensor, strength: float, dropout: float) -> LLLiteModulation:
        """Args: condition: of `conditions`."""
        dtype = condition.dtype
        down, up = self.part("down"), self.part("up")
        return LLLiteModulation(
            condition,
            down.weight.to(dtype),
            down.bias.to(dtype),
            self.middle_weights[1].to(dtype),
            strength * up.weight.to(dtype),
            strength * up.bias.to(dtype),
            dropout,
        )


class ControlNetLLLite(nn.Module):
    """The modules of one control net; its children have the names that files give them. It is called with the picture."""

    def __init__(self, shapes: Mapping[Place, tuple[int, int]], *, dropout: float = 0.0):
        """Args:
        shapes: (C, M) of the module at each place.
        dropout: probability of leaving out a value of the small networks, while it trains.
        """
        super().__init__()
        self.places, self.dropout = list(shapes), dropout
        for place, (embedding_channels, channels) in shapes.items():
            self.add_module(place.name, LLLiteModule(place, embedding_channels, channels))

    def forward(
        self, images: Tensor, strength: float = 1.0
    ) -> list[tuple[Place, LLLiteModulation]]:
        """How the pictures steer the U-Net: made once, for all denoising steps.

        Args: pictures: [B, 3, H, W] in -1..1, H and W multiples of 32; one picture for a batch of any size, or one for each sample.
        """
        dropout = self.dropout if self.training else 0.0
        found: list[tuple[Place, LLLiteModulation]] = []
        for places in self._alike():
            modules = [self.lllite(place) for place in places]
            for place, module, condition in zip(
                places, modules, conditions(modules, images), strict=True
            ):
                found.append((place, module.steering(condition, strength, dropout)))
        return found

    def _alike(self) -> list[list[Place]]:
        """The places by the shape of their modules."""
        groups: dict[tuple[int, int, int], list[Place]] = {}
        for place in self.places:
            groups.setdefault(self.lllite(place).shape, []).append(place)
        return list(groups.values())

    def lllite(self, place: Place) -> LLLiteModule:
        module = self.get_submodule(place.name)
        assert isinstance(module, LLLiteModule)
        return module


def conditions(modules: Sequence[LLLiteModule], images: Tensor) -> list[Tensor]:
    """What the pictures add within the small network of each module, [B, N, M]; the modules have one shape.

    All modules see the same pictures, so their convolutions run as one with a group for each, and so does the embedding's share
    of the middle layer: a dozen kernels instead of hundreds.
    """
    h = images
    for number, layers in enumerate(zip(*(module.convolutions for module in modules), strict=True)):
        weight = torch.cat([layer.weight for layer in layers]).to(h.dtype)
        bias = torch.cat([_bias(layer) for layer in layers]).to(h.dtype)
        h = F.conv2d(
            F.relu(h) if number else h,
            weight,
            bias,
            layers[0].stride,
            groups=len(modules) if number else 1,
        )
    weight = torch.cat([module.middle_weights[0] for module in modules])[:, :, None, None].to(
        h.dtype
    )
    bias = torch.cat([module.part("mid").bias for module in modules]).to(h.dtype)
    h = F.conv2d(h, weight, bias, groups=len(modules))
    return [part.flatten(2).transpose(1, 2).contiguous() for part in h.chunk(len(modules), dim=1)]


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def by_block(steerings: Iterable[tuple[Place, LLLiteModulation]]) -> ControlInputs:
    """The steerings of one or more control nets, as the U-Net's blocks take them."""
    extra: dict[str, list[BlockControl]] = {}
    for place, steering in steerings:
        blocks = extra.setdefault(place.block, [])
        blocks += [BlockControl()] * (place.number + 1 - len(blocks))
        attention: AttentionControl = getattr(blocks[place.number], place.attention)
        steered = {place.projection: (*getattr(attention, place.projection), steering)}
        blocks[place.number] = blocks[place.number]._replace(
            **{place.attention: attention._replace(**steered)}
        )
    return extra
