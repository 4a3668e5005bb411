"""Optimizers: by name, from the package that has them, with the user's arguments.

Names are sd-scripts' (contract: training_math.md section 5), case-insensitive. Any other name is a class of torch.optim or,
with dots, of any package. Packages are imported only when asked for.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from library.errors import Mistake, OptionError
from library.imports import import_transformers
from library.log import log
from library.option_types import did_you_mean
from library.param_group import ParamGroup
from library.training.options.optimizer import is_adafactor_with_relative_step


class _Known(NamedTuple):
    module: str
    name: str
    package: str
    defaults: Mapping[str, Any] = {}


_KNOWN = {
    "adamw": _Known("torch.optim", "AdamW", "torch"),
    "adamw8bit": _Known("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "pagedadamw": _Known("bitsandbytes.optim", "PagedAdamW", "bitsandbytes"),
    "pagedadamw8bit": _Known("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes"),
    "pagedadamw32bit": _Known("bitsandbytes.optim", "PagedAdamW32bit", "bitsandbytes"),
    "lion8bit": _Known("bitsandbytes.optim", "Lion8bit", "bitsandbytes"),
    "pagedlion8bit": _Known("bitsandbytes.optim", "PagedLion8bit", "bitsandbytes"),
    "sgdnesterov8bit": _Known("bitsandbytes.optim", "SGD8bit", "bitsandbytes", {"momentum": 0.9, "nesterov": True}),
    "sgdnesterov": _Known("torch.optim", "SGD", "torch", {"momentum": 0.9, "nesterov": True}),
    "lion": _Known("lion_pytorch", "Lion", "lion-pytorch"),
    "prodigy": _Known("prodigyopt", "Prodigy", "prodigyopt"),
    "adafactor": _Known("transformers.optimization", "Adafactor", "transformers"),
    "dadaptation": _Known("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation"),
    "dadaptadampreprint": _Known("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation"),
    "dadaptadagrad": _Known("dadaptation", "DAdaptAdaGrad", "dadaptation"),
    "dadaptadam": _Known("dadaptation", "DAdaptAdam", "dadaptation"),
    "dadaptadan": _Known("dadaptation", "DAdaptAdan", "dadaptation"),
    "dadaptadanip": _Known("dadaptation.experimental", "DAdaptAdanIP", "dadaptation"),
    "dadaptlion": _Known("dadaptation", "DAdaptLion", "dadaptation"),
    "dadaptsgd": _Known("dadaptation", "DAdaptSGD", "dadaptation"),
    "adamwschedulefree": _Known("schedulefree", "AdamWScheduleFree", "schedulefree"),
    "radamschedulefree": _Known("schedulefree", "RAdamScheduleFree", "schedulefree"),
    "sgdschedulefree": _Known("schedulefree", "SGDScheduleFree", "schedulefree"),
}

_FIND_THEIR_RATE = ("prodigy", "dadapt")
_LOW_FACTOR = 0.1


def find_optimizer(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class of that name, and arguments that the name implies. Raises OptionError if it can't be imported."""
    known = _KNOWN.get(name.lower())
    if known is None:
        module, _, attribute = name.rpartition(".")
        known = _Known(module or "torch.optim", attribute, module.split(".")[0] or "torch")
    try:
        if known.package == "transformers":
            import_transformers()
        return getattr(importlib.import_module(known.module), known.name), dict(known.defaults)
    except ImportError as error:
        raise OptionError(
            Mistake(
                f"--optimizer_type {name}: {known.package} can't be imported ({error}); pip install {known.package}",
                ("optimizer_type",),
            )
        ) from None
    except AttributeError:
        names = [*(entry.name for entry in _KNOWN.values()), "AdamW", "SGD", "RMSprop", "Adam"]
        raise OptionError(
            Mistake(
                f"--optimizer_type {name}: {known.module} has no {known.name}{did_you_mean(known.name, names)}",
                ("optimizer_type",),
            )
        ) from None


def make_optimizer(
    name: str, arguments: Mapping[str, Any], groups: Sequence[ParamGroup], lr: float
) -> torch.optim.Optimizer:
    """The optimizer over the groups. Raises OptionError if it doesn't take the arguments."""
    kind, implied = find_optimizer(name)
    _check_arguments(name, kind, arguments)
    if name.lower().startswith(_FIND_THEIR_RATE):
        _check_own_rate(name, groups)
    given = {**implied, **arguments}
    if is_adafactor_with_relative_step(name, arguments):
        given |= {"relative_step": True, "lr": None}
        members: list[dict[str, Any]] = [{"params": list(group.parameters.values())} for group in groups]
    else:
        given["lr"] = lr
        members = [{"params": list(group.parameters.values()), "lr": group.lr} for group in groups]
    if kind in (torch.optim.AdamW, torch.optim.Adam) and not {"fused", "foreach"} & given.keys():
        given["fused"] = True
    try:
        return kind(members, **given)
    except (TypeError, ValueError, AssertionError) as error:
        raise OptionError(f"--optimizer_args: {kind.__name__} doesn't take {_in_words(arguments)}: {error}") from None


def _check_arguments(name: str, kind: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what is no optimizer, and arguments that it has no name for."""
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise OptionError(f"--optimizer_type {name}: it is no optimizer")
    parameters = inspect.signature(kind.__init__).parameters
    takes = [key for key in parameters if key not in ("self", "params", "lr", "args", "kwargs")]
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [key for key in arguments if key not in takes]
    if unknown:
        told = "; ".join(f"{key!r}{did_you_mean(key, takes)}" for key in unknown)
        raise OptionError(f"--optimizer_args: {kind.__name__} has no {told}. It takes {', '.join(takes)}")


def _in_words(arguments: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in arguments.items()) or "its defaults"


def _check_own_rate(name: str, groups: Sequence[ParamGroup]) -> None:
    """Optimizers that find their rate take the learning rate as a factor of it, the same for all."""
    rates = {group.lr for group in groups}
    if len(rates) > 1:
        told = ", ".join(f"{group.name} {group.lr:g}" for group in groups)
        raise OptionError(f"--optimizer_type {name} takes one learning rate for everything, usually 1; got {told}")
    if max(rates) <= _LOW_FACTOR:
        log.warning(
            "--optimizer_type %s finds the learning rate itself and takes --learning_rate as a factor, usually 1; it is %g",
            name,
            max(rates),
        )


def optimizer_in_words(optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> str:
    """`module.Class(key=value,…)`, the form of the metadata."""
    kind = type(optimizer)
    told = f"({','.join(f'{key}={value}' for key, value in arguments.items())})" if arguments else ""
    return f"{kind.__module__}.{kind.__name__}{told}"


def start_training(optimizer: torch.optim.Optimizer) -> None:
    """Put schedule-free optimizers into the mode in which they are trained."""
    if callable(switch := getattr(optimizer, "train", None)):
        switch()


def takes_scaled_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step divides gradients by `grad_scale` and skips itself on `found_inf`, both on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def current_rate(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    """A group's learning rate; of Adafactor, where it finds its own, that of the first tensor's last step.

    Before its first step, the lowest that it can have: that of small weights.
    """
    if group.get("relative_step") and hasattr(optimizer, "_get_lr"):  # what a schedule writes into "lr" isn't used
        state = optimizer.state.get(group["params"][0]) or {"step": 1, "RMS": 0.0}
        return float(optimizer._get_lr(group, state))
    return float(group["lr"])
