"""Attention: one function for the whole U-Net, its backend chosen once, here.

Shapes: B batch, N queries, M keys, H heads, D channels per head (64 in every SDXL).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from library.log import log

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, H, N, D], k [B, H, M, D], v [B, H, M, D]) -> [B, H, N, D], all of one dtype."""

QUERIES_AT_ONCE = 1024


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention: flash or memory-efficient kernels where the card has them."""
    return F.scaled_dot_product_attention(q, k, v)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """So many queries at once: even a kernel that builds the whole N x M matrix stays small (--mem_eff_attn)."""
    return torch.cat([sdpa(part, k, v) for part in q.split(QUERIES_AT_ONCE, dim=2)], dim=2)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' memory-efficient attention, which wants [B, N, H, D]."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def choose_attention(*, mem_eff_attn: bool, use_xformers: bool) -> AttentionFunction:
    """The backend that the options ask for; SDPA, with one line, if xformers isn't installed. Precedence as in sd-scripts."""
    if mem_eff_attn:
        return chunked
    if use_xformers:
        try:
            import xformers.ops  # noqa: F401
        except Exception as error:  # one made for another torch fails in many ways
            why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"can't be used ({error})"
            log.warning(
                "--xformers: xformers %s; PyTorch's own attention (--sdpa) is used, which is as lean and fast", why
            )
        else:
            return _xformers
    return sdpa
