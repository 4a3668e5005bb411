"""LoRA: a low-rank change of the linear layers and convolutions of the U-Net and the text encoders (networks/lora_layers.py).

File format, names and order: contract, formats.md section 4. Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.models.text_encoders import clip_body
from library.models.unet import UNet, block_of
from library.param_group import ParamGroup
from networks.lora_layers import LoraModule, add_lora
from networks.lora_settings import LoraSettings

# In each layer of a text encoder, in the order of files and optimizer.
_TEXT_LAYERS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")

UNET, TEXT_ENCODERS = "unet", ("text_encoder_1", "text_encoder_2")
_PREFIXES = {"unet": "lora_unet", "text_encoder_1": "lora_te1", "text_encoder_2": "lora_te2"}


class Target(NamedTuple):
    """A layer that may get a LoRA.

    Attributes:
        part: "unet", "text_encoder_1" or "text_encoder_2".
        name: the module's name in files, lora_unet_….
        parent: the module that holds the layer.
        attribute: the layer's name in `parent`.
        block: the U-Net block, 0..22; None in text encoders.
        in_residual: the layer belongs to a residual block or to resampling, which get modules only with conv_dim.
        is_used: the output depends on the layer. That of the first text encoder doesn't depend on its last layer.
    """

    part: str
    name: str
    parent: nn.Module
    attribute: str
    block: int | None = None
    in_residual: bool = False
    is_used: bool = True

    @property
    def layer(self) -> nn.Module:
        """The layer; once a network is attached, the one that replaces it."""
        return getattr(self.parent, self.attribute)

    def replace(self, layer: nn.Module) -> None:
        """Put another layer in its place."""
        setattr(self.parent, self.attribute, layer)


def unet_targets(unet: UNet) -> Iterator[Target]:
    """Yield every layer of the U-Net that can have a LoRA, in the checkpoint's order."""
    for path, layer in unet.named_modules():
        is_layer = isinstance(layer, nn.Linear | nn.Conv2d) and path.startswith(
            ("input_blocks.", "middle_block.", "output_blocks.")
        )
        if is_layer and path != "input_blocks.0.0":
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


def text_encoder_targets(encoder: Any, number: int) -> Iterator[Target]:
    """Yield every layer of text encoder 1 or 2 that can have a LoRA."""
    part = TEXT_ENCODERS[number - 1]
    layers = clip_body(encoder).encoder.layers
    for i, layer in enumerate(layers):
        is_used = number == 2 or i < len(layers) - 1
        for path in _TEXT_LAYERS:
            name = module_key(part, f"text_model.encoder.layers.{i}.{path}")
            parent, _, attribute = path.rpartition(".")
            yield Target(part, name, layer.get_submodule(parent), attribute, is_used=is_used)


def module_key(part: str, path: str) -> str:
    """Return the name in files of the module for the layer at `path`."""
    return f"{_PREFIXES[part]}_{path.replace('.', '_')}"


