"""The processes of a run, joined by accelerate.

Its settings for dtypes and compilers are not used.
"""

import datetime
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
)

from library.errors import OptionError
from library.log import log
from library.training.options.distributed import ACCELERATE_VARS

_LAUNCHES = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")


def start_processes(
    *, timeout: int | None = None, gradient_as_bucket_view: bool = False, static_graph: bool = False
) -> Accelerator:
    """Join the processes of the run. Raises OptionError for a launch that can't work.

    Where the U-Net is to be sharded, sharding.py does it, not accelerate.

    Args:
        timeout: minutes after which a process that waits for another one gives up.
        gradient_as_bucket_view: DDP's option.
        static_graph: DDP's option.
    """
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=gradient_as_bucket_view, static_graph=static_graph
        )
    ]
    if timeout:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout)))
    with _without_variables(ACCELERATE_VARS):
        return _accelerator(handlers)


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    """Context manager: the environment does not have these variables."""
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


def _accelerator(handlers: list[KwargsHandler]) -> Accelerator:
    # `accelerate config` may have set a compiler or a dtype for other programs.
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=handlers)
    if accelerator.distributed_type.value not in _LAUNCHES:
        raise OptionError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}, which is not "
            "supported; "
            "launch with: accelerate launch --num_processes 1, or --multi_gpu, or --config_file "
            "configs/accelerate/fsdp2.yaml"
        )
    return accelerator


def shared_seed(seed: int | None) -> int:
    """Return the seed of a run: the one given, or a random one that all processes share."""
    if seed is not None:
        return seed
    seeds = [random.SystemRandom().randrange(2**32)]
    broadcast_object_list(seeds)
    log.info("--seed is not set; this run uses seed %d", seeds[0])
    return seeds[0]
