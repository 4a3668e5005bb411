"""Kinds: what the tensors of one module of a network file say about its layer's weight. LoRA, LoHa or LoKr, each with DoRA or without.

Parts are a module's tensors by their names within it. The change is [out, in], or [out, in, kh, kw]; float32.
Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); Hyeon-Woo et al. 2021, arXiv:2108.06098 (LoHa); Yeh et al. 2023, arXiv:2309.14859
(LoKr, LyCORIS); Liu et al. 2024, arXiv:2402.09353 (DoRA).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]

_LORA = {"lora_down.weight", "lora_up.weight"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_WITH_ANY = {"alpha", "dora_scale", "scalar"}
_BY_KIND = (
    _LORA | {"lora_mid.weight"},
    _LOHA | {"hada_t1", "hada_t2"},
    {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)


def unread_parts(parts: Parts) -> set[str]:
    """What of a module isn't understood; all of it if it is of no known kind, or incomplete."""
    own = parts.keys() - _WITH_ANY
    for kind in _BY_KIND:
        if own and own <= kind:
            return set() if _is_complete(own) else set(parts)
    return own or set(parts)


def _is_complete(own: set[str]) -> bool:
    if any(name.startswith("lokr") for name in own):
        return all(f"lokr_w{i}" in own or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= own for i in (1, 2))
    return own >= _LORA or own >= _LOHA


def is_low_rank(parts: Parts) -> bool:
    """Whether it is a down and an up projection and no more, which can be applied without the change as a whole."""
    return parts.keys() >= _LORA and not {"lora_mid.weight", "dora_scale", "scalar"} & parts.keys()


def scale_of(parts: Parts) -> float:
    """alpha / rank; 1 where nothing is factored, or alpha is missing. `scalar` is a factor beside it."""
    rank = next((len(parts[name]) for name in _RANKED if name in parts), None)
    alpha = parts.get("alpha")
    scale = 1.0 if rank is None or alpha is None else float(alpha) / rank
    return scale * float(parts["scalar"]) if "scalar" in parts else scale


# Whose first dimension is the rank; of those with a Tucker core, the core's.
_RANKED = ("lora_down.weight", "hada_t1", "hada_w1_b", "lokr_t2", "lokr_w1_b", "lokr_w2_b")


def unscaled_change(parts: Parts) -> Tensor:
    """The change without alpha and DoRA: [out, in, …], or [out, in * kh * kw]; on the parts' device."""
    own = {name: tensor.float() for name, tensor in parts.items()}
    if "hada_w1_a" in own:
        return _product(own, "hada_w1", "hada_t1") * _product(own, "hada_w2", "hada_t2")
    if own.keys() >= _LORA:
        up, down = own["lora_up.weight"].flatten(1), own["lora_down.weight"].flatten(1)
        mid = own.get("lora_mid.weight")
        return up @ down if mid is None else torch.einsum("or,rs...,si->oi...", up, mid, down)
    one = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    two = own["lokr_w2"] if "lokr_w2" in own else _product(own, "lokr_w2", "lokr_t2")
    return torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - 2)), two)


def _product(own: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """a @ b; or, of a convolution taken apart by Tucker's rule, its core between both."""
    a, b = own[f"{name}_a"], own[f"{name}_b"]
    if core in own:
        return torch.einsum("ij...,ip,jr->pr...", own[core], a, b)
    return a @ b.flatten(1)


def change_of(parts: Parts, weight: Tensor) -> Tensor:
    """What a module at strength 1 adds to the layer's weight, in the weight's shape and on its device; float32."""
    on_device = {name: tensor.to(weight.device) for name, tensor in parts.items()}
    change = scale_of(parts) * unscaled_change(on_device).reshape(weight.shape)
    magnitude = on_device.get("dora_scale")
    if magnitude is None:
        return change
    return redirected(weight.float(), change, magnitude.float()) - weight.float()


def redirected(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the changed weight's direction with the magnitude that was learned, for each output (or, in older files, input)."""
    changed = weight + change
    by_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]
    kept = 1 if by_input else 0
    dims = [dim for dim in range(weight.ndim) if dim != kept]
    norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True) + torch.finfo(torch.float32).eps
    shape = [1] * weight.ndim
    shape[kept] = -1
    return changed * (magnitude.reshape(shape) / norm)
