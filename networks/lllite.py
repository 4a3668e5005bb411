"""ControlNet-LLLite: small networks that make the U-Net's attention follow a conditioning image.

    c = conditioning1(image)      strided convolutions, to the size of the layer's feature map
    y = layer(x + strength * up(dropout(relu(mid [c, relu(down x)]))))

Shapes: B batch, H and W of the image in pixels, N positions of a layer's feature map, D its
channels, C of the embedding, M of the small network. Files, names and mathematics: contract,
formats.md section 8 and training_math.md section 9.
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
TRAINED_BLOCKS = ("input_blocks", "middle_block")
"""The blocks for which sd-scripts trains modules. Files of other programs may have more."""


class AttentionProjection(NamedTuple):
    """A projection of an attention layer, whose input a module can change.

    Attributes:
        block: the U-Net block, such as "input_blocks.4".
        transformer_index: the index of the transformer block in it.
        attention: "attn1" or "attn2" of the transformer block.
        kind: "q", "k" or "v".
        name: the name in files of the module for it.
        channels: D.
        depth: 1, 2 or 3. Each level halves the feature map; level 0 has an eighth of the image size.
    """

    block: str
    transformer_index: int
    attention: str
    kind: str
    name: str
    channels: int
    depth: int


def attention_projections(unet: UNet) -> Iterator[AttentionProjection]:
    """Yield every projection of the feature map, in the checkpoint's order."""
    for path, module in unet.named_modules():
        if not isinstance(module, CrossAttention):
            continue
        parent, in_transformer = path.split(".transformer_blocks.")
        index, attention = in_transformer.split(".")
        block = parent.rpartition(".")[0]
        kinds = ("q", "k", "v") if attention == "attn1" else ("q",)
        for kind in kinds:
            yield AttentionProjection(
                block=block,
                transformer_index=int(index),
                attention=attention,
                kind=kind,
                name=f"{PREFIX}_{path.replace('.', '_')}_to_{kind}",
                channels=module.to_q.in_features,
                depth=_depth(block),
            )


def _depth(block: str) -> int:
    blocks, _, index = block.partition(".")
    if blocks == "middle_block":
        return 3
    level = int(index) // 3
    return level + 1 if blocks == "input_blocks" else 3 - level


def trained_projections(
    unet: UNet, blocks: Sequence[str] | None = None
) -> list[AttentionProjection]:
    """Return the projections that get modules.

    Args:
        unet: the U-Net.
        blocks: their blocks: "input_blocks.4", or "input_blocks" for all of those; None: as in
            sd-scripts.
    """
    blocks = blocks or TRAINED_BLOCKS
    trained = []
    for projection in attention_projections(unet):
        if projection.block in blocks or projection.block.partition(".")[0] in blocks:
            trained.append(projection)
    return trained


