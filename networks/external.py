"""Networks of other packages: any module with sd-scripts' create_network, such as lycoris.kohya.

The interface: contract, formats.md section 4 ("Other built-in modules"), and lycoris-lora 4.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError, first_line
from library.models.text_encoders import clip_body
from library.models.unet import UNet
from library.param_group import Component, ParamGroup
from networks.base import Network
from networks.lora_file import TRAINING_REMEDY, copy_fitting, read_tensors
from networks.options import NetworkOptions


class ExternalNetwork(Network):
    """Another package's network."""

    def __init__(
        self,
        created: Any,
        unet: UNet,
        encoders: Sequence[nn.Module],
        compute: torch.dtype,
        options: NetworkOptions,
    ):
        """Attach the network to the models.

        Args:
            created: the network that the package's create_network returned.
            unet: the U-Net.
            encoders: the text encoders that it covers.
            compute: the dtype in which the layers compute. The package's parameters are float32 and
                require autocast.
            options: the options of the network.
        """
        self._network = created
        self._encoders = list(encoders)
        self._shape = (options.network_dim or 4, options.network_alpha)
        forwards = _forwards([unet, *encoders])
        trains_encoders = bool(encoders) and not options.network_train_unet_only
        trains_unet = not options.network_train_text_encoder_only
        self._network.apply_to(self._encoders, unet, trains_encoders, trains_unet)
        for layer, forward in _forwards([unet, *encoders]).items():
            if forward is not forwards[layer] and compute is not torch.float32:
                layer.forward = _in_autocast(forward, compute)

    @property
    def module(self) -> nn.Module:
        return self._network

    @property
    def shape(self) -> tuple[object, object]:
        return self._shape

    def attach(self) -> None:
        """Do nothing: apply_to, which also names the parameters, has attached the network."""

    def set_multiplier(self, multiplier: float) -> None:
        self._network.set_multiplier(multiplier)

    def limit_norms(self, max_norm: float) -> None:
        device = next(self.module.parameters()).device
        self._network.apply_max_norm_regularization(max_norm, device)

    def untrainable(self) -> list[str]:
        """Return the modules of the first text encoder's last layer, whose output isn't used."""
        if not self._encoders:
            return []
        last = len(clip_body(self._encoders[0]).encoder.layers) - 1
        start = f"lora_te1_text_model_encoder_layers_{last}_"
        return sorted({_module_name(name) for name in self.tensors() if name.startswith(start)})

    def groups(self, unet_lr: float, text_encoder_lrs: tuple[float, float]) -> list[ParamGroup]:
        """Return the groups that the package defines, without parameters that can't be trained."""
        members, group_names = self._package_groups(unet_lr, text_encoder_lrs)
        untrainable = set(self.untrainable())
        name_of = {id(parameter): name for name, parameter in self.tensors().items()}
        groups = []
        for i, member in enumerate(members):
            parameters = {}
            for parameter in member["params"]:
                name = name_of[id(parameter)]
                if _module_name(name) not in untrainable:
                    parameters[name] = parameter
            lr = float(member.get("lr", unet_lr))
            if parameters and lr:
                group_name = group_names[i] if i < len(group_names) else f"group{i}"
                groups.append(ParamGroup(group_name, parameters, lr, _component_of(parameters)))
        return groups

    def _package_groups(
        self, unet_lr: float, text_encoder_lrs: tuple[float, float]
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[str]]:
        """Return the package's groups, as torch's optimizers take them, and the names of some."""
        if hasattr(self._network, "prepare_optimizer_params_with_multiple_te_lrs"):
            groups = self._network.prepare_optimizer_params_with_multiple_te_lrs(
                list(text_encoder_lrs), unet_lr, unet_lr
            )
        else:
            groups = self._network.prepare_optimizer_params(text_encoder_lrs[0], unet_lr, unet_lr)
        return groups if isinstance(groups, tuple) else (groups, [])


def _module_name(key: str) -> str:
    return key.partition(".")[0]


