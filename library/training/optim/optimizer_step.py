"""OptimizerStep: accumulated gradients become one step of all weights and of the schedule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from library.data.batch_sampler import BatchPosition
from library.errors import RunError
from library.param_group import ParamGroup
from library.training.distributed.sharding import Shards
from library.training.optim.master_weights import MasterWeightOptimizer
from library.training.optim.optimizers import current_rate
from library.training.optim.rounding import StochasticSums

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s

FullNorms = Callable[[Tensor, Sequence[nn.Parameter]], Tensor]
"""From norms of this rank's gradient shards, [n], and their parameters to those of gradients."""


class StepResult(NamedTuple):
    """What one optimizer step did, with tensors still on the device.

    Attributes:
        loss: mean over the step's images; [].
        grad_norm: global gradient norm before clipping; [].
        norms: of each parameter's gradient, 0 where it has none; [n].
        stop_requested: above 0 if a signal asked any process to stop; [].
        overflowed: whether float16 gradients overflowed, so that the step was skipped.
    """

    loss: Tensor
    grad_norm: Tensor
    norms: Tensor
    stop_requested: Tensor
    overflowed: bool = False


class StepStats(NamedTuple):
    """The gradients of a step before clipping.

    Attributes:
        norms: of each parameter's gradient, 0 where it has none; [n].
        norm: global gradient norm; [].
        overflowed: whether float16 gradients overflowed, so that the step was skipped.
    """

    norms: Tensor
    norm: Tensor
    overflowed: bool


class GradientStep(ABC):
    """How accumulated gradients become an optimizer step.

    Attributes:
        optimizer: what steps the parameters.
        is_partly_taken: some weights have been stepped already, so the step can't start again.
    """

    optimizer: MasterWeightOptimizer
    is_partly_taken: bool = False

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss that backward starts from."""
        return loss

    @abstractmethod
    def begin(self, position: BatchPosition, stopped: Collection[nn.Parameter]) -> None:
        """Prepare for a micro-batch's backward.

        Args:
            position: of the micro-batch.
            stopped: parameters that are no longer trained.
        """

    @abstractmethod
    def finish(self) -> StepStats:
        """Step all parameters and clear their gradients, after the last micro-batch's backward."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients of an accumulation that was broken off."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a saved state needs of it."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what state() returned."""


