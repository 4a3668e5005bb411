"""Processes: how accelerate joins those of one run. Dtypes and compiling are not its business here."""

import datetime

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from library.errors import OptionError

_LAUNCHES = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")


def start_processes(
    *, timeout: int | None = None, gradient_as_bucket_view: bool = False, static_graph: bool = False
) -> Accelerator:
    """This process among those of the run. Raises OptionError for launches that can't work.

    Args:
        timeout: minutes after which a process that waits for another gives up.
    """
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=gradient_as_bucket_view, static_graph=static_graph)
    ]
    if timeout:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout)))
    # `accelerate config` may have chosen a compiler or a dtype for other programs, which would change what runs here.
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=handlers)
    if accelerator.distributed_type.value not in _LAUNCHES:
        raise OptionError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}, which can't be used yet in this "
            "version; launch with: accelerate launch --num_processes 1, or --multi_gpu"
        )
    return accelerator
