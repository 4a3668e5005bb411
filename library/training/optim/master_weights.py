"""MasterWeightOptimizer: steps parameters, 16-bit ones by way of float32 master weights.

The optimizer of 16-bit weights is made over float32 parameters that have memory only while they are
stepped. So its state is that of float32 weights (AdamW: 8 bytes per parameter), and the updated
master weights are rounded back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.log import silence_logging
from library.param_group import ParamGroup
from library.rng import seed_of
from library.training.optim.optimizer_state import optimizer_state, restore_optimizer
from library.training.optim.optimizers import (
    is_schedule_free,
    start_training,
    takes_scaled_gradients,
)
from library.training.optim.rounding import compensate, round_stochastically
from library.training.optim.state_offload import OffloadedOptimizerState

FP32_BUCKET_NUMEL = (
    1 << 24
)  # parameters that are in float32 at once: 64 MB of weights, and as much of gradients

Params = Sequence[nn.Parameter]


def fp32_params(groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """Return the groups for an optimizer: 16-bit parameters become float32 ones without memory."""
    fp32_groups = []
    for group in groups:
        parameters = {name: _fp32_param(parameter) for name, parameter in group.parameters.items()}
        fp32_groups.append(replace(group, parameters=parameters))
    return fp32_groups


def _fp32_param(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype is torch.float32:
        return parameter
    return nn.Parameter(torch.zeros((), device=parameter.device).expand(parameter.shape))


def compute_device(groups: Sequence[ParamGroup]) -> torch.device:
    """Return the device that computes: that of the parameters that aren't offloaded to RAM."""
    return _compute_device(
        [parameter for group in groups for parameter in group.parameters.values()]
    )


def _compute_device(parameters: Params) -> torch.device:
    for parameter in parameters:
        if parameter.device.type != "cpu":
            return parameter.device
    return parameters[0].device