def _component_of(names: Iterable[str]) -> Component:
    """Return what the parameters of these names in files belong to."""
    is_text = [name.startswith("lora_te") for name in names]
    if all(is_text):
        return "text_encoders"
    return "mixed" if any(is_text) else "unet"


class _TextModelHolder(nn.Module):
    """Holds an encoder as `text_model`, whatever transformers names it: files use that name."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_model = getattr(encoder, "text_model", encoder)


def build(
    options: NetworkOptions, unet: UNet, encoders: Sequence[nn.Module], compute: torch.dtype
) -> ExternalNetwork:
    """Build the network with the weights of --network_weights; networks/build.py calls this function.

    Args:
        options: the options of the network.
        unet: the U-Net.
        encoders: the text encoders that it covers.
        compute: dtype of the computation.

    Raises:
        OptionError: if the module can't build it, or --network_weights don't fit.
        NotImplementedError: if it can't be built on the meta device.
    """
    if options.network_weights is None:
        return _create(options, unet, encoders, None, compute)
    tensors = read_tensors(options.network_weights)
    network = _create(options, unet, encoders, tensors, compute)
    copy_fitting(
        tensors,
        network.file_tensors(),
        source=f"--network_weights {options.network_weights}",
        remedy=TRAINING_REMEDY,
        allow_partial=options.allow_partial,
    )
    return network


def _create(
    options: NetworkOptions,
    unet: UNet,
    encoders: Sequence[nn.Module],
    weights: Mapping[str, Tensor] | None,
    compute: torch.dtype,
) -> ExternalNetwork:
    """Return the network that the module creates; with --dim_from_weights, with the shapes of `weights`."""
    module = import_network(str(options.network_module))
    holders = [_TextModelHolder(encoder) for encoder in encoders]
    pairs = options.network_args or ()
    arguments: dict[str, Any] = dict(pair.split("=", 1) for pair in pairs)
    try:
        if options.dim_from_weights and weights is not None:
            path = str(options.network_weights)
            created = module.create_network_from_weights(
                1.0, path, None, holders, unet, dict(weights), **arguments
            )[0]
        else:
            _add_dropout(module, arguments, options.network_dropout)
            if "warn_on_unmatched" in inspect.signature(module.create_network).parameters:
                arguments.setdefault("warn_on_unmatched", False)  # lycoris lists all models' layers
            created = module.create_network(
                1.0, options.network_dim, options.network_alpha, None, holders, unet, **arguments
            )
        return ExternalNetwork(created, unet, holders, compute, options)
    except Exception as error:  # other packages raise any exception for arguments that don't fit
        if "meta" in str(error):  # a dry run has no weights, but the package's code reads values
            raise NotImplementedError from error
        raise OptionError(
            f"--network_module {options.network_module} with --network_args "
            f"{' '.join(pairs) or 'none'}: {type(error).__name__}: {first_line(error)}"
        ) from error


def import_network(name: str) -> ModuleType:
    """Return the module of --network_module.

    Raises:
        OptionError: if it can't be imported, or has no create_network.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"--network_module {name}: can't be imported ({error})") from None
    if not hasattr(module, "create_network"):
        raise OptionError(
            f"--network_module {name}: has no create_network, the function that creates a network"
        )
    return module


def _add_dropout(module: ModuleType, arguments: dict[str, Any], dropout: float | None) -> None:
    """Add --network_dropout by the name that the package's function has for it."""
    if dropout is None:
        return
    if "neuron_dropout" in inspect.signature(module.create_network).parameters:
        arguments["neuron_dropout"] = dropout
    else:
        arguments.setdefault("dropout", dropout)


def _forwards(modules: Sequence[nn.Module]) -> dict[nn.Module, Any]:
    """Return the `forward` that is set on each layer itself; None where only its class has one."""
    forwards = {}
    for module in modules:
        for layer in module.modules():
            forwards[layer] = layer.__dict__.get("forward")
    return forwards


def _in_autocast(forward: Any, dtype: torch.dtype) -> Any:
    """Return `forward` under autocast: packages mix float32 weights with the layer's dtype."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            result: Tensor = forward(x, *args, **kwargs)
        return result

    return run
