"""Networks from elsewhere: any module that has sd-scripts' create_network, as lycoris.kohya does.

The interface: contract, formats.md section 4 ("Other built-in modules"); what lycoris-lora 4 offers.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import OptionError, first_line
from library.models.text_encoders import clip_body
from library.models.unet import UNet
from library.param_group import ParamGroup
from networks.lora_file import TRAINING_REMEDY, copy_fitting, read_tensors
from networks.options import NetworkOptions


class ExternalNetwork:
    """Another package's network, as training asks for it (networks/base.py)."""

    def __init__(
        self, made: Any, unet: UNet, encoders: Sequence[nn.Module], compute: torch.dtype, options: NetworkOptions
    ):
        """Args: compute: the dtype in which the layers work; theirs are float32 and meant for autocast."""
        self.module: nn.Module = made
        self._made, self._unet, self._encoders, self._compute = made, unet, list(encoders), compute
        self._options = options
        before = _forwards([unet, *encoders])
        self._made.apply_to(
            self._encoders, unet, not options.network_train_unet_only and bool(encoders), not options.network_train_text_encoder_only
        )  # fmt: skip
        for layer, forward in _forwards([unet, *encoders]).items():
            if forward is not before[layer] and compute is not torch.float32:
                layer.forward = _in_autocast(forward, compute)

    @property
    def shape(self) -> tuple[object, object]:
        return self._options.network_dim or 4, self._options.network_alpha

    def attach(self) -> None:
        """Nothing is left to do: apply_to, which also names the parameters, has attached it."""

    def set_multiplier(self, multiplier: float) -> None:
        self._made.set_multiplier(multiplier)

    def limit_norms(self, most: float) -> None:
        self._made.apply_max_norm_regularization(most, next(self.module.parameters()).device)

    def untrainable(self) -> list[str]:
        """Those of the first text encoder's last layer, whose output isn't used."""
        if not self._encoders:
            return []
        last = len(clip_body(self._encoders[0]).encoder.layers) - 1
        start = f"lora_te1_text_model_encoder_layers_{last}_"
        return sorted({name.partition(".")[0] for name in self.tensors() if name.startswith(start)})

    def groups(self, unet_lr: float, text_encoder_lrs: tuple[float, float]) -> list[ParamGroup]:
        """The groups that it makes itself, without what can't be trained."""
        if hasattr(self._made, "prepare_optimizer_params_with_multiple_te_lrs"):
            found = self._made.prepare_optimizer_params_with_multiple_te_lrs(list(text_encoder_lrs), unet_lr, unet_lr)
        else:
            found = self._made.prepare_optimizer_params(text_encoder_lrs[0], unet_lr, unet_lr)
        members, names = found if isinstance(found, tuple) else (found, [])
        untrainable = set(self.untrainable())
        name_of = {id(parameter): name for name, parameter in self.tensors().items()}
        groups = []
        for number, member in enumerate(members):
            parameters = {name_of[id(parameter)]: parameter for parameter in member["params"]}
            trained = {name: p for name, p in parameters.items() if name.partition(".")[0] not in untrainable}
            lr = float(member.get("lr", unet_lr))
            if trained and lr:
                groups.append(ParamGroup(names[number] if number < len(names) else f"group{number}", trained, lr))
        return groups

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}


class _Named(nn.Module):
    """An encoder below `text_model`, whatever transformers calls it: files know it by that name."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.text_model = getattr(encoder, "text_model", encoder)


def build(options: NetworkOptions, unet: UNet, encoders: Sequence[nn.Module], compute: torch.dtype) -> ExternalNetwork:
    """Build the network with the weights of --network_weights; networks/kinds.py calls it.

    Args:
        options: the options of the network.
        unet: the U-Net.
        encoders: the text encoders that it covers.
        compute: dtype of the computation.

    Raises:
        OptionError: the module can't build it, or --network_weights don't fit.
        NotImplementedError: it can't be built on the meta device.
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
    """Let the module create the network; --dim_from_weights takes its shapes from `weights`."""
    module = import_network(str(options.network_module))
    named = [_Named(encoder) for encoder in encoders]
    arguments: dict[str, Any] = dict(pair.split("=", 1) for pair in options.network_args or ())
    try:
        if options.dim_from_weights and weights is not None:
            made = module.create_network_from_weights(
                1.0, str(options.network_weights), None, named, unet, dict(weights), **arguments
            )[0]
        else:
            _add_dropout(module, arguments, options.network_dropout)
            if "warn_on_unmatched" in inspect.signature(module.create_network).parameters:
                arguments.setdefault("warn_on_unmatched", False)  # lycoris lists the layers of all other models
            made = module.create_network(
                1.0, options.network_dim, options.network_alpha, None, named, unet, **arguments
            )
        return ExternalNetwork(made, unet, named, compute, options)
    except Exception as error:  # theirs may raise anything for arguments that don't fit
        if "meta" in str(error):  # a run is rehearsed without weights, and their code wants numbers
            raise NotImplementedError from error
        raise OptionError(
            f"--network_module {options.network_module} with --network_args {' '.join(options.network_args or ()) or 'none'}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def import_network(name: str) -> ModuleType:
    """The module of --network_module. Raises OptionError if it can't be imported or makes no networks."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise OptionError(f"--network_module {name}: can't be imported ({error})") from None
    if not hasattr(module, "create_network"):
        raise OptionError(f"--network_module {name}: it has no create_network, by which networks are made")
    return module


def _add_dropout(module: ModuleType, arguments: dict[str, Any], dropout: float | None) -> None:
    """--network_dropout by the name under which their function takes it."""
    if dropout is None:
        return
    if "neuron_dropout" in inspect.signature(module.create_network).parameters:
        arguments["neuron_dropout"] = dropout
    else:
        arguments.setdefault("dropout", dropout)


def _forwards(modules: Sequence[nn.Module]) -> dict[nn.Module, Any]:
    """What each layer's own `forward` attribute is; the class's where it has none."""
    return {layer: layer.__dict__.get("forward") for module in modules for layer in module.modules()}


def _in_autocast(forward: Any, dtype: torch.dtype) -> Any:
    """Their arithmetic mixes float32 weights with the layer's, which works under autocast alone."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            result: Tensor = forward(x, *args, **kwargs)
        return result

    return run