class MasterWeightOptimizer:
    """Steps parameters by an optimizer, on whichever device they are at that time.

    Attributes:
        base_optimizer: the optimizer, over fp32_params of the groups.
        parameters: those of all groups.
        skips_on_device: whether the optimizer itself skips a step whose gradients are not finite,
            without the host.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        groups: Sequence[ParamGroup],
        *,
        rounding: str = "nearest",
        seed: int = 0,
        is_separable: bool = True,
        device: torch.device | None = None,
        offloaded_state: OffloadedOptimizerState | None = None,
    ):
        """Pair each parameter with the one that the optimizer sees.

        Args:
            base_optimizer: made over fp32_params(groups).
            groups: the parameters to step.
            rounding: of 16-bit weights: "stochastic", "kahan" or "nearest".
            seed: of stochastic rounding.
            is_separable: whether the optimizer may step parameters one by one.
            device: the device that computes; None: that of the parameters that aren't in RAM.
            offloaded_state: the optimizer's state, if it is in RAM between steps.
        """
        self.base_optimizer = base_optimizer
        self._rounding, self._seed, self._is_separable = rounding, seed, is_separable
        self._device = device
        self._offloaded_state = offloaded_state
        self._names: dict[nn.Parameter, str] = {}
        self._group_of: dict[nn.Parameter, int] = {}
        self._fp32: dict[nn.Parameter, nn.Parameter] = {}  # a float32 parameter is its own
        for i, (group, param_group) in enumerate(
            zip(groups, base_optimizer.param_groups, strict=True)
        ):
            for (name, parameter), fp32 in zip(
                group.parameters.items(), param_group["params"], strict=True
            ):
                self._names[parameter], self._group_of[parameter] = name, i
                self._fp32[parameter] = fp32
        self.parameters = list(self._names)
        self._without_memory = {parameter: fp32.data for parameter, fp32 in self._fp32.items()}
        self._compensation: dict[nn.Parameter, Tensor] = {}
        self._pending_counters: dict[int, dict[str, Any]] = {}  # by group
        self.skips_on_device = takes_scaled_gradients(base_optimizer)

    @property
    def device(self) -> torch.device:
        """The device that computes; some parameters may be in RAM."""
        return self._device or _compute_device(self.parameters)

    # ---------------------------------------------------------------------- stepping

    def step_all(self, step: int, factor: Tensor, is_finite: Tensor | None = None) -> None:
        """Step every parameter that has a gradient.

        Args:
            step: as of step_params().
            factor: as of step_params().
            is_finite: as of step_params().
        """
        params = [parameter for parameter in self.parameters if parameter.grad is not None]
        saves_memory = bool(self._low_precision_params(params)) or self._offloaded_state is not None
        if not (saves_memory and self._is_separable):
            self._step(params, step, factor, is_finite)
            return
        for bucket in self._buckets_by_group(params):
            self.step_params(bucket, step, factor, is_finite)
        self.commit()

    def step_params(
        self, params: Params, step: int, factor: Tensor, is_finite: Tensor | None = None
    ) -> None:
        """Step parameters of one group, as if it had no others.

        What the optimizer counts by group advances with commit() only.

        Args:
            params: parameters that have gradients. Gradients are modified in place, and freed for
                16-bit parameters.
            step: optimizer steps done before this one.
            factor: of all gradients, [], or of each, [params]; float32.
            is_finite: whether the gradients are, []; None: they are. If not, weights stay unchanged
                where the optimizer skips the step on the device (`skips_on_device`), and are
                stepped with gradients of 0 where it doesn't.
        """
        with self._only(params):
            self._step(params, step, factor, is_finite)

    def commit(self) -> None:
        """Advance what the optimizer counts by group, once all gradients are used."""
        for group, counters in self._pending_counters.items():
            self.base_optimizer.param_groups[group].update(counters)
        self._pending_counters.clear()

    @contextmanager
    def _only(self, params: Params) -> Iterator[None]:
        """Context manager: the optimizer has only these parameters, and its old counters."""
        groups, i = self.base_optimizer.param_groups, self._group_of[params[0]]
        alone = {**groups[i], "params": [self._fp32[parameter] for parameter in params]}
        self.base_optimizer.param_groups = [alone]
        try:
            yield
        finally:
            self.base_optimizer.param_groups = groups
            del alone["params"]
            self._pending_counters[i] = alone

    @torch.no_grad()
    def _step(self, params: Params, step: int, factor: Tensor, is_finite: Tensor | None) -> None:
        buckets = _buckets(self._low_precision_params(params))
        master_weights = [self._load_master_weights(bucket) for bucket in buckets]
        for bucket in buckets:
            self._load_gradients(bucket)
        fp32 = [self._fp32[parameter] for parameter in params]
        self._scale_gradients(_gradients(fp32), factor, is_finite)
        with self._state_on_device(fp32):
            self.base_optimizer.step()
        for bucket, weights in zip(buckets, master_weights, strict=True):
            self._store_rounded(bucket, weights, step)

    def _scale_gradients(
        self, gradients: list[Tensor], factor: Tensor, is_finite: Tensor | None
    ) -> None:
        """Scale gradients, and keep NaN and Inf from the weights; in the kernel where it can."""
        if factor.ndim:
            torch._foreach_mul_(gradients, list(factor))
            factor = factor.new_ones(())
        if (
            self.skips_on_device
        ):  # the kernel divides by grad_scale and heeds found_inf: the host needn't wait
            found_inf = None if is_finite is None else (~is_finite).float()
            self.base_optimizer.grad_scale = 1 / factor  # type: ignore[attr-defined]
            self.base_optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            return
        torch._foreach_mul_(gradients, factor)
        if is_finite is not None:
            for gradient in gradients:
                gradient.masked_fill_(~is_finite, 0)

    def _state_on_device(self, fp32: Params) -> AbstractContextManager[None]:
        if self._offloaded_state is None:
            return nullcontext()
        return self._offloaded_state.on_device(fp32)

    # ---------------------------------------------------------------------- master weights

    def _low_precision_params(self, params: Params) -> list[nn.Parameter]:
        """Return those that are stepped by way of float32 master weights."""
        return [parameter for parameter in params if self._fp32[parameter] is not parameter]

    def _load_master_weights(self, bucket: Params) -> Tensor:
        """Give the float32 parameters of a bucket their weights, and return these, [numel]."""
        flat, views = _flat(bucket)
        torch._foreach_copy_(views, list(bucket))
        for parameter, view in zip(bucket, views, strict=True):
            if parameter in self._compensation:
                view += self._compensation[parameter]
            self._fp32[parameter].data = view
        return flat

    def _load_gradients(self, bucket: Params) -> None:
        """Move the gradients of a bucket to its float32 parameters."""
        _, views = _flat(bucket)
        torch._foreach_copy_(views, _gradients(bucket))
        for parameter, view in zip(bucket, views, strict=True):
            self._fp32[parameter].grad = view
            parameter.grad = None

    def _store_rounded(self, bucket: Params, master_weights: Tensor, step: int) -> None:
        """Round the updated float32 master weights back to 16 bits, and free them."""
        self._free(bucket)
        dtype = bucket[0].dtype
        if self._rounding == "kahan":
            rounded, compensation = compensate(master_weights, dtype)
            for parameter, view in zip(bucket, _views(compensation, bucket), strict=True):
                self._compensation.setdefault(parameter, torch.empty_like(parameter)).copy_(view)
        elif self._rounding == "stochastic":
            seed = seed_of(self._seed, "rounding", step, self._names[bucket[0]])
            generator = torch.Generator(master_weights.device).manual_seed(seed)
            rounded = round_stochastically(master_weights, generator)
        else:
            rounded = master_weights.to(dtype)
        torch._foreach_copy_(list(bucket), _views(rounded, bucket))

    def _free(self, bucket: Params) -> None:
        """Free the memory of the master weights and their gradients."""
        for parameter in bucket:
            fp32 = self._fp32[parameter]
            fp32.grad, fp32.data = None, self._without_memory[parameter]

    def _buckets_by_group(self, params: Params) -> Iterator[list[nn.Parameter]]:
        for i in range(len(self.base_optimizer.param_groups)):
            yield from _buckets(
                [parameter for parameter in params if self._group_of[parameter] == i]
            )

    # ---------------------------------------------------------------------- evaluation and saved states

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """Context manager: parameters have the weights that a schedule-free optimizer evaluates.

        Switching there and back rounds, so the trained ones are kept: a run that saves often ends
        as one that doesn't.
        """
        if not is_schedule_free(self.base_optimizer):
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self._switch(self.base_optimizer.eval)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._switch(self.base_optimizer.train)  # type: ignore[attr-defined]
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), trained)

    @torch.no_grad()
    def _switch(self, mode: Callable[[], object]) -> None:
        """Put the optimizer into a mode by way of float32, and round the weights to nearest."""
        if not self._low_precision_params(self.parameters):
            mode()
            return
        for bucket in self._buckets_by_group(self.parameters):
            with self._only(bucket):
                low_precision = _buckets(self._low_precision_params(bucket))
                master_weights = [self._load_master_weights(params) for params in low_precision]
                mode()
                for params, weights in zip(low_precision, master_weights, strict=True):
                    self._free(params)
                    torch._foreach_copy_(list(params), _views(weights, params))
        self.commit()

    def state(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Return the optimizer's state, and the compensation of Kahan's rounding.

        Args:
            names: of the parameters, by their id.
        """
        if self._offloaded_state is not None:
            self._offloaded_state.wait()
        compensation = {
            names[id(parameter)]: tensor for parameter, tensor in self._compensation.items()
        }
        return {
            **optimizer_state(self.base_optimizer, self._with_fp32(names)),
            _COMPENSATION: compensation,
        }

    def restore(
        self, state: Mapping[str, Any], names: Mapping[int, str], *, same_options: bool
    ) -> None:
        """Restore what state() returned."""
        restore_optimizer(
            self.base_optimizer, state, self._with_fp32(names), same_options=same_options
        )
        if self._offloaded_state is None:
            self._state_to_compute_device()
        if self._rounding != "kahan":
            return
        saved = state.get(_COMPENSATION, {})
        self._compensation = {}
        for parameter in self._low_precision_params(self.parameters):
            name = names[id(parameter)]
            if name in saved:
                self._compensation[parameter] = torch.empty_like(parameter).copy_(saved[name])

    def _state_to_compute_device(self) -> None:
        """Move the restored state of parameters in RAM to the device that steps them."""
        for parameter in self.parameters:
            if parameter.device == self.device:
                continue
            state = self.base_optimizer.state.get(self._fp32[parameter], {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(self.device)

    def _with_fp32(self, names: Mapping[int, str]) -> dict[int, str]:
        """Return the names with those of the float32 parameters, which are the same."""
        all_names = dict(names)
        for parameter, fp32 in self._fp32.items():
            if id(parameter) in names:
                all_names[id(fp32)] = names[id(parameter)]
        return all_names


_COMPENSATION = "rests"  # key of saved states


def _gradients(params: Params) -> list[Tensor]:
    return [parameter.grad for parameter in params if parameter.grad is not None]


def _buckets(params: Params) -> list[list[nn.Parameter]]:
    """Return neighbors of one dtype and device, up to FP32_BUCKET_NUMEL at a time."""
    buckets: list[list[nn.Parameter]] = []
    room, kind = 0, None
    for parameter in params:
        if parameter.numel() > room or kind != (parameter.dtype, parameter.device):
            buckets.append([])
            room, kind = FP32_BUCKET_NUMEL, (parameter.dtype, parameter.device)
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


def _flat(params: Params) -> tuple[Tensor, list[Tensor]]:
    """Return new float32 memory for all of them, [numel], and a view of it in the shape of each."""
    flat = torch.empty(sum(parameter.numel() for parameter in params), device=params[0].device)
    return flat, _views(flat, params)


def _views(flat: Tensor, params: Params) -> list[Tensor]:
    if len(params) == 1:  # most large ones are stepped alone, and split takes its time
        return [flat.view(params[0].shape)]
    pieces = flat.split([parameter.numel() for parameter in params])
    return [piece.view(parameter.shape) for piece, parameter in zip(pieces, params, strict=True)]


def is_separable(make: Callable[[list[ParamGroup]], torch.optim.Optimizer]) -> bool:
    """Return whether an optimizer may step parameters one by one, with the same result.

    It is tried on two small ones. Optimizers that find their learning rate from all gradients
    don't.

    Args:
        make: makes the optimizer over groups.
    """
    with silence_logging():
        alone, together = (
            _weights_after_steps(make, alone=True),
            _weights_after_steps(make, alone=False),
        )
    return torch.allclose(alone, together, rtol=1e-4, atol=0)


def _weights_after_steps(
    make: Callable[[list[ParamGroup]], torch.optim.Optimizer], *, alone: bool
) -> Tensor:
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    group = ParamGroup("all", dict(zip("ab", params, strict=True)), 1.0)
    optimizer, generator = (
        MasterWeightOptimizer(make([group]), [group]),
        torch.Generator().manual_seed(0),
    )
    start_training(optimizer.base_optimizer)
    buckets = [[parameter] for parameter in params] if alone else [params]
    for step in range(4):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for bucket in buckets:
            optimizer.step_params(bucket, step, torch.ones(()))
        optimizer.commit()
    return torch.cat([parameter.detach().flatten() for parameter in params])
