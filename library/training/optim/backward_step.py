"""InBackward: the step that is taken within backward, so that gradients never lie in memory together.

Where weights are sharded, a part steps when its averaged gradient is there: FSDP2 calls the hooks behind its reduction.

Sources: Lv et al. 2023, arXiv:2306.09782 (LOMO); sd-scripts' --fused_backward_pass and --fused_optimizer_groups (contract: training_math.md
section 5), which clip each tensor alone.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library import param_group
from library.data.batch_sampler import BatchPosition
from library.param_group import ParamGroup
from library.training.distributed.sharding import Shards
from library.training.optim.master_weights import MasterWeightOptimizer
from library.training.optim.optimizer_step import GradientStep, StepStats, clip_factor, norms_of


class OptimizerInBackward(GradientStep):
    """Each gradient is used and freed as it comes, in the backward that closes the window; those before it add up.

    A gradient that isn't finite steps no weight by it; but others may have been stepped before it came.
    """

    def __init__(
        self,
        stepper: MasterWeightOptimizer,
        buckets_of_params: Sequence[Sequence[nn.Parameter]],
        *,
        max_grad_norm: float,
        clips_by_previous: bool,
        shards: Shards | None = None,
    ):
        """Args:
        bunches: parameters that step together when the last one's gradient is there; of one group each.
        max_grad_norm: of each gradient alone, or of all in the step before; 0 turns clipping off.
        clips_by_previous: scale by the norm over all parameters that the step before had. The first one clips each alone.
        shards: whose parameters they are, where some are parts. Others wait then until their gradients are averaged, behind backward.
        """
        self.stepper, self.is_partly_taken = stepper, False
        self._max_grad_norm, self._clips_by_previous, self._shards = max_grad_norm, clips_by_previous, shards
        self._previous: Tensor | None = None
        self._bunches = [list(param_bucket) for param_bucket in buckets_of_params]
        self._arrived = [0] * len(self._bunches)  # gradients of each that are there
        self._index = {parameter: i for i, parameter in enumerate(stepper.parameters)}
        self._norms = torch.zeros(len(self._index), device=stepper.device)
        self._closes, self._number = False, 0
        self._stopped: Collection[nn.Parameter] = ()
        for number, param_bucket in enumerate(self._bunches):
            for parameter in param_bucket:
                self._await(parameter, number)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss

    def begin(self, place: BatchPosition, stopped: Collection[nn.Parameter]) -> None:
        self._closes, self._number, self._stopped = place.is_last_microbatch, place.step, stopped

    def _await(self, parameter: nn.Parameter, number: int) -> None:
        source = parameter if self._shards is None else self._shards.source(parameter)
        if source is not None:
            source.register_post_accumulate_grad_hook(lambda _: self._arrives(parameter, number))

    def _arrives(self, parameter: nn.Parameter, number: int) -> None:
        """A gradient is complete, as far as this micro-batch goes."""
        if parameter in self._stopped:
            parameter.grad = None
        elif self._closes:
            if self._shards is not None:
                self._shards.take(parameter)
            self._arrived[number] += 1
            if self._arrived[number] == len(self._bunches[number]):
                self._step(number)

    @torch.no_grad()
    def _step(self, number: int) -> None:
        """Clip and step the parameters of a bunch that have gradients, and free these."""
        members = [parameter for parameter in self._bunches[number] if parameter.grad is not None]
        self._arrived[number] = 0
        self.is_partly_taken = True
        norms = norms_of(members, self.stepper.device)
        if self._shards is not None:
            norms = self._shards.norms(norms, members)
        for parameter, norm in zip(members, norms, strict=True):
            self._norms[self._index[parameter]] = norm
        factor = clip_factor(norms if self._previous is None else self._previous, self._max_grad_norm)
        factor = factor[0] if len(members) == 1 and factor.ndim else factor
        self.stepper.step(members, self._number, factor, norms.isfinite().all())
        for parameter in members:
            parameter.grad = None
            if self._shards is not None:
                self._shards.store_shard(parameter)

    def finish(self) -> StepStats:
        """Step what waits for a gradient that doesn't come, and what is whole where others are parts."""
        for parameter in self._stopped:
            parameter.grad = None
        for number, param_bucket in enumerate(self._bunches):
            if any(parameter.grad is not None for parameter in param_bucket):
                self._step(number)
        self.stepper.commit()
        norms, self._norms = self._norms, torch.zeros_like(self._norms)
        norm = torch.linalg.vector_norm(norms)
        if self._clips_by_previous:  # one that isn't finite would make the next step's gradients so
            known = torch.zeros_like(norm) if self._previous is None else self._previous
            self._previous = norm.where(norm.isfinite(), known)
        self.is_partly_taken = False
        return StepStats(norms, norm, overflowed=False)

    def forget(self) -> None:
        for parameter in self.stepper.parameters:
            parameter.grad = None
        self._arrived = [0] * len(self._bunches)

    def state(self) -> dict[str, Any]:
        return {"previous_norm": self._previous}

    def restore(self, state: Mapping[str, Any]) -> None:
        previous = state.get("previous_norm")
        if self._clips_by_previous and previous is not None:
            self._previous = previous.to(self._norms.device)


def bunches_of(groups: Sequence[ParamGroup], shards: Shards | None = None) -> list[list[nn.Parameter]]:
    """What steps together: large tensors alone; the small ones of a group, half of all and a thousandth of the numbers, at once.

    Args: shards: whose parameters they are; processes must agree, so the whole tensors count, not the parts.
    """

    def is_small(parameter: nn.Parameter) -> bool:
        whole = None if shards is None else shards.source(parameter)
        return (parameter if whole is None else whole).numel() < param_group.SMALL

    buckets_of_params = []
    for group in groups:
        small = [parameter for parameter in group.parameters.values() if is_small(parameter)]
        buckets_of_params += [[parameter] for parameter in group.parameters.values() if not is_small(parameter)]
        buckets_of_params += [small] if small else []
    return buckets_of_params
