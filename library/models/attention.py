"""Attention: one function for the U-Net, whose backend is chosen once, here.

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
    """Compute attention with PyTorch's flash or memory-efficient kernels, where the GPU has them."""
    return F.scaled_dot_product_attention(q, k, v)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention for 1024 queries at a time, so that even a kernel that builds the N x M matrix stays small.

    For --mem_eff_attn.
    """
    chunks = [sdpa(chunk, k, v) for chunk in q.split(QUERIES_AT_ONCE, dim=2)]
    return torch.cat(chunks, dim=2)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with xformers, which expects [B, N, H, D]."""
    from xformers.ops import memory_efficient_attention

    attended = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attended.transpose(1, 2)


def choose_attention(*, mem_eff_attn: bool, use_xformers: bool) -> AttentionFunction:
    """Return the attention function for the options; SDPA, with a warning, if xformers doesn't work. Precedence as in sd-scripts."""
    if mem_eff_attn:
        return chunked
    if use_xformers:
        try:
            import xformers.ops  # noqa: F401
        except Exception as error:  # a build for another version of torch fails in many ways
            reason = (
                "is not installed"
                if isinstance(error, ModuleNotFoundError)
                else f"can't be imported ({error})"
            )
            log.warning(
                "--xformers: xformers %s. PyTorch's attention (--sdpa) is used, with the same speed and memory",
                reason,
            )
        else:
            return _xformers
    return sdpa
