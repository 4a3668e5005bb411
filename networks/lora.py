"""LoRA: a low-rank change of the linear layers and convolutions of the U-Net and the text encoders.

networks/lora_layers.py has the mathematics. File format, names and order: contract, formats.md
section 4. Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.models.unet import UNet
from library.param_group import Component, ParamGroup
from networks.base import Network
from networks.lora_file import TRAINING_REMEDY, copy_fitting, ranks_in_file, read_lora
from networks.lora_layers import LoraModule, add_lora
from networks.lora_settings import LoraSettings
from networks.options import NetworkOptions
from networks.targets import TEXT_ENCODERS, UNET, Target, all_targets


def build(
    options: NetworkOptions, unet: UNet, encoders: Sequence[Any], compute: torch.dtype
) -> "LoraNetwork":
    """Build a LoRA with the weights of --network_weights; networks/build.py calls this function.

    Args:
        options: the options of the network.
        unet: the U-Net.
        encoders: the text encoders that it covers.
        compute: not used: layers compute in the dtype of their input.

    Raises:
        OptionError: if --network_weights don't fit.
    """
    settings, _ = options.read_settings()
    targets = all_targets(None if options.network_train_text_encoder_only else unet, encoders)
    if options.network_weights is None:
        return LoraNetwork.from_settings(targets, settings)
    tensors = read_lora(options.network_weights, unet)
    if options.dim_from_weights:
        # Learning rate factors apply, dropouts don't (as in sd-scripts).
        settings = replace(settings, dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
        network = LoraNetwork.from_tensors(targets, tensors, settings)
    else:
        network = LoraNetwork.from_settings(targets, settings)
    network.load(tensors, source=options.network_weights, allow_partial=options.allow_partial)
    return network


class LoraNetwork(nn.Module, Network):
    """The LoRA modules of a U-Net and its text encoders, named as in files.

    The network itself isn't called: once it is attached, its modules run when the layers are called.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        ranks: Mapping[str, tuple[int, float]],
        settings: LoraSettings,
        *,
        from_file: bool = False,
    ):
        """Create the modules.

        Args:
            targets: the layers that can have a module.
            ranks: (rank, alpha) by module name. A target without an entry, or with rank 0, gets no
                module.
            settings: dropouts and learning rate factors.
            from_file: whether the ranks are those of a file instead of the settings.
        """
        super().__init__()
        self.settings = settings
        self._from_file = from_file
        self.targets: list[Target] = []
        for target in targets:
            rank, alpha = ranks.get(target.name, (0, 0.0))
            if not rank:
                continue
            lora = LoraModule(
                target.layer,
                rank,
                alpha or rank,
                dropout=settings.dropout,
                rank_dropout=settings.rank_dropout,
                module_dropout=settings.module_dropout,
            )
            self.targets.append(target)
            self.add_module(target.name, lora)

    @classmethod
    def from_settings(cls, targets: Iterable[Target], settings: LoraSettings) -> "LoraNetwork":
        """Return a new network with the modules and ranks that the settings define."""
        targets = list(targets)
        return cls(targets, {target.name: _rank(target, settings) for target in targets}, settings)

    @classmethod
    def from_tensors(
        cls, targets: Iterable[Target], tensors: Mapping[str, Tensor], settings: LoraSettings
    ) -> "LoraNetwork":
        """Return a network with the modules, ranks and alphas of a file (--dim_from_weights).

        The file's weights are not copied; `load` does that.
        """
        return cls(targets, ranks_in_file(tensors), settings, from_file=True)

    def load(self, tensors: Mapping[str, Tensor], *, source: Path, allow_partial: bool) -> None:
        """Copy a file's weights and alphas into the network.

        Args:
            tensors: the content of the file, with this suite's names.
            source: the file, for messages.
            allow_partial: whether modules may be missing, left over or of another shape.

        Raises:
            OptionError: if modules don't fit, with counts and the first names, unless
                `allow_partial`; always if none fits.
        """
        weights = {}
        alphas = {}
        for name, tensor in tensors.items():
            if name.endswith(".alpha"):
                alphas[name] = tensor
            else:
                weights[name] = tensor
        fitting = copy_fitting(
            weights,
            self.tensors(),
            source=f"--network_weights {source}",
            remedy=TRAINING_REMEDY,
            allow_partial=allow_partial,
        )
        fitting_tensors = alphas | {name: weights[name] for name in fitting}
        for name, (_, alpha) in ranks_in_file(fitting_tensors).items():
            # sd-scripts would scale by the option's alpha and save the file's.
            self.lora(name).alpha = alpha

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def shape(self) -> tuple[object, object]:
        """Rank and alpha, for the metadata; "Dynamic" where the modules of a file differ."""
        if not self._from_file:
            return self.settings.dim, self.settings.alpha
        shapes = {(lora.rank, lora.alpha) for lora in self.loras()}
        if len(shapes) == 1:
            return shapes.pop()
        return "Dynamic", "Dynamic"

    def lora(self, name: str) -> LoraModule:
        """Return the module of this name."""
        lora = self.get_submodule(name)
        assert isinstance(lora, LoraModule)
        return lora

    def loras(self) -> Iterator[LoraModule]:
        """Yield all modules, in the order of the targets."""
        for target in self.targets:
            yield self.lora(target.name)

    def attach(self) -> None:
        """Replace each layer by a layer with its LoRA."""
        for target in self.targets:
            target.replace(add_lora(target.layer, self.lora(target.name)))

    def set_multiplier(self, multiplier: float) -> None:
        for lora in self.loras():
            lora.multiplier = multiplier

    def limit_norms(self, max_norm: float) -> None:
        for lora in self.loras():
            lora.limit_norm(max_norm)

    def untrainable(self) -> list[str]:
        """Return the names of the modules that no output depends on. Files contain them too."""
        return [target.name for target in self.targets if not target.is_used]

    def groups(self, unet_lr: float, text_encoder_lrs: tuple[float, float]) -> list[ParamGroup]:
        """Return the trainable parameters by learning rate: text encoders, then the U-Net.

        The U-Net is divided by block if blocks have learning rates of their own. Groups with
        learning rate 0 are left out. With LoRA+, up projections form separate groups.
        """
        groups: list[ParamGroup] = []
        settings = self.settings
        is_same_lr = text_encoder_lrs[0] == text_encoder_lrs[1]
        for i, lr in enumerate(text_encoder_lrs):
            name, component = f"textencoder{i + 1}", TEXT_ENCODERS[i]
            parameters = self._trainable(component)
            if is_same_lr:
                name, component = "textencoder", "text_encoders"
            group = ParamGroup(name, parameters, lr, component)
            _add_groups(groups, group, settings.loraplus_text_encoder_lr_ratio)
        if settings.block_lr_weights is None:
            group = ParamGroup("unet", self._trainable(UNET), unet_lr)
            _add_groups(groups, group, settings.loraplus_unet_lr_ratio)
            return groups
        for block, weight in enumerate(settings.block_lr_weights):
            parameters = self._trainable(UNET, block)
            group = ParamGroup(f"unet_block{block}", parameters, unet_lr * weight)
            _add_groups(groups, group, settings.loraplus_unet_lr_ratio)
        return groups

    def _trainable(self, component: Component, block: int | None = None) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of a component, or of one block of the U-Net."""
        parameters = {}
        for target in self.targets:
            is_wanted = target.component == component and block in (None, target.block)
            if not is_wanted or not target.is_used:
                continue
            for name, parameter in self.lora(target.name).named_parameters():
                parameters[f"{target.name}.{name}"] = parameter
        return parameters

    def file_tensors(self) -> dict[str, Tensor]:
        """Return lora_down.weight, lora_up.weight and alpha of each module."""
        tensors: dict[str, Tensor] = {}
        for target in self.targets:
            lora = self.lora(target.name)
            for name, parameter in lora.named_parameters():
                tensors[f"{target.name}.{name}"] = parameter.detach()
            tensors[f"{target.name}.alpha"] = torch.tensor(float(lora.alpha))
        return tensors


def _rank(target: Target, settings: LoraSettings) -> tuple[int, float]:
    """Return (rank, alpha) of a target's module; rank 0 means no module."""
    if target.block is None:
        return settings.dim, settings.alpha
    if target.in_residual and not settings.has_convolutions:
        return 0, 0.0
    is_conv3x3 = isinstance(target.layer, nn.Conv2d) and target.layer.kernel_size != (1, 1)
    return settings.rank_in_block(target.block, is_conv3x3=is_conv3x3)


def _add_groups(groups: list[ParamGroup], group: ParamGroup, up_ratio: float) -> None:
    """Add a group, split in two if up projections have a higher learning rate (LoRA+).

    Parameters are added to the group of the same name if there is one: both text encoders may have
    one group. Empty groups and groups with learning rate 0 are left out.

    Args:
        groups: the groups so far.
        group: all parameters, and the learning rate of down projections.
        up_ratio: learning rate of up projections divided by that of down projections.
    """
    if up_ratio == 1.0:
        _add_group(groups, group)
        return
    down: dict[str, nn.Parameter] = {}
    up: dict[str, nn.Parameter] = {}
    for name, parameter in group.parameters.items():
        projections = up if name.endswith("lora_up.weight") else down
        projections[name] = parameter
    _add_group(groups, replace(group, parameters=down))
    up_group = replace(group, name=f"{group.name} plus", parameters=up, lr=group.lr * up_ratio)
    _add_group(groups, up_group)


def _add_group(groups: list[ParamGroup], group: ParamGroup) -> None:
    for known in groups:
        if known.name == group.name:
            known.parameters.update(group.parameters)
            return
    if group.parameters and group.lr:
        groups.append(group)
