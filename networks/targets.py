"""Targets: the layers of the U-Net and the text encoders that networks change, and their names in network files.

Names and order: contract, formats.md section 4.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from library.models.text_encoders import clip_body
from library.models.unet import UNet, block_of
from library.param_group import Component

UNET: Component = "unet"
TEXT_ENCODERS: tuple[Component, Component] = ("text_encoder_1", "text_encoder_2")
_PREFIXES = {UNET: "lora_unet", TEXT_ENCODERS[0]: "lora_te1", TEXT_ENCODERS[1]: "lora_te2"}
_UNET_BLOCKS = ("input_blocks.", "middle_block.", "output_blocks.")

# In each layer of a text encoder, in the order of files and optimizer.
_TEXT_LAYERS = (
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


class Target(NamedTuple):
    """A layer that a network can change.

    Attributes:
        component: "unet", "text_encoder_1" or "text_encoder_2".
        name: the module's name in files, such as lora_unet_input_blocks_4_1_proj_in.
        parent: the module that holds the layer.
        attribute: the layer's name in `parent`.
        block: index of the U-Net block, 0..22; None in text encoders.
        in_residual: the layer belongs to a residual block or to resampling; these get modules only
            with conv_dim.
        is_used: the output depends on the layer. No output depends on the last layer of the first
            text encoder.
    """

    component: Component
    name: str
    parent: nn.Module
    attribute: str
    block: int | None = None
    in_residual: bool = False
    is_used: bool = True

    @property
    def layer(self) -> nn.Module:
        """The layer; once a network is attached, the layer that replaced it."""
        return getattr(self.parent, self.attribute)

    def replace(self, layer: nn.Module) -> None:
        """Put `layer` in place of the current one."""
        setattr(self.parent, self.attribute, layer)


def module_key(component: Component, path: str) -> str:
    """Return the name in files of the module for the layer at `path`."""
    return f"{_PREFIXES[component]}_{path.replace('.', '_')}"


def unet_targets(unet: UNet) -> Iterator[Target]:
    """Yield every layer of the U-Net that can have a LoRA, in the checkpoint's order."""
    for path, layer in unet.named_modules():
        is_layer = isinstance(layer, nn.Linear | nn.Conv2d)
        if not is_layer or not path.startswith(_UNET_BLOCKS) or path == "input_blocks.0.0":
            continue
        in_transformer = ".transformer_blocks." in path or path.endswith((".proj_in", ".proj_out"))
        parent, _, attribute = path.rpartition(".")
        yield Target(
            UNET,
            module_key(UNET, path),
            unet.get_submodule(parent),
            attribute,
            block_of(path),
            in_residual=not in_transformer,
        )


def text_encoder_targets(encoder: Any, index: int) -> Iterator[Target]:
    """Yield every layer of a text encoder that can have a LoRA.

    Args:
        encoder: the text encoder.
        index: 0 for SDXL's first text encoder, 1 for its second.
    """
    component = TEXT_ENCODERS[index]
    layers = clip_body(encoder).encoder.layers
    for i, layer in enumerate(layers):
        is_used = index == 1 or i < len(layers) - 1
        for path in _TEXT_LAYERS:
            name = module_key(component, f"text_model.encoder.layers.{i}.{path}")
            parent, _, attribute = path.rpartition(".")
            holder = layer.get_submodule(parent)
            yield Target(component, name, holder, attribute, is_used=is_used)


def all_targets(unet: UNet | None, encoders: Iterable[Any]) -> list[Target]:
    """Return the targets of both text encoders, then those of the U-Net if there is one."""
    targets: list[Target] = []
    for i, encoder in enumerate(encoders):
        targets += text_encoder_targets(encoder, i)
    if unet is not None:
        targets += unet_targets(unet)
    return targets