class OptimizerStep:
    """Accumulates the gradients of micro-batches and steps all weights by them.

    Every image of a step counts the same, whatever the sizes of its micro-batches and the number of
    processes.

    Attributes:
        loss_module: what the loop calls for losses.
        gradient_step: how accumulated gradients become a step.
    """

    def __init__(
        self,
        loss_module: nn.Module,
        groups: Sequence[ParamGroup],
        gradient_step: GradientStep,
        scheduler: LRScheduler | None,
        stochastic_sums: StochasticSums | None = None,
        *,
        world_size: int = 1,
        shards: Shards | None = None,
    ):
        """Put the parts of a step together.

        Args:
            loss_module: gives losses, wrapped for several processes.
            groups: the parameters that are trained.
            gradient_step: how accumulated gradients become a step.
            scheduler: of the learning rate; None where the optimizer needs none.
            stochastic_sums: how 16-bit gradients add up; None: as autograd does.
            world_size: number of processes.
            shards: exchange gradients where no wrapper does.
        """
        self.loss_module, self.gradient_step = loss_module, gradient_step
        self._groups, self._scheduler, self._stochastic_sums = groups, scheduler, stochastic_sums
        self._world_size, self._shards = world_size, shards
        self._loss = torch.zeros((), device=gradient_step.optimizer.device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.gradient_step.optimizer.base_optimizer

    @property
    def is_partly_taken(self) -> bool:
        """Whether the step in progress has changed weights already."""
        return self.gradient_step.is_partly_taken

    @contextmanager
    def accumulation(self, position: BatchPosition) -> Iterator[None]:
        """Context manager of a micro-batch: only that of the last one exchanges gradients."""
        if self._world_size == 1:  # several exchange the gradients of all that they started with
            # Before the forward, which checkpointing does again in backward: both must see the
            # same.
            for parameter in self._stopped(position.step):
                parameter.requires_grad_(False)
        if (
            isinstance(self.loss_module, DistributedDataParallel)
            and not position.is_last_microbatch
        ):
            with self.loss_module.no_sync():
                yield
        else:
            if self._shards is not None:
                self._shards.begin(is_last_microbatch=position.is_last_microbatch)
            yield

    def backward(self, losses: Tensor, position: BatchPosition) -> None:
        """Add the gradient of the micro-batch's losses [B]."""
        loss = losses.sum() / position.global_batch_size
        self._loss += loss.detach()
        self.gradient_step.begin(position, self._stopped(position.step))
        if self._stochastic_sums is not None:
            self._stochastic_sums.begin(position)
        # Wrappers average gradients over ranks, but the sum is needed.
        self.gradient_step.scale_loss(loss * self._world_size).backward()

    def step(self, *, stop_requested: bool = False) -> StepResult:
        """Finish the step, and advance the schedule.

        Args:
            stop_requested: a signal asked this process to stop, which the others learn with the
                loss.
        """
        sums = torch.stack([self._loss, torch.full_like(self._loss, float(stop_requested))])
        loss, stop_requests = self._sum_over_ranks(sums)
        self._loss = torch.zeros_like(self._loss)
        with nullcontext() if self._shards is None else self._shards.reduced_gradients():
            stats = self.gradient_step.finish()
        if self._scheduler is not None and not stats.overflowed:
            self._scheduler.step()
        return StepResult(loss, stats.norm, stats.norms, stop_requests, stats.overflowed)

    def _stopped(self, step: int) -> set[nn.Parameter]:
        """Return the parameters of groups that are no longer trained after that number of steps."""
        stopped: set[nn.Parameter] = set()
        for group in self._groups:
            if group.last_step is not None and step >= group.last_step:
                stopped.update(group.parameters.values())
        return stopped

    def eval_weights(self) -> AbstractContextManager[None]:
        """Context manager: weights are those to evaluate and save."""
        return self.gradient_step.optimizer.eval_weights()

    def state(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Return the state of optimizer, schedule and loss scale.

        Args:
            names: of the parameters, by their id.
        """
        return {
            "optimizer": self.gradient_step.optimizer.state(names),
            "schedule": None if self._scheduler is None else self._scheduler.state_dict(),
            _GRADIENT_STEP: self.gradient_step.state(),
        }

    def restore(
        self, state: Mapping[str, Any], names: Mapping[int, str], *, same_options: bool
    ) -> None:
        """Restore what state() returned.

        Args:
            state: of optimizer, schedule and loss scale.
            names: of the parameters, by their id.
            same_options: whether learning rates and schedule are those of the state, not those of
                the options.
        """
        self.gradient_step.optimizer.restore(state["optimizer"], names, same_options=same_options)
        if self._scheduler is not None and state["schedule"] is not None:
            if same_options:
                self._scheduler.load_state_dict(state["schedule"])
            else:
                self.skip(state["schedule"]["last_epoch"])
        self.gradient_step.restore(state[_GRADIENT_STEP])

    def skip(self, steps: int) -> None:
        """Advance the schedule as if that number of steps had been taken (--initial_step)."""
        if self._scheduler is None:
            return
        for _ in range(steps):
            self.optimizer._opt_called = True  # type: ignore[attr-defined] # torch warns of a schedule before any step
            self._scheduler.step()

    def discard(self) -> None:
        """Drop the gradients and losses of an accumulation that was broken off."""
        self.gradient_step.discard()
        self._loss = torch.zeros_like(self._loss)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self._world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each group, by name; times Prodigy's d as d*lr/NAME."""
        rates = {}
        for group, param_group in zip(self._groups, self.optimizer.param_groups, strict=True):
            rates[group.name] = current_rate(self.optimizer, param_group)
            if "d" in param_group:  # D-Adaptation, Prodigy
                rates[f"d*lr/{group.name}"] = float(param_group["d"]) * rates[group.name]
        return rates


_GRADIENT_STEP = "descent"  # key of saved states


class StandardStep(GradientStep):
    """Clips all gradients together after the last micro-batch, and steps all weights."""

    def __init__(
        self,
        optimizer: MasterWeightOptimizer,
        *,
        max_grad_norm: float,
        scales_loss: bool,
        full_norms: FullNorms | None = None,
    ):
        """Keep the settings.

        Args:
            optimizer: what steps the parameters.
            max_grad_norm: of all gradients together; 0 disables clipping.
            scales_loss: whether gradients are float16, and the loss is scaled so that they don't
                underflow.
            full_norms: of gradients that are sharded.
        """
        self.optimizer = optimizer
        self.scale = LossScale(enabled=scales_loss)
        self._max_grad_norm, self._full_norms = max_grad_norm, full_norms
        self._steps_done = 0
        self._stopped: Collection[nn.Parameter] = ()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.scale.value if self.scale.enabled else loss

    def begin(self, position: BatchPosition, stopped: Collection[nn.Parameter]) -> None:
        self._steps_done, self._stopped = position.step, stopped

    def finish(self) -> StepStats:
        """Step, unless gradients aren't finite."""
        for parameter in self._stopped:
            parameter.grad = None
        params = self.optimizer.parameters
        norms = gradient_norms(params, self.optimizer.device) / self.scale.value
        if self._full_norms is not None:
            norms = self._full_norms(norms, params)
        norm = torch.linalg.vector_norm(norms)
        factor = clip_factor(norm, self._max_grad_norm) / self.scale.value
        overflowed = False
        if self.optimizer.skips_on_device and not self.scale.enabled:
            self.optimizer.step_all(self._steps_done, factor, norm.isfinite())
        elif norm.isfinite():
            self.optimizer.step_all(self._steps_done, factor)
        else:
            overflowed = self.scale.enabled
        self.scale.record(overflowed=overflowed)
        self.discard()
        return StepStats(norms, norm, overflowed)

    def discard(self) -> None:
        for parameter in self.optimizer.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if "scale" in state:
            self.scale.restore(state["scale"])


def gradient_norms(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return the norm of each parameter's gradient, 0 without one: [n], float32, on `device`."""
    norms = [torch.zeros((), device=device)] * len(parameters)
    indices = [i for i, parameter in enumerate(parameters) if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        for i, norm in zip(
            indices, torch._foreach_norm(gradients, 2, dtype=torch.float32), strict=True
        ):
            norms[i] = norm
    return torch.stack(norms)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that clips gradients of this norm to `max_norm`; 1 if that is 0."""
    if not max_norm:
        return torch.ones_like(norm)
    return (max_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)


_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000
_MAX_OVERFLOWS = 20


class LossScale:
    """Scale of float16 losses: halved when gradients overflow, doubled after 2000 steps without.

    Source: Micikevicius et al. 2018, arXiv:1710.03740; the values are torch.amp.GradScaler's.
    """

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.value = _INITIAL_SCALE if enabled else 1.0
        self._good_steps, self._overflows = 0, 0  # in a row

    def record(self, *, overflowed: bool) -> None:
        """Adjust the scale after a step.

        Raises:
            RunError: gradients overflow at every scale.
        """
        if not self.enabled:
            return
        if overflowed:
            self.value /= 2
            self._good_steps, self._overflows = 0, self._overflows + 1
        else:
            self._good_steps, self._overflows = self._good_steps + 1, 0
        if self._good_steps == _GROWTH_INTERVAL:
            self.value, self._good_steps = self.value * 2, 0
        if self._overflows >= _MAX_OVERFLOWS:
            raise RunError(
                f"float16 gradients overflowed in {_MAX_OVERFLOWS} steps in a row; take "
                "--mixed_precision bf16 or no, or a lower learning rate"
            )

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "good": self._good_steps, "overflows": self._overflows}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.enabled:
            self.value = state["value"]
            self._good_steps, self._overflows = state["good"], state["overflows"]
