"""The stand-in: SDXL base by its sizes alone, for a dry run while the model isn't there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.models.checkpoint import layouts
from library.models.checkpoint.reader import Checkpoint
from library.models.unet_config import BlockPlan, UNetConfig

if TYPE_CHECKING:
    import torch

SDXL_BASE = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    time_channels=1280,
    context_channels=2048,
    vector_channels=2816,
    input_blocks=(
        *(BlockPlan(320, 320), BlockPlan(320, 320), BlockPlan(320, 320, resample=True)),
        *(BlockPlan(320, 640, 2), BlockPlan(640, 640, 2), BlockPlan(640, 640, resample=True)),
        *(BlockPlan(640, 1280, 10), BlockPlan(1280, 1280, 10)),
    ),
    middle_depth=10,
    output_blocks=(
        *(
            BlockPlan(2560, 1280, 10),
            BlockPlan(2560, 1280, 10),
            BlockPlan(1920, 1280, 10, resample=True),
        ),
        *(BlockPlan(1920, 640, 2), BlockPlan(1280, 640, 2), BlockPlan(960, 640, 2, resample=True)),
        *(BlockPlan(960, 320), BlockPlan(640, 320), BlockPlan(640, 320)),
    ),
)
_VAE = {"encoder.conv_in.weight": (128, 3, 3, 3), "the rest": (83_653_863 - 128 * 27,)}


class _Sizes:
    """Tensors on the meta device: a shape and nothing else."""

    def __init__(self, tensors: "Mapping[str, torch.Tensor]"):
        self._tensors = tensors
        self.metadata: Mapping[str, str] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self._tensors[name]


def stand_in(path: Path) -> Checkpoint:
    """A single file of SDXL base, of sizes alone. Args: path: what it is called by."""
    import torch

    from library.models.unet import UNet

    with torch.device("meta"):
        shapes = {
            "unet": {
                name: tuple(tensor.shape) for name, tensor in UNet(SDXL_BASE).state_dict().items()
            },
            "text_encoder_1": dict(_text_encoder(768, 12)),
            "text_encoder_2": {
                **dict(_text_encoder(1280, 32)),
                "text_projection.weight": (1280, 1280),
            },
            "vae": _VAE,
        }
        stored = {}
        for part, own in shapes.items():
            tensors = layouts.file_from_module(
                part, {name: torch.empty(shape) for name, shape in own.items()}
            )
            file = _Sizes(tensors)
            stored[part] = {name: (file, name) for name in tensors}
    return Checkpoint(path, False, SDXL_BASE, None, None, "", stored)


def _text_encoder(width: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    body = "text_model"
    yield f"{body}.embeddings.token_embedding.weight", (49408, width)
    yield f"{body}.embeddings.position_embedding.weight", (77, width)
    for number in range(layers):
        layer = f"{body}.encoder.layers.{number}"
        linear = {f"self_attn.{one}_proj": (width, width) for one in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linear.items():
            yield f"{layer}.{name}.weight", shape
            yield f"{layer}.{name}.bias", shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            yield from ((f"{layer}.{name}.{kind}", (width,)) for kind in ("weight", "bias"))
    yield from ((f"{body}.final_layer_norm.{kind}", (width,)) for kind in ("weight", "bias"))
