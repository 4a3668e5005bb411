"""Processes: how accelerate joins those of one run. Dtypes and compiling are not its business here."""

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
    """This process among those of the run. Raises OptionError for launches that can't work.

    Where weights are to lie in parts, they are cut by sharding.py, whatever accelerate would do.

    Args:
        timeout: minutes after which a process that waits for another gives up.
    """
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=gradient_as_bucket_view, static_graph=static_graph)
    ]
    if timeout:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=timeout)))
    with _not_told(ACCELERATE_VARS):
        return _accelerator(handlers)


@contextmanager
def _not_told(names: Sequence[str]) -> Iterator[None]:
    """Without these variables of the environment meanwhile."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _accelerator(handlers: list[KwargsHandler]) -> Accelerator:
    # `accelerate config` may have chosen a compiler or a dtype for other programs, which would change what runs here.
    accelerator = Accelerator(mixed_precision="no", dynamo_backend="no", kwargs_handlers=handlers)
    if accelerator.distributed_type.value not in _LAUNCHES:
        raise OptionError(
            f"accelerate's configuration asks for {accelerator.distributed_type.value}, which can't be used "
            "here; launch with: accelerate launch --num_processes 1, or --multi_gpu, or --config_file configs/accelerate/fsdp2.yaml"
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
