"""Optimizer state: taken from an optimizer and given back, by parameter name and bit by bit."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.errors import RunError
from library.log import log

_BLOCK = 256  # values that share a scale in bitsandbytes


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return an optimizer's groups, and its state by parameter name.

    Args:
        optimizer: whose state it is.
        names: of the parameters, by their id.
    """
    groups = []
    for param_group in optimizer.param_groups:
        groups.append({key: value for key, value in param_group.items() if key != "params"})
    state = {}
    for parameter, values in optimizer.state.items():
        if not isinstance(parameter, Tensor):  # some keep other entries there
            continue
        entries = {}
        for key, value in values.items():
            is_on_its_device = isinstance(value, Tensor) and value.device == parameter.device
            entries[key] = {"value": value, _ON_ITS_DEVICE: is_on_its_device}
        state[names[id(parameter)]] = entries
    return {"kind": _class_name(optimizer), "groups": groups, "state": state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    names: Mapping[int, str],
    *,
    same_options: bool = True,
) -> None:
    """Restore an optimizer's state, bit by bit: load_state_dict would cast it.

    Args:
        optimizer: whose state it is.
        saved: what optimizer_state() returned.
        names: of the parameters, by their id.
        same_options: whether the options are those of the state; if not, what they decide is as
            they say.

    Raises:
        RunError: the state doesn't fit.
    """
    if saved["kind"] != _class_name(optimizer):
        log.warning(
            "the state was saved with %s; the optimizer state is reset for %s",
            saved["kind"],
            _class_name(optimizer),
        )
        return
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise RunError(
            f"the state has {len(saved['groups'])} groups of learning rates, this run has "
            f"{len(optimizer.param_groups)}; "
            "give the learning rates and network options that it was saved with"
        )
    ignored = {"params"}
    if not same_options:
        ignored |= {*inspect.signature(type(optimizer).__init__).parameters, "initial_lr"}
    for param_group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        param_group.update({key: value for key, value in values.items() if key not in ignored})
    for param_group in optimizer.param_groups:
        for parameter in param_group["params"]:
            name = names[id(parameter)]
            entries = saved["state"].get(name)
            if entries is None:
                continue
            for key, entry in entries.items():
                _check_fits(optimizer, name, parameter, key, entry["value"])
            optimizer.state[parameter] = {
                key: _restored(entry, parameter, optimizer) for key, entry in entries.items()
            }


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"


# Keys of the state of torch's and bitsandbytes' optimizers; 8-bit ones number state, absmax and
# qmap.
_LIKE_THE_PARAMETER = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "sum",
    "state1",
    "state2",
}
_SCALES = {"absmax1", "absmax2"}
_CODEBOOKS = {"qmap1", "qmap2"}


def _check_fits(
    optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, key: str, value: object
) -> None:
    """Raise RunError for wrong shapes, which the kernels of torch and bitsandbytes don't check."""
    package = type(optimizer).__module__.partition(".")[0]
    if not isinstance(value, Tensor) or package not in ("torch", "bitsandbytes"):
        return
    shape = tuple(value.shape)
    if key in _LIKE_THE_PARAMETER:
        fits = shape[value.ndim - parameter.ndim :] == tuple(
            parameter.shape
        )  # AdEMAMix has two in one
    elif key in _SCALES:
        fits = value.ndim > 0 and shape[-1] == -(-parameter.numel() // _BLOCK)
    elif key in _CODEBOOKS:
        fits = shape == (256,)
    else:
        fits = True
    if not fits:
        raise RunError(
            f"the state's {key} of {name} is {list(shape)}, which doesn't fit "
            f"{list(parameter.shape)}"
        )


def _restored(entry: Mapping[str, Any], parameter: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """Return a saved value on the device, and with the memory layout, that it had."""
    value, is_on_its_device = entry["value"], entry[_ON_ITS_DEVICE]
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        if is_on_its_device:  # some kernels rely on the parameter's memory layout
            return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        if getattr(
            optimizer, "is_paged", False
        ):  # bitsandbytes: managed memory, which the GPU reads from RAM
            return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
    return value.to(parameter.device) if is_on_its_device else value


_ON_ITS_DEVICE = "beside"  # key of saved states: whether a tensor was on its parameter's device
