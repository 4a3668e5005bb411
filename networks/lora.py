"""LoRA: a low-rank change beside each linear layer and convolution of the U-Net and the text encoders.

y = W x + multiplier * (alpha / r) * up(down(x)),  down [r, in], up [out, r]; up starts at zero.

Shapes: B batch, N positions, r rank. File format, names and order: contract, formats.md section 4.
Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.models.text_encoders import clip_body
from library.models.unet import UNet, block_of
from library.models.unet_blocks import Conv2d, Linear
from library.param_group import Component, ParamGroup
from networks.lora_linear import lora_linear
from networks.options import LoraSettings

# In each layer of a text encoder, in the order of files and optimizer.
_TEXT_LAYERS = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")

UNET, TEXT_ENCODERS = "unet", ("text_encoder_1", "text_encoder_2")
_PREFIXES = {"unet": "lora_unet", "text_encoder_1": "lora_te1", "text_encoder_2": "lora_te2"}


class Target(NamedTuple):
    """A layer that may get a module.

    Attributes:
        part: "unet", "text_encoder_1" or "text_encoder_2".
        name: the module's name in files, lora_unet_….
        block: the U-Net block, 0..22; None in text encoders.
        in_residual: it belongs to a residual block or to resampling, which get modules only with conv_dim.
        is_used: the result depends on it; the first text encoder's last layer is left out of its output.
    """

    part: str
    name: str
    layer: nn.Module
    block: int | None = None
    in_residual: bool = False
    is_used: bool = True


def unet_targets(unet: UNet) -> Iterator[Target]:
    """Every layer of the U-Net that a LoRA may cover, in the checkpoint's order."""
    for path, layer in unet.named_modules():
        is_layer = isinstance(layer, nn.Linear | nn.Conv2d) and path.startswith(
            ("input_blocks.", "middle_block.", "output_blocks.")
        )
        if is_layer and path != "input_blocks.0.0":
            in_transformer = ".transformer_blocks." in path or path.endswith((".proj_in", ".proj_out"))
            yield Target(UNET, module_key(UNET, path), layer, block_of(path), in_residual=not in_transformer)


def text_encoder_targets(encoder: Any, number: int) -> Iterator[Target]:
    """Every layer of text encoder 1 or 2 that a LoRA may cover."""
    part = TEXT_ENCODERS[number - 1]
    layers = clip_body(encoder).encoder.layers
    for i, layer in enumerate(layers):
        is_used = number == 2 or i < len(layers) - 1
        for path in _TEXT_LAYERS:
            yield Target(
                part,
                module_key(part, f"text_model.encoder.layers.{i}.{path}"),
                layer.get_submodule(path),
                is_used=is_used,
            )


def module_key(part: str, path: str) -> str:
    """The name in files of the module beside the layer at `path`."""
    return f"{_PREFIXES[part]}_{path.replace('.', '_')}"


class LoraModule(nn.Module):
    """The change beside one layer."""

    def __init__(
        self,
        layer: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.multiplier = 1.0
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.lora_down: nn.Linear | nn.Conv2d
        self.lora_up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            sizes: Any = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            self.lora_down = Conv2d(layer.in_channels, rank, bias=False, **sizes)
            self.lora_up = Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            assert isinstance(layer, nn.Linear)
            self.lora_down = Linear(layer.in_features, rank, bias=False)
            self.lora_up = Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """base(x) with the change added. Nothing as large as the output is made or kept twice.

        Args:
            x: [B, ..., in], or [B, in, H, W] for convolutions.
            base: the layer's own forward.
        """
        scale = self.multiplier * self.alpha / self.rank
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            scale = 0.0  # gradients become zero instead of missing, which several processes couldn't exchange
        if isinstance(self.lora_down, nn.Conv2d):
            return base(x).add_(self.lora_up(self._dropped(self.lora_down(x))), alpha=scale)
        frozen = None if self._drops else _frozen_linear(base)
        if frozen is not None:
            y = lora_linear(x.flatten(0, -2), *frozen, self.lora_down.weight, self.lora_up.weight, scale)
            return y.unflatten(0, x.shape[:-1])
        # In two dimensions the base's output is no view, so the product can be added in place.
        y = base(x.flatten(0, -2))
        h = self._dropped(self.lora_down(x)).flatten(0, -2)
        return y.addmm_(h, self.lora_up.weight.to(h.dtype).t(), alpha=scale).unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def limit_norm(self, most: float) -> Tensor:
        """Scale both projections down so that the change's Frobenius norm is at most `most`; returns its norm before, [].

        The norm of up @ down is taken from two r x r products, so the change itself is never made.
        Source: contract, training_math.md section 7.
        """
        up, down = self.lora_up.weight.flatten(1).float(), self.lora_down.weight.flatten(1).float()
        norm = self.alpha / self.rank * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        factor = (most / norm.clamp(min=most)).sqrt()
        self.lora_up.weight.mul_(factor)
        self.lora_down.weight.mul_(factor)
        return norm

    @property
    def _drops(self) -> bool:
        return self.training and bool(self.dropout or self.rank_dropout)

    def _dropped(self, h: Tensor) -> Tensor:
        """Dropout of single values and, per sample, of whole ranks. h: [B, ..., r], or [B, r, H, W]."""
        if not self._drops:
            return h
        if self.dropout:
            h = F.dropout(h, self.dropout)
        if self.rank_dropout:
            kept = torch.rand(len(h), self.rank, device=h.device) > self.rank_dropout
            shape = (
                (len(h), self.rank, 1, 1)
                if isinstance(self.lora_down, nn.Conv2d)
                else (len(h), *[1] * (h.ndim - 2), self.rank)
            )
            h = h * (kept.view(shape).to(h.dtype) / (1 - self.rank_dropout))
        return h


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
        """Put each module in front of its layer's own forward."""
        for target in self.targets:
            target.layer.forward = _with_change(self.lora(target.name), target.layer.forward)

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
        components: tuple[Component, Component] = ("text_encoder_1", "text_encoder_2")
        for i, (part, lr) in enumerate(zip(TEXT_ENCODERS, text_encoder_lrs, strict=True)):
            name = "textencoder" if same else f"textencoder{i + 1}"
            component = "text_encoders" if same else components[i]
            _add_groups(groups, name, self._trainable(part), lr, settings.loraplus_text_encoder_lr_ratio, component)
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


def _frozen_linear(base: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias, if `base` is a plain linear layer's own forward and neither is trained."""
    layer = getattr(base, "__self__", None)
    if getattr(base, "__func__", None) not in (Linear.forward, nn.Linear.forward):
        return None
    assert isinstance(layer, nn.Linear)
    is_frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    return (layer.weight, layer.bias) if is_frozen else None


def _with_change(lora: LoraModule, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: lora(x, base)


def _add_groups(
    groups: list[ParamGroup],
    name: str,
    parameters: dict[str, nn.Parameter],
    lr: float,
    up_ratio: float,
    component: Component = "unet",
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
            groups.append(ParamGroup(name + suffix, dict(members), rate, component))
