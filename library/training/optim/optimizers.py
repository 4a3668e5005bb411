"""Optimizers: made by name, from the package that has them, with the user's arguments.

What is known about each is in library/training/options/optimizer_table.py. Packages are imported
only when asked for.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from library.errors import Mistake, OptionError
from library.imports import import_transformers
from library.log import log
from library.option_types import did_you_mean
from library.param_group import ParamGroup
from library.training.options.optimizer_table import OPTIMIZERS, optimizer_spec

_LOW_FACTOR = 0.1


def find_optimizer(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class of that name, and the arguments that the name implies.

    Raises:
        OptionError: the class can't be imported.
    """
    spec = optimizer_spec(name)
    try:
        if spec.package == "transformers":
            import_transformers()
        return getattr(importlib.import_module(spec.module), spec.class_name), dict(spec.defaults)
    except ImportError as error:
        raise OptionError(
            Mistake(
                f"--optimizer_type {name}: {spec.package} can't be imported ({error}); pip install "
                f"{spec.package}",
                ("optimizer_type",),
            )
        ) from None
    except AttributeError:
        hint = did_you_mean(spec.class_name, [known.class_name for known in OPTIMIZERS.values()])
        raise OptionError(
            Mistake(
                f"--optimizer_type {name}: {spec.module} has no {spec.class_name}{hint}",
                ("optimizer_type",),
            )
        ) from None


def make_optimizer(
    name: str, arguments: Mapping[str, Any], groups: Sequence[ParamGroup], lr: float
) -> torch.optim.Optimizer:
    """Make the optimizer over the groups.

    Raises:
        OptionError: the optimizer can't be imported, or doesn't take the arguments.
    """
    cls, implied = find_optimizer(name)
    _check_arguments(name, cls, arguments)
    spec = optimizer_spec(name)
    if spec.finds_lr:
        _check_same_rate(name, groups)
    keywords = {**implied, **arguments}
    param_groups: list[dict[str, Any]] = [
        {"params": list(group.parameters.values())} for group in groups
    ]
    if spec.finds_relative_step(arguments):
        keywords |= {"relative_step": True, "lr": None}
    else:
        keywords["lr"] = lr
        for param_group, group in zip(param_groups, groups, strict=True):
            param_group["lr"] = group.lr
    if cls in (torch.optim.AdamW, torch.optim.Adam) and not {"fused", "foreach"} & keywords.keys():
        keywords["fused"] = True
    try:
        return cls(param_groups, **keywords)
    except (TypeError, ValueError, AssertionError) as error:
        given = " ".join(f"{key}={value}" for key, value in arguments.items()) or "its defaults"
        raise OptionError(
            f"--optimizer_args: {cls.__name__} doesn't take {given}: {error}"
        ) from None


def _check_arguments(name: str, cls: Any, arguments: Mapping[str, Any]) -> None:
    """Raise OptionError if it isn't an Optimizer, or doesn't accept these arguments."""
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise OptionError(f"--optimizer_type {name}: it is not an optimizer")
    parameters = inspect.signature(cls.__init__).parameters
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    accepted = [key for key in parameters if key not in ("self", "params", "lr", "args", "kwargs")]
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        keys = "; ".join(f"{key!r}{did_you_mean(key, accepted)}" for key in unknown)
        raise OptionError(
            f"--optimizer_args: {cls.__name__} has no {keys}. It takes {', '.join(accepted)}"
        )


def _check_same_rate(name: str, groups: Sequence[ParamGroup]) -> None:
    """Check that there is one learning rate, a factor of the one that the optimizer finds."""
    rates = {group.lr for group in groups}
    if len(rates) > 1:
        by_group = ", ".join(f"{group.name} {group.lr:g}" for group in groups)
        raise OptionError(
            f"--optimizer_type {name} takes one learning rate for everything, usually 1; got "
            f"{by_group}"
        )
    if max(rates) <= _LOW_FACTOR:
        log.warning(
            "--optimizer_type %s finds the learning rate itself and takes --learning_rate as a "
            "factor, usually 1; it is %g",
            name,
            max(rates),
        )


def format_optimizer(optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> str:
    """Return `module.Class(key=value,…)`, the form of the metadata."""
    cls = type(optimizer)
    text = f"{cls.__module__}.{cls.__name__}"
    if arguments:
        text += f"({','.join(f'{key}={value}' for key, value in arguments.items())})"
    return text


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer trains other weights than it evaluates, with a mode for each."""
    return callable(getattr(optimizer, "train", None)) and callable(
        getattr(optimizer, "eval", None)
    )


def start_training(optimizer: torch.optim.Optimizer) -> None:
    """Put a schedule-free optimizer into the mode in which it trains."""
    if is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def takes_scaled_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the step divides by `grad_scale` and heeds `found_inf`, both on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def current_rate(optimizer: torch.optim.Optimizer, param_group: Mapping[str, Any]) -> float:
    """Return a group's learning rate.

    Where Adafactor finds its own, it is that of the first tensor's last step; before its first
    step, the lowest that it can have: that of small weights.
    """
    get_lr = getattr(optimizer, "_get_lr", None)
    if (
        param_group.get("relative_step") and get_lr is not None
    ):  # it ignores what a schedule writes into "lr"
        state = optimizer.state.get(param_group["params"][0]) or {"step": 1, "RMS": 0.0}
        return float(get_lr(param_group, state))
    return float(param_group["lr"])
