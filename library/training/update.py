"""Update: from the losses of a micro-batch to new weights. Owns accumulation, clipping, loss scaling and the schedule."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from library.data.order import Place
from library.errors import RunError
from library.param_group import ParamGroup
from library.training.optimizers import current_rate, parameters_of, takes_scaled_gradients
from library.training.state import optimizer_state, restore_optimizer

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s
_MAX_OVERFLOWS = 20  # float16 steps skipped in a row before it is no longer a matter of the loss's scale


class Updated(NamedTuple):
    """What one optimizer step did, still on the device: mean loss of its pictures, gradient norm before clipping; [] each.

    `asked`: whether a signal asked any process to end; [], above 0 if so.
    `overflowed`: float16 gradients left their range, and the step was left out.
    """

    loss: Tensor
    grad_norm: Tensor
    asked: Tensor
    overflowed: bool = False


class Update:
    """Plain update: gradients add up over a window of micro-batches, then all weights step together.

    Every picture of a window counts the same, whatever the sizes of its micro-batches and the number of processes.
    """

    def __init__(
        self,
        step: nn.Module,
        groups: Sequence[ParamGroup],
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        *,
        max_grad_norm: float,
        scales_loss: bool,
        processes: int,
    ):
        """Args: step: the wrapped Step, which is what the loop calls. max_grad_norm: 0 turns clipping off."""
        self.step_module, self._groups = step, groups
        self.optimizer, self._scheduler = optimizer, scheduler
        self._max_grad_norm, self._processes = max_grad_norm, processes
        self._parameters = parameters_of(optimizer)
        device = self._parameters[0].device
        self._scaler = torch.amp.GradScaler(device.type, enabled=scales_loss)
        self._on_device = takes_scaled_gradients(optimizer) and not scales_loss
        self._loss = torch.zeros((), device=device)
        self._overflows = 0

    @contextmanager
    def window(self, place: Place) -> Iterator[None]:
        """Around forward and backward: processes exchange gradients only with the micro-batch that closes the window."""
        if isinstance(self.step_module, DistributedDataParallel) and not place.closes_window:
            with self.step_module.no_sync():
                yield
        else:
            yield

    def backward(self, losses: Tensor, place: Place) -> None:
        """Add the gradient of the micro-batch's losses [B]."""
        share = losses.sum() / place.window_samples
        self._loss += share.detach()
        # Wrappers average gradients over processes, where a sum is wanted.
        self._scaler.scale(share * self._processes).backward()

    def step(self, done: int = 0, *, asked: bool = False) -> Updated:
        """Clip, step, advance the schedule, and forget the gradients.

        Args:
            done: optimizer steps before this one.
            asked: a signal asked this process to end, which the others learn with the loss.
        """
        self._drop_stopped(done)
        sums = torch.stack([self._loss, torch.full_like(self._loss, float(asked))])
        loss, anywhere = self._sum_over_processes(sums)
        self._loss = torch.zeros_like(self._loss)
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        clip = (
            (self._max_grad_norm / (norm + _CLIP_EPSILON)).clamp(max=1.0)
            if self._max_grad_norm
            else torch.ones_like(norm)
        )
        overflowed = self._apply(gradients, norm, clip)
        if self._scheduler is not None and not overflowed:
            self._scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Updated(loss, norm, anywhere, overflowed)

    def _drop_stopped(self, done: int) -> None:
        """Groups whose time is over stay as they are: optimizers leave alone what has no gradient."""
        for group in self._groups:
            if group.stops_at is None or done < group.stops_at:
                continue
            for parameter in group.parameters.values():
                parameter.grad = None
                if self._processes == 1:  # several exchange the gradients of all that they started with
                    parameter.requires_grad_(False)

    def _apply(self, gradients: Sequence[Tensor], norm: Tensor, clip: Tensor) -> bool:
        """Step on clipped gradients; not at all if they aren't finite. Returns whether float16 overflowed."""
        if self._on_device:  # the optimizer's kernel divides by grad_scale and heeds found_inf: the host needn't wait
            self.optimizer.grad_scale = 1 / clip  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            return False
        torch._foreach_mul_(list(gradients), clip)
        if not self._scaler.is_enabled():
            if norm.isfinite():
                self.optimizer.step()
            return False
        before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        overflowed = self._scaler.get_scale() < before
        self._overflows = self._overflows + 1 if overflowed else 0
        if self._overflows >= _MAX_OVERFLOWS:
            raise RunError(
                f"float16 gradients overflowed in {_MAX_OVERFLOWS} steps in a row; take --mixed_precision bf16 or no, or a lower learning rate"
            )
        return overflowed

    def state(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Optimizer, schedule and loss scale. Args: names: of the parameters, by their id."""
        return {
            "optimizer": optimizer_state(self.optimizer, names),
            "schedule": None if self._scheduler is None else self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "overflows": self._overflows,
        }

    def restore(self, state: Mapping[str, Any], names: Mapping[int, str], *, same_options: bool) -> None:
        """Go on with what state() gave. Without `same_options`, learning rates and schedule are those of the options now."""
        restore_optimizer(self.optimizer, state["optimizer"], names, same_options=same_options)
        if self._scheduler is not None and state["schedule"] is not None:
            if same_options:
                self._scheduler.load_state_dict(state["schedule"])
            else:
                self.skip(state["schedule"]["last_epoch"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        self._overflows = state["overflows"]

    def skip(self, steps: int) -> None:
        """Advance the schedule as if so many steps had been done (--initial_step)."""
        for _ in range(steps if self._scheduler is not None else 0):
            self.optimizer._opt_called = True  # type: ignore[attr-defined] # torch warns of a schedule before any step
            self._scheduler.step()  # type: ignore[union-attr]

    def forget(self) -> None:
        """Drop what a window that broke off has added up."""
        self.optimizer.zero_grad(set_to_none=True)
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
