"""torch.compile for the U-Net's residual and transformer blocks (--torch_compile, and --compile for image generation).

Blocks of one kind share their graphs, and sizes become symbolic with the second bucket, so a run has about 16 graphs with any
number of buckets. Dynamo's default limit of 8 recompilations is too low for that.
"""

import torch
from torch import nn

from library.errors import first_line
from library.log import log
from library.models.unet_blocks import BasicTransformerBlock, ResnetBlock2D

_GRAPHS = 256  # of one function; more would mean that something other than shapes changes


def compile_blocks(
    unet: nn.Module, backend: str, device: torch.device, *, flag: str = "--torch_compile"
) -> bool:
    """Make each block compile when it is first called.

    Args:
        backend: dynamo's backend, "inductor" for example.
        flag: the option that asks for it, for messages.

    Returns:
        False, after a warning with the reason, if the backend doesn't work.
    """
    if (reason := _problem_of(backend, device)) is not None:
        log.warning(
            "%s: the backend %s doesn't work on this machine: %s. The run continues without compilation",
            flag,
            backend,
            reason,
        )
        return False
    import torch._dynamo

    torch._dynamo.config.recompile_limit = _GRAPHS
    torch._dynamo.config.suppress_errors = (
        True  # a block that can't be compiled runs uncompiled; PyTorch logs the reason
    )
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            module.compile(backend=backend)
    return True


def _problem_of(backend: str, device: torch.device) -> str | None:
    """Return the error that compiling a one-line function gives; None if it works."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(3, device=device))
    except (
        Exception
    ) as error:  # no compiler, no Triton, an unknown backend: each fails in its own way
        return first_line(error)
    return None
