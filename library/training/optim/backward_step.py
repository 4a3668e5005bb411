"""OptimizerInBackward: a step within backward, so that gradients are never in memory together.

Where weights are sharded, a shard steps when its averaged gradient is ready: FSDP2 calls the hooks
after its reduction.

Sources: Lv et al. 2023, arXiv:2306.09782 (LOMO); sd-scripts' --fused_backward_pass and
--fused_optimizer_groups (contract: training_math.md section 5), which clip each tensor by its own
norm.
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
from library.training.optim.optimizer_step import (
    GradientStep,
    StepStats,
    clip_factor,
    gradient_norms,
)


class OptimizerInBackward(GradientStep):
    """Uses and frees each gradient as it comes in the last micro-batch's backward.

    A gradient that isn't finite steps no weight; but others may have been stepped before it came.
    """

    def __init__(
        self,
        optimizer: MasterWeightOptimizer,
        buckets: Sequence[Sequence[nn.Parameter]],
        *,
        max_grad_norm: float,
        clips_by_previous: bool,
        shards: Shards | None = None,
    ):
        """Add the hooks that step the parameters.

        Args:
            optimizer: what steps the parameters.
            buckets: parameters that step together when the last one's gradient is ready; of one
                group each.
            max_grad_norm: of each gradient by itself, or of all in the step before; 0 disables
                clipping.
            clips_by_previous: clip by the global gradient norm of the step before. The first step
                clips each gradient by itself.
            shards: of the parameters, where some are sharded. The others wait until their gradients
                are averaged, after backward.
        """
        self.optimizer = optimizer
        self._max_grad_norm, self._clips_by_previous, self._shards = (
            max_grad_norm,
            clips_by_previous,
            shards,
        )
        self._previous: Tensor | None = None
        self._buckets = [list(bucket) for bucket in buckets]
        self._num_ready = [0] * len(self._buckets)  # gradients of each bucket
        self._index = {parameter: i for i, parameter in enumerate(optimizer.parameters)}
        self._norms = torch.zeros(len(self._index), device=optimizer.device)
        self._is_last_microbatch, self._steps_done = False, 0
        self._stopped: Collection[nn.Parameter] = ()
        for i, bucket in enumerate(self._buckets):
            for parameter in bucket:
                self._add_hook(parameter, i)

    def begin(self, position: BatchPosition, stopped: Collection[nn.Parameter]) -> None:
        self._is_last_microbatch, self._steps_done = position.is_last_microbatch, position.step
        self._stopped = stopped

    def _add_hook(self, parameter: nn.Parameter, bucket_index: int) -> None:
        source = parameter if self._shards is None else self._shards.source(parameter)
        if source is not None:
            source.register_post_accumulate_grad_hook(
                lambda _: self._on_gradient(parameter, bucket_index)
            )

    def _on_gradient(self, parameter: nn.Parameter, bucket_index: int) -> None:
        """Step the bucket if this gradient, which is complete, is its last one."""
        if parameter in self._stopped:
            parameter.grad = None
        elif self._is_last_microbatch:
            if self._shards is not None:
                self._shards.load_shard(parameter)
            self._num_ready[bucket_index] += 1
            if self._num_ready[bucket_index] == len(self._buckets[bucket_index]):
                self._step(bucket_index)

    @torch.no_grad()
    def _step(self, bucket_index: int) -> None:
        """Clip and step the parameters of a bucket that have gradients, and free these."""
        params = [
            parameter for parameter in self._buckets[bucket_index] if parameter.grad is not None
        ]
        self._num_ready[bucket_index] = 0
        self.is_partly_taken = True
        norms = gradient_norms(params, self.optimizer.device)
        if self._shards is not None:
            norms = self._shards.norms(norms, params)
        for parameter, norm in zip(params, norms, strict=True):
            self._norms[self._index[parameter]] = norm
        factor = clip_factor(
            norms if self._previous is None else self._previous, self._max_grad_norm
        )
        if len(params) == 1 and factor.ndim:
            factor = factor[0]
        self.optimizer.step_params(params, self._steps_done, factor, norms.isfinite().all())
        for parameter in params:
            parameter.grad = None
            if self._shards is not None:
                self._shards.store_shard(parameter)

    def finish(self) -> StepStats:
        """Step what is left: incomplete buckets, and parameters that aren't sharded."""
        for parameter in self._stopped:
            parameter.grad = None
        for i, bucket in enumerate(self._buckets):
            if any(parameter.grad is not None for parameter in bucket):
                self._step(i)
        self.optimizer.commit()
        norms = self._norms
        self._norms = torch.zeros_like(norms)
        norm = torch.linalg.vector_norm(norms)
        if self._clips_by_previous:  # one that isn't finite would make the next step's gradients so
            last_finite = torch.zeros_like(norm) if self._previous is None else self._previous
            self._previous = norm.where(norm.isfinite(), last_finite)
        self.is_partly_taken = False
        return StepStats(norms, norm, overflowed=False)

    def discard(self) -> None:
        for parameter in self.optimizer.parameters:
            parameter.grad = None
        self._num_ready = [0] * len(self._buckets)

    def state(self) -> dict[str, Any]:
        return {"previous_norm": self._previous}

    def restore(self, state: Mapping[str, Any]) -> None:
        previous = state.get("previous_norm")
        if self._clips_by_previous and previous is not None:
            self._previous = previous.to(self._norms.device)


def param_buckets(
    groups: Sequence[ParamGroup], shards: Shards | None = None
) -> list[list[nn.Parameter]]:
    """Return what steps together: each large tensor by itself, and all small ones of a group.

    The small ones are half of all tensors, and a thousandth of the parameters.

    Args:
        groups: the parameters that are trained.
        shards: of the parameters. Ranks must agree, so the sizes of full tensors count, not those
            of shards.
    """
    buckets = []
    for group in groups:
        small = []
        for parameter in group.parameters.values():
            full = None if shards is None else shards.source(parameter)
            if (parameter if full is None else full).numel() < param_group.SMALL:
                small.append(parameter)
            else:
                buckets.append([parameter])
        if small:
            buckets.append(small)
    return buckets