class LoraNetwork(nn.Module):
    """The LoRA modules of a U-Net and its text encoders; its children have the names that files give them.

    It isn't called: once attached, its modules work when the layers are called.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        ranks: Mapping[str, tuple[int, float]],
        settings: LoraSettings,
        *,
        from_file: bool = False,
    ):
        """Args:
        ranks: (rank, alpha) by module name; a target that isn't there, or has rank 0, gets no module.
        from_file: they are a file's, not the settings'.
        """
        super().__init__()
        self.settings, self._from_file = settings, from_file
        self.targets: list[Target] = []
        dropouts = {
            "dropout": settings.dropout,
            "rank_dropout": settings.rank_dropout,
            "module_dropout": settings.module_dropout,
        }
        for target in targets:
            rank, alpha = ranks.get(target.name, (0, 0.0))
            if rank:
                self.targets.append(target)
                self.add_module(target.name, LoraModule(target.layer, rank, alpha or rank, **dropouts))

    @classmethod
    def from_settings(cls, targets: Iterable[Target], settings: LoraSettings) -> "LoraNetwork":
        """A new network: which layers get modules, and of which rank, is what the settings say."""
        targets = list(targets)
        return cls(targets, {target.name: _rank(target, settings) for target in targets}, settings)

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def shape(self) -> tuple[object, object]:
        """Rank and alpha, for the metadata; those of a file where it has one of each (--dim_from_weights)."""
        if not self._from_file:
            return self.settings.dim, self.settings.alpha
        shapes = {(lora.rank, lora.alpha) for lora in self.loras()}
        return shapes.pop() if len(shapes) == 1 else ("Dynamic", "Dynamic")

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return dict(self.named_parameters())

    def lora(self, name: str) -> LoraModule:
        lora = self.get_submodule(name)
        assert isinstance(lora, LoraModule)
        return lora

    def loras(self) -> Iterator[LoraModule]:
        return (self.lora(target.name) for target in self.targets)

    def attach(self) -> None:
        """Replace each layer by one with its LoRA."""
        for target in self.targets:
            target.replace(add_lora(target.layer, self.lora(target.name)))

    def set_multiplier(self, multiplier: float) -> None:
        for lora in self.loras():
            lora.multiplier = multiplier

    def limit_norms(self, most: float) -> None:
        """--scale_weight_norms: no module's change is larger than `most`."""
        for lora in self.loras():
            lora.limit_norm(most)

    def untrainable(self) -> list[str]:
        """The modules that can't get a gradient, as nothing depends on their layer. They are saved all the same."""
        return [target.name for target in self.targets if not target.is_used]

    def groups(self, unet_lr: float, text_encoder_lrs: tuple[float, float]) -> list[ParamGroup]:
        """What is trained at which learning rate: text encoders, then the U-Net, by block where blocks differ.

        A group at 0 isn't trained and isn't here. With LoRA+, up projections form groups of their own.
        """
        groups: list[ParamGroup] = []
        settings = self.settings
        same = text_encoder_lrs[0] == text_encoder_lrs[1]
        for number, (part, lr) in enumerate(zip(TEXT_ENCODERS, text_encoder_lrs, strict=True), 1):
            name = "textencoder" if same else f"textencoder{number}"
            _add_groups(groups, name, self._trainable(part), lr, settings.loraplus_text_encoder_lr_ratio)
        if settings.block_lr_weights is None:
            _add_groups(groups, "unet", self._trainable(UNET), unet_lr, settings.loraplus_unet_lr_ratio)
        else:
            for block, weight in enumerate(settings.block_lr_weights):
                _add_groups(
                    groups,
                    f"unet_block{block}",
                    self._trainable(UNET, block),
                    unet_lr * weight,
                    settings.loraplus_unet_lr_ratio,
                )
        return groups

    def _trainable(self, part: str, block: int | None = None) -> dict[str, nn.Parameter]:
        """The trainable parameters of a part or block of it, by the names that files give them."""
        chosen = [t for t in self.targets if t.part == part and t.is_used and block in (None, t.block)]
        return {
            f"{t.name}.{name}": parameter for t in chosen for name, parameter in self.lora(t.name).named_parameters()
        }

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file holds: lora_down.weight, lora_up.weight and alpha of each module."""
        tensors: dict[str, Tensor] = {}
        for target in self.targets:
            lora = self.lora(target.name)
            tensors |= {f"{target.name}.{name}": parameter.detach() for name, parameter in lora.named_parameters()}
            tensors[f"{target.name}.alpha"] = torch.tensor(float(lora.alpha))
        return tensors


def _rank(target: Target, settings: LoraSettings) -> tuple[int, float]:
    if target.block is None:
        return settings.dim, settings.alpha
    if target.in_residual and not settings.has_convolutions:
        return 0, 0.0
    is_conv3x3 = isinstance(target.layer, nn.Conv2d) and target.layer.kernel_size != (1, 1)
    return settings.rank_in_block(target.block, is_conv3x3=is_conv3x3)


def _add_groups(
    groups: list[ParamGroup], name: str, parameters: dict[str, nn.Parameter], lr: float, up_ratio: float
) -> None:
    """Append the group, split in two if up projections learn faster; a group of that name takes it in (both text encoders)."""
    parts = {"": parameters}
    if up_ratio != 1.0:
        is_up = {key: key.endswith("lora_up.weight") for key in parameters}
        parts = {
            "": {k: p for k, p in parameters.items() if not is_up[k]},
            " plus": {k: p for k, p in parameters.items() if is_up[k]},
        }
    for suffix, members in parts.items():
        rate = lr * up_ratio if suffix else lr
        known = next((group for group in groups if group.name == name + suffix), None)
        if known is not None:
            known.parameters.update(members)
        elif members and rate:
            groups.append(ParamGroup(name + suffix, dict(members), rate))
