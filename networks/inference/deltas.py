"""Weight deltas: how the tensors of a network module change the weight of its layer.

Modules are LoRA, LoHa or LoKr, each with or without DoRA. A delta is [out, in] or
[out, in, kh, kw], in float32.

Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Hyeon-Woo et al. 2021, arXiv:2108.06098 (LoHa);
Yeh et al. 2023, arXiv:2309.14859 (LoKr, LyCORIS); Liu et al. 2024, arXiv:2402.09353 (DoRA).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

ModuleTensors = Mapping[str, Tensor]
"""The tensors of one network module by their names within it, such as "lora_down.weight"."""

_LORA = {"lora_down.weight", "lora_up.weight"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR = {
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
}
_KINDS = (_LORA | {"lora_mid.weight"}, _LOHA | {"hada_t1", "hada_t2"}, _LOKR)
_COMMON = {"alpha", "dora_scale", "scalar"}  # tensors that modules of each kind may have

# The first dimension of the first of these is the rank; with a Tucker core, it is the core's.
_RANKED = ("lora_down.weight", "hada_t1", "hada_w1_b", "lokr_t2", "lokr_w1_b", "lokr_w2_b")


def unknown_tensors(tensors: ModuleTensors) -> set[str]:
    """Return the names that aren't understood; all if the kind is unknown or incomplete."""
    names = tensors.keys() - _COMMON
    for kind in _KINDS:
        if names and names <= kind:
            return set() if _is_complete(names) else set(tensors)
    return names or set(tensors)


def _is_complete(names: set[str]) -> bool:
    if names & _LOKR:
        for factor in ("lokr_w1", "lokr_w2"):
            if factor not in names and not {f"{factor}_a", f"{factor}_b"} <= names:
                return False
        return True
    return names >= _LORA or names >= _LOHA


def is_low_rank(tensors: ModuleTensors) -> bool:
    """Whether a module has only a down and an up projection, so that no delta need be computed."""
    others = {"lora_mid.weight", "dora_scale", "scalar"}
    return tensors.keys() >= _LORA and not others & tensors.keys()


def scale_of(tensors: ModuleTensors) -> float:
    """Return alpha / rank times `scalar`; alpha / rank is 1 if either is missing."""
    rank = next((len(tensors[name]) for name in _RANKED if name in tensors), None)
    alpha = tensors.get("alpha")
    scale = 1.0
    if rank is not None and alpha is not None:
        scale = float(alpha) / rank
    if "scalar" in tensors:
        scale *= float(tensors["scalar"])
    return scale


def unscaled_delta(tensors: ModuleTensors) -> Tensor:
    """Return the delta without alpha and DoRA: [out, in, …], or [out, in * kh * kw].

    It is computed on the tensors' device.
    """
    values = {name: tensor.float() for name, tensor in tensors.items()}
    if "hada_w1_a" in values:
        return _product(values, "hada_w1", "hada_t1") * _product(values, "hada_w2", "hada_t2")
    if values.keys() >= _LORA:
        up, down = values["lora_up.weight"].flatten(1), values["lora_down.weight"].flatten(1)
        mid = values.get("lora_mid.weight")
        if mid is None:
            return up @ down
        return torch.einsum("or,rs...,si->oi...", up, mid, down)
    first = _kronecker_factor(values, "lokr_w1", core=None)
    second = _kronecker_factor(values, "lokr_w2", core="lokr_t2")
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def _kronecker_factor(values: Mapping[str, Tensor], name: str, core: str | None) -> Tensor:
    """Return a factor of LoKr, which is stored as it is or as a product."""
    return values[name] if name in values else _product(values, name, core)


def _product(values: Mapping[str, Tensor], name: str, core: str | None) -> Tensor:
    """Return a @ b, or the convolution of a Tucker decomposition, with a core between a and b."""
    a, b = values[f"{name}_a"], values[f"{name}_b"]
    if core is not None and core in values:
        return torch.einsum("ij...,ip,jr->pr...", values[core], a, b)
    return a @ b.flatten(1)


def weight_delta(tensors: ModuleTensors, weight: Tensor) -> Tensor:
    """Return what a module at strength 1 adds to a weight, in its shape and on its device."""
    on_device = {name: tensor.to(weight.device) for name, tensor in tensors.items()}
    delta = scale_of(tensors) * unscaled_delta(on_device).reshape(weight.shape)
    magnitude = on_device.get("dora_scale")
    if magnitude is None:
        return delta
    return _with_magnitude(weight.float(), delta, magnitude.float()) - weight.float()


def _with_magnitude(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: return the changed weight with the learned magnitude.

    There is a magnitude per output channel, or, in older files, per input channel.
    """
    changed = weight + delta
    is_per_input = (
        magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]
    )
    channel_dim = 1 if is_per_input else 0
    dims = [dim for dim in range(weight.ndim) if dim != channel_dim]
    norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True)
    norm = norm + torch.finfo(torch.float32).eps
    shape = [1] * weight.ndim
    shape[channel_dim] = -1
    return changed * (magnitude.reshape(shape) / norm)
