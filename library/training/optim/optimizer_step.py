"""Update: from the losses of a micro-batch to new weights. Owns windows, the schedule, and the choice of the way down."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

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

WholeNorms = Callable[[Tensor, Sequence[nn.Parameter]], Tensor]
"""From the norms of gradients that lie here, [n], and their parameters to those of whole ones."""


class StepResult(NamedTuple):
    """What one optimizer step did, still on the device: mean loss of its pictures, gradient norm before clipping; [] each.

    `norms`: of each parameter's gradient, 0 where it has none; [n].
    `asked`: whether a signal asked any process to end; [], above 0 if so.
    `overflowed`: float16 gradients left their range, and the step was left out.
    """

    loss: Tensor
    grad_norm: Tensor
    norms: Tensor
    asked: Tensor
    overflowed: bool = False


class StepStats(NamedTuple):
    """What became of a window's gradients: their norms [n] and the norm of all [], before clipping; whether they overflowed."""

    norms: Tensor
    norm: Tensor
    overflowed: bool


class GradientStep(Protocol):
    """The way from gradients to weights.

    Attributes:
        is_partly_taken: some weights of the window have been stepped already, so it can't begin again.
    """

    stepper: MasterWeightOptimizer
    is_partly_taken: bool

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss that backward begins with."""
        ...

    def begin(self, place: BatchPosition, stopped: Collection[nn.Parameter]) -> None:
        """Before a micro-batch's backward. Args: stopped: what stays as it is from now on."""
        ...

    def finish(self) -> StepStats:
        """Behind the backward that closes a window: all weights are stepped, all gradients gone."""
        ...

    def forget(self) -> None:
        """Drop what a window that broke off has added up."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class OptimizerStep:
    """Gradients over a window of micro-batches become one step of all weights.

    Every picture of a window counts the same, whatever the sizes of its micro-batches and the number of processes.
    """

    def __init__(
        self,
        step: nn.Module,
        groups: Sequence[ParamGroup],
        gradient_step: GradientStep,
        scheduler: LRScheduler | None,
        sums: StochasticSums | None = None,
        *,
        processes: int = 1,
        shards: Shards | None = None,
    ):
        """Args:
        step: the wrapped Step, which is what the loop calls.
        sums: how 16-bit gradients add up; None: as autograd does.
        shards: which exchange gradients, where no wrapper does it.
        """
        self.loss_module, self._groups = step, groups
        self._gradient_step, self._scheduler, self._sums, self._processes = gradient_step, scheduler, sums, processes
        self._shards = shards
        self._loss = torch.zeros((), device=gradient_step.stepper.device)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._gradient_step.stepper.optimizer

    @property
    def is_partly_taken(self) -> bool:
        """Whether the step that is in work has changed weights already."""
        return self._gradient_step.is_partly_taken

    @contextmanager
    def window(self, place: BatchPosition) -> Iterator[None]:
        """Around forward and backward: processes exchange gradients only with the micro-batch that closes the window."""
        if self._processes == 1:  # several exchange the gradients of all that they started with
            # Before the forward, which checkpointing does again in backward: both must see the same.
            for parameter in self._stopped(place.step):
                parameter.requires_grad_(False)
        if isinstance(self.loss_module, DistributedDataParallel) and not place.is_last_microbatch:
            with self.loss_module.no_sync():
                yield
        else:
            if self._shards is not None:
                self._shards.begin(is_last_microbatch=place.is_last_microbatch)
            yield

    def backward(self, losses: Tensor, place: BatchPosition) -> None:
        """Add the gradient of the micro-batch's losses [B]."""
        share = losses.sum() / place.global_batch_size
        self._loss += share.detach()
        self._gradient_step.begin(place, self._stopped(place.step))
        if self._sums is not None:
            self._sums.begin(place)
        # Wrappers average gradients over processes, where a sum is wanted.
        self._gradient_step.scaled(share * self._processes).backward()

    def step(self, *, asked: bool = False) -> StepResult:
        """Finish the step, and advance the schedule. Args: asked: a signal asked this process to end, which the others learn with the loss."""
        sums = torch.stack([self._loss, torch.full_like(self._loss, float(asked))])
        loss, anywhere = self._sum_over_processes(sums)
        self._loss = torch.zeros_like(self._loss)
        with nullcontext() if self._shards is None else self._shards.reduced_gradients():
            descended = self._gradient_step.finish()
        if self._scheduler is not None and not descended.overflowed:
            self._scheduler.step()
        return StepResult(loss, descended.norm, descended.norms, anywhere, descended.overflowed)

    def _stopped(self, done: int) -> set[nn.Parameter]:
        """The parameters of groups whose time is over. Args: done: optimizer steps."""
        stopped: set[nn.Parameter] = set()
        for group in self._groups:
            if group.last_step is not None and done >= group.last_step:
                stopped.update(group.parameters.values())
        return stopped

    def eval_weights(self) -> AbstractContextManager[None]:
        """Meanwhile the weights are those that are used, saved and shown, where the optimizer trains other ones."""
        return self._gradient_step.stepper.eval_weights()

    def state(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Optimizer, schedule and loss scale. Args: names: of the parameters, by their id."""
        return {
            "optimizer": self._gradient_step.stepper.state(names),
            "schedule": None if self._scheduler is None else self._scheduler.state_dict(),
            "descent": self._gradient_step.state(),
        }

    def restore(self, state: Mapping[str, Any], names: Mapping[int, str], *, same_options: bool) -> None:
        """Go on with what state() gave. Without `same_options`, learning rates and schedule are those of the options now."""
        self._gradient_step.stepper.restore(state["optimizer"], names, same_options=same_options)
        if self._scheduler is not None and state["schedule"] is not None:
            if same_options:
                self._scheduler.load_state_dict(state["schedule"])
            else:
                self.skip(state["schedule"]["last_epoch"])
        self._gradient_step.restore(state["descent"])

    def skip(self, steps: int) -> None:
        """Advance the schedule as if so many steps had been done (--initial_step)."""
        for _ in range(steps if self._scheduler is not None else 0):
            self.optimizer._opt_called = True  # type: ignore[attr-defined] # torch warns of a schedule before any step
            self._scheduler.step()  # type: ignore[union-attr]

    def forget(self) -> None:
        """Drop what a window that broke off has added up."""
        self._gradient_step.forget()
        self._loss = torch.zeros_like(self._loss)

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        if self._processes > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return value

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each group, by its name; times the factor d where the optimizer finds one (d*lr/NAME)."""
        rates = {}
        for group, state in zip(self._groups, self.optimizer.param_groups, strict=True):
            rates[group.name] = current_rate(self.optimizer, state)
            if "d" in state:  # D-Adaptation, Prodigy
                rates[f"d*lr/{group.name}"] = float(state["d"]) * rates[group.name]
        return rates


class StandardStep(GradientStep):
    """Gradients add up in the parameters; at the end of the window they are clipped together, and all weights step."""

    is_partly_taken = False

    def __init__(
        self,
        stepper: MasterWeightOptimizer,
        *,
        max_grad_norm: float,
        scales_loss: bool,
        whole_norms: WholeNorms | None = None,
    ):
        """Args: max_grad_norm: 0 turns clipping off. scales_loss: gradients are float16. whole_norms: where some lie in parts."""
        self._whole_norms = whole_norms
        self.stepper, self._max_grad_norm = stepper, max_grad_norm
        self.scale = LossScale(enabled=scales_loss)
        self._number = 0
        self._stopped: Collection[nn.Parameter] = ()

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale.value if self.scale.enabled else loss

    def begin(self, place: BatchPosition, stopped: Collection[nn.Parameter]) -> None:
        self._number, self._stopped = place.step, stopped

    def finish(self) -> StepStats:
        """Step, unless gradients aren't finite."""
        for parameter in self._stopped:
            parameter.grad = None
        norms = norms_of(self.stepper.parameters, self.stepper.device) / self.scale.value
        if self._whole_norms is not None:
            norms = self._whole_norms(norms, self.stepper.parameters)
        norm = torch.linalg.vector_norm(norms)
        factor = clip_factor(norm, self._max_grad_norm) / self.scale.value
        overflowed = False
        if self.stepper.skips_on_device and not self.scale.enabled:
            self.stepper.step_all(self._number, factor, norm.isfinite())
        elif norm.isfinite():
            self.stepper.step_all(self._number, factor)
        else:
            overflowed = self.scale.enabled
        self.scale.stepped(overflowed=overflowed)
        self.forget()
        return StepStats(norms, norm, overflowed)

    def forget(self) -> None:
        for parameter in self.stepper.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if "scale" in state:
            self.scale.restore(state["scale"])


def norms_of(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of each parameter's gradient, 0 where it has none: [n], float32, on the device that computes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    found = iter(torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ())
    zero = torch.zeros((), device=device)
    return torch.stack([zero if parameter.grad is None else next(found) for parameter in parameters])


def clip_factor(norm: Tensor, most: float) -> Tensor:
    """What gradients of this norm are multiplied by so that it is at most so large; 1 for a bound of 0, which is none."""
    return (most / (norm + _CLIP_EPSILON)).clamp(max=1.0) if most else torch.ones_like(norm)


_START, _STEPS, _MAX_OVERFLOWS = 2.0**16, 2000, 20


class LossScale:
    """Halved when gradients overflow, doubled when they haven't for 2000 steps; 1 for other dtypes.

    Source: Micikevicius et al. 2018, arXiv:1710.03740; the numbers are torch.amp.GradScaler's.
    """

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.value = _START if enabled else 1.0
        self._good, self._overflows = 0, 0  # steps in a row

    def stepped(self, *, overflowed: bool) -> None:
        """Take note of a step. Raises RunError when it is no longer a matter of the scale."""
        if not self.enabled:
            return
        self._good, self._overflows = (0, self._overflows + 1) if overflowed else (self._good + 1, 0)
        if overflowed:
            self.value /= 2
        elif self._good == _STEPS:
            self.value, self._good = self.value * 2, 0
        if self._overflows >= _MAX_OVERFLOWS:
            raise RunError(
                f"float16 gradients overflowed in {_MAX_OVERFLOWS} steps in a row; take --mixed_precision bf16 or no, or a lower learning rate"
            )

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "good": self._good, "overflows": self._overflows}

    def restore(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value, self._good, self._overflows = state["value"], state["good"], state["overflows"]
