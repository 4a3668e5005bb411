"""Compiling: the U-Net's residual and transformer blocks through torch.compile (--torch_compile, and --compile where pictures are drawn).

Blocks of one kind share their graphs, and sizes become variables with the second bucket, so a run has about 16 graphs however many
buckets it has; dynamo's own limit of 8 recompilations would end that with a warning.
"""

import torch
from torch import nn

from library.errors import first_line
from library.log import log
from library.models.unet_blocks import BasicTransformerBlock, ResnetBlock2D

_GRAPHS = 256  # of one function; more means that something else than shapes changes


def compile_blocks(unet: nn.Module, backend: str, device: torch.device, *, flag: str = "--torch_compile") -> bool:
    """Compile each block when it is first called. Returns False, with the reason told, where the backend doesn't work.

    Args: flag: the option that asks for it, as messages call it.
    """
    if (reason := _why_not(backend, device)) is not None:
        log.warning("%s: %s doesn't work here: %s. The run goes on uncompiled", flag, backend, reason)
        return False
    import torch._dynamo

    torch._dynamo.config.recompile_limit = _GRAPHS
    torch._dynamo.config.suppress_errors = True  # a block that can't be compiled runs as it is; PyTorch tells why
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile(backend=backend)
    return True


def _why_not(backend: str, device: torch.device) -> str | None:
    """What a function of one line fails with; None if it works."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(3, device=device))
    except Exception as error:  # no compiler, no Triton, an unknown backend: each fails in its own way
        return first_line(error)
    return None
