"""Optimizer state."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.errors import RunError
from library.log import log

_BLOCK = 256  # numbers that share a scale in bitsandbytes


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """An optimizer's groups and its state by parameter name. Args: names: by id of the parameter."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = {}
    for parameter, values in optimizer.state.items():
        if isinstance(parameter, Tensor):  # some keep entries of their own there
            state[names[id(parameter)]] = {
                key: {"value": value, "beside": isinstance(value, Tensor) and value.device == parameter.device}
                for key, value in values.items()
            }
    return {"kind": _kind(optimizer), "groups": groups, "state": state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Mapping[int, str], *, same_options: bool = True
) -> None:
    """Give an optimizer its state back, bit by bit: torch's own load_state_dict casts to the parameters' dtype.

    With other options than the state's, what they decide stays as they say. Raises RunError if the state doesn't fit.
    """
    if saved["kind"] != _kind(optimizer):
        log.warning("the state's optimizer is %s; %s starts anew", saved["kind"], _kind(optimizer))
        return
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise RunError(
            f"the state has {len(saved['groups'])} groups of learning rates, this run has {len(optimizer.param_groups)}; "
            "give the learning rates and network options that it was saved with"
        )
    decided = set() if same_options else {*inspect.signature(type(optimizer).__init__).parameters, "initial_lr"}
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: value for key, value in values.items() if key not in decided | {"params"}})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = saved["state"].get(names[id(parameter)])
            if values is not None:
                for key, entry in values.items():
                    _check_fits(optimizer, names[id(parameter)], parameter, key, entry["value"])
                optimizer.state[parameter] = {
                    key: _placed(entry, parameter, optimizer) for key, entry in values.items()
                }


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"


def _check_fits(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, key: str, value: object) -> None:
    """Raises RunError for tensors that would lead the kernels of torch and bitsandbytes, which don't look, astray."""
    if not isinstance(value, Tensor) or not _kind(optimizer).startswith(("torch.optim.", "bitsandbytes.")):
        return
    shape = tuple(value.shape)
    if key.startswith(("exp_avg", "max_exp_avg", "momentum_buffer", "sum", "state")):
        fits = shape[value.ndim - parameter.ndim :] == tuple(parameter.shape)  # AdEMAMix has two in one
    elif key.startswith("absmax"):
        fits = value.ndim > 0 and shape[-1] == -(-parameter.numel() // _BLOCK)
    elif key.startswith("qmap"):
        fits = shape == (256,)
    else:
        fits = True
    if not fits:
        raise RunError(f"the state's {key} of {name} is {list(shape)}, which doesn't fit {list(parameter.shape)}")


def _placed(entry: Mapping[str, Any], parameter: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    value = entry["value"]
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        if entry["beside"]:  # laid out as the parameter is: some kernels go by that
            return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        if getattr(optimizer, "is_paged", False):  # bitsandbytes: memory of its own, which the card reads from RAM
            return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
    return value.to(parameter.device) if entry["beside"] else value