def _embedding(channels: int, depth: int) -> nn.Sequential:
    """Return the convolutions of the image, [B, 3, H, W] -> [B, C, H / 2^(2 + depth), W / 2^(2 + depth)]."""
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
    """The small network of one projection. Its children are named as in files."""

    def __init__(self, projection: AttentionProjection, embedding_channels: int, channels: int):
        """Create the module.

        Args:
            projection: the projection whose input it changes.
            embedding_channels: C.
            channels: M.
        """
        super().__init__()
        self.shape = (projection.depth, embedding_channels, channels)
        self.conditioning1 = _embedding(embedding_channels, projection.depth)
        self.down = nn.Sequential(nn.Linear(projection.channels, channels))
        self.mid = nn.Sequential(nn.Linear(embedding_channels + channels, channels))
        self.up = nn.Sequential(nn.Linear(channels, projection.channels))
        nn.init.zeros_(self.linear("up").weight)

    def linear(self, name: str) -> nn.Linear:
        """Return the layer "down", "mid" or "up"."""
        layer = self.get_submodule(f"{name}.0")
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self.conditioning1 if isinstance(layer, nn.Conv2d)]

    @property
    def middle_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of `mid` for the embedding, [M, C], and for the output of `down`, [M, M]."""
        weight = self.linear("mid").weight
        embedding_channels = self.shape[1]
        return weight[:, :embedding_channels], weight[:, embedding_channels:]

    def modulation(self, condition: Tensor, strength: float, dropout: float) -> LLLiteModulation:
        """Return the modulation of the projection's input.

        Args:
            condition: the result of `conditions` for this module, [B, N, M].
            strength: factor of the change.
            dropout: probability of dropping an input value of `up`.
        """
        dtype = condition.dtype
        down, up = self.linear("down"), self.linear("up")
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
    """The modules of one control net. Its children are named as in files."""

    def __init__(
        self, shapes: Mapping[AttentionProjection, tuple[int, int]], *, dropout: float = 0.0
    ):
        """Create the modules.

        Args:
            shapes: (C, M) of the module for each projection.
            dropout: probability of dropping an input value of `up` in training.
        """
        super().__init__()
        self.projections = list(shapes)
        self.dropout = dropout
        for projection, (embedding_channels, channels) in shapes.items():
            module = LLLiteModule(projection, embedding_channels, channels)
            self.add_module(projection.name, module)

    def forward(
        self, images: Tensor, strength: float = 1.0
    ) -> list[tuple[AttentionProjection, LLLiteModulation]]:
        """Return the modulation of each projection's input, which is the same in all denoising steps.

        Args:
            images: conditioning images, [B, 3, H, W] in -1..1, H and W multiples of 32. One image
                applies to a batch of any size.
            strength: factor of the changes.
        """
        dropout = self.dropout if self.training else 0.0
        modulations = []
        for projections in self._projections_by_shape():
            modules = [self.lllite(projection) for projection in projections]
            for i, condition in enumerate(conditions(modules, images)):
                modulation = modules[i].modulation(condition, strength, dropout)
                modulations.append((projections[i], modulation))
        return modulations

    def _projections_by_shape(self) -> list[list[AttentionProjection]]:
        """Return the projections in groups whose modules have one shape."""
        groups: dict[tuple[int, int, int], list[AttentionProjection]] = {}
        for projection in self.projections:
            groups.setdefault(self.lllite(projection).shape, []).append(projection)
        return list(groups.values())

    def lllite(self, projection: AttentionProjection) -> LLLiteModule:
        """Return the module for a projection."""
        module = self.get_submodule(projection.name)
        assert isinstance(module, LLLiteModule)
        return module


def conditions(modules: Sequence[LLLiteModule], images: Tensor) -> list[Tensor]:
    """Return what the images add to the middle layer of each module, [B, N, M].

    All modules see the same images, so their convolutions run as one with a group per module, and
    so does the part of the middle layer that sees the embedding: a dozen kernels instead of hundreds.

    Args:
        modules: modules of one shape.
        images: conditioning images, [B, 3, H, W].
    """
    h = images
    convolutions = zip(*(module.convolutions for module in modules), strict=True)
    for i, layers in enumerate(convolutions):
        weight = torch.cat([layer.weight for layer in layers]).to(h.dtype)
        bias = torch.cat([_bias(layer) for layer in layers]).to(h.dtype)
        if i == 0:
            h = F.conv2d(h, weight, bias, layers[0].stride)
        else:
            h = F.conv2d(F.relu(h), weight, bias, layers[0].stride, groups=len(modules))
    weight = torch.cat([module.middle_weights[0] for module in modules])[:, :, None, None]
    bias = torch.cat([module.linear("mid").bias for module in modules])
    h = F.conv2d(h, weight.to(h.dtype), bias.to(h.dtype), groups=len(modules))
    chunks = h.chunk(len(modules), dim=1)
    return [chunk.flatten(2).transpose(1, 2).contiguous() for chunk in chunks]


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def to_control_inputs(
    modulations: Iterable[tuple[AttentionProjection, LLLiteModulation]],
) -> ControlInputs:
    """Return the modulations of one or more control nets, sorted by the U-Net's blocks."""
    control_inputs: dict[str, list[BlockControl]] = {}
    for projection, modulation in modulations:
        blocks = control_inputs.setdefault(projection.block, [])
        while len(blocks) <= projection.transformer_index:
            blocks.append(BlockControl())
        block = blocks[projection.transformer_index]
        attention: AttentionControl = getattr(block, projection.attention)
        earlier = getattr(attention, projection.kind)
        attention = attention._replace(**{projection.kind: (*earlier, modulation)})
        blocks[projection.transformer_index] = block._replace(**{projection.attention: attention})
    return control_inputs
