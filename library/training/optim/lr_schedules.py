"""Learning-rate schedules: functions from the optimizer step to a factor of the learning rates.

Steps are optimizer steps, whatever the number of processes. Names and formulas are those of
transformers' schedulers, which sd-scripts uses (contract: training_math.md section 5), without
importing transformers.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import OptionError
from library.imports import import_transformers
from library.log import log
from library.training.optim.optimizers import is_schedule_free
from library.training.options.optimizer import ScheduleOptions, read_arguments

Factor = Callable[[int], float]

_POLYNOMIAL_END = 1e-7  # learning rate at the end of polynomial
_TIMESCALE = 10_000  # of inverse_sqrt without warm-up


def make_scheduler(
    optimizer: torch.optim.Optimizer, options: ScheduleOptions, total_steps: int, lr: float
) -> LRScheduler | None:
    """Make the scheduler of a run; None where the optimizer needs none (schedule-free ones).

    Args:
        optimizer: whose learning rates change.
        options: which schedule.
        total_steps: optimizer steps of the run.
        lr: the base learning rate.
    """
    arguments, _ = read_arguments("--lr_scheduler_args", options.lr_scheduler_args)
    if is_schedule_free(optimizer):
        _warn_unused(options, "the optimizer needs no schedule")
        return None
    if optimizer.defaults.get("relative_step"):
        if options.lr_scheduler != "adafactor":
            _warn_unused(
                options,
                "Adafactor finds its own rate; relative_step=False in --optimizer_args leaves it "
                "to the schedule",
            )
        return import_transformers().optimization.AdafactorSchedule(optimizer, lr)
    if options.lr_scheduler_type:
        return _by_class(optimizer, options.lr_scheduler_type, arguments)
    return LambdaLR(optimizer, factor(options, total_steps, lr, arguments))


def _warn_unused(options: ScheduleOptions, reason: str) -> None:
    if options.lr_scheduler != "constant" or options.lr_scheduler_type:
        log.warning(
            "--lr_scheduler %s changes nothing: %s",
            options.lr_scheduler_type or options.lr_scheduler,
            reason,
        )


def _by_class(
    optimizer: torch.optim.Optimizer, name: str, arguments: dict[str, Any]
) -> LRScheduler:
    module, _, attribute = name.rpartition(".")
    try:
        scheduler_class = getattr(
            importlib.import_module(module or "torch.optim.lr_scheduler"), attribute
        )
        scheduler = scheduler_class(optimizer, **arguments)
        if "metrics" in inspect.signature(scheduler.step).parameters:
            raise ValueError("it needs a metric at every step, which training doesn't have")
        return scheduler
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise OptionError(
            f"--lr_scheduler_type {name} with --lr_scheduler_args {arguments}: {error}"
        ) from None


def num_steps(steps_or_fraction: int | float, total: int) -> int:
    """Return the steps of an option that may be a fraction of all steps."""
    if isinstance(steps_or_fraction, float):
        return int(steps_or_fraction * total)
    return steps_or_fraction


def factor(options: ScheduleOptions, total: int, lr: float, arguments: dict[str, Any]) -> Factor:
    """Return the schedule as a function of the step, which counts from 0.

    Args:
        options: which schedule.
        total: optimizer steps of the run.
        lr: base learning rate, of which the end of polynomial is a fraction.
        arguments: --lr_scheduler_args, read.
    """
    warmup = num_steps(options.lr_warmup_steps, total)
    after = max(1, total - warmup)
    cycles = options.lr_scheduler_num_cycles
    lowest = options.lr_scheduler_min_lr_ratio or 0.0

    def progress(step: int) -> float:
        return (step - warmup) / after

    def polynomial(step: int) -> float:
        end = _POLYNOMIAL_END / lr if lr else 0.0
        if step > total:
            return end
        return (1 - end) * max(0.0, 1 - progress(step)) ** options.lr_scheduler_power + end

    def inverse_sqrt(step: int) -> float:
        timescale = options.lr_scheduler_timescale or warmup or _TIMESCALE
        return 1 / math.sqrt((step + timescale - warmup) / timescale)

    def warmup_stable_decay(step: int) -> float:
        decay = num_steps(options.lr_decay_steps, total)
        stable_end = total - decay
        if step < warmup:
            return _between(lowest, step / max(1, warmup))
        if step < stable_end:
            return 1.0
        if step < total:
            return _between(lowest, _half_waves(cycles / 2, (step - stable_end) / max(1, decay)))
        return lowest

    def cosine_with_restarts(step: int) -> float:
        return _half_waves(0.5, cycles * progress(step) % 1) if progress(step) < 1 else 0.0

    if options.lr_scheduler == "warmup_stable_decay":
        return warmup_stable_decay
    if options.lr_scheduler == "piecewise_constant":
        return _piecewise_constant(str(arguments["step_rules"]))
    schedules: dict[str, Factor] = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: max(0.0, 1 - progress(step)),
        "cosine": lambda step: _half_waves(0.5, progress(step)),
        "cosine_with_restarts": cosine_with_restarts,
        "cosine_with_min_lr": lambda step: max(
            0.0, _between(lowest, _half_waves(cycles / 2, progress(step)))
        ),
        "polynomial": polynomial,
        "inverse_sqrt": inverse_sqrt,
    }
    main = schedules[options.lr_scheduler]
    return lambda step: step / max(1, warmup) if step < warmup else main(step)


def _half_waves(cycles: float, progress: float) -> float:
    """Return a cosine that falls from 1 to 0 in half a cycle, and rises again in the other half."""
    return max(0.0, 0.5 * (1 + math.cos(math.pi * cycles * 2 * progress)))


def _between(lowest: float, fraction: float) -> float:
    return fraction * (1 - lowest) + lowest


def _piecewise_constant(rules: str) -> Factor:
    """Return Diffusers' schedule: "1:10,0.1:20,0.01" is 1 to step 10, 0.1 to 20, then 0.01."""
    try:
        *pieces, last = rules.split(",")
        limits = []
        for piece in pieces:
            value, step = piece.split(":")
            limits.append((int(step), float(value)))
        final = float(last)
    except ValueError:
        raise OptionError(
            f"--lr_scheduler_args step_rules={rules!r}: expected factor:step,factor:step,factor as "
            "in '1:10,0.1:20,0.01'"
        ) from None
    limits.sort()

    def piecewise_constant(step: int) -> float:
        for limit, value in limits:
            if step < limit:
                return value
        return final

    return piecewise_constant
