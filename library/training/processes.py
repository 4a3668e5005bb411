"""Processes: how accelerate joins those of one run. Dtypes and compiling are not its business here."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler

from library.errors import OptionError

_FSDP = "ACCELERATE_USE_FSDP"
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
    # The U-Net is sharded here, by its blocks (sharding.py); on a CPU accelerate would make it DDP without a word.
    with _not_told(_FSDP):
        accelerator = _accelerator(handlers)
    if is_sharded_launch() and accelerator.num_processes == 1:
        raise OptionError(
            "FSDP is for several processes; launch with accelerate's --num_processes, or without its FSDP"
        )
    return accelerator


def is_sharded_launch() -> bool:
    """Whether accelerate's configuration asks for FSDP2. Raises OptionError for what it can ask for beside that and isn't there."""
    if os.environ.get(_FSDP, "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise OptionError(
            "accelerate's configuration asks for FSDP 1; take fsdp_version: 2 (configs/accelerate/fsdp2.yaml)"
        )
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise OptionError(
            "accelerate's configuration asks for fsdp_offload_params, which can't be used here; set it to false"
        )
    return True


@contextmanager
def _not_told(name: str) -> Iterator[None]:
    """Without that variable of the environment meanwhile."""
    kept = os.environ.pop(name, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[name] = kept


def _accelerator(handlers: list[KwargsHandler]) -> Accelerator:
    # `accelerate config` may have chosen a compiler or a dtype for other programs, which would change what runs here.
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=handlers)
    if accelerator.distributed_type.value not in _LAUNCHES:
        raise OptionError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}, which can't be used yet in this "
            "version; launch with: accelerate launch --num_processes 1, or --multi_gpu, or --config_file configs/accelerate/fsdp2.yaml"
        )
    return accelerator
