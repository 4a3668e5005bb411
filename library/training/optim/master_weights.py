"""Stepper: how an optimizer changes weights: all together or some alone, and in float32 where they have fewer bits.

The optimizer of 16-bit weights is made over float32 stand-ins, which hold numbers only while they are stepped. So its state is what
it would be for float32 weights (AdamW: 8 bytes a number), and what it makes of them is rounded back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.log import silence_logging
from library.param_group import ParamGroup
from library.rng import seed_of
from library.training.optim.optimizer_state import optimizer_state, restore_optimizer
from library.training.optim.optimizers import start_training, takes_scaled_gradients
from library.training.optim.rounding import compensate, round_stochastically
from library.training.optim.state_offload import OffloadedOptimizerState

AT_ONCE = 1 << 24  # numbers that are in float32 at once: 64 MB of weights, and as much of gradients


def fp32_params(groups: Sequence[ParamGroup]) -> list[ParamGroup]:
    """The groups as an optimizer is to see them: 16-bit parameters are float32 ones, which take no memory."""
    return [replace(group, parameters={n: _fp32_param(p) for n, p in group.parameters.items()}) for group in groups]


def _fp32_param(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype is torch.float32:
        return parameter
    return nn.Parameter(torch.zeros((), device=parameter.device).expand(parameter.shape))


class MasterWeightOptimizer:
    """Steps parameters by an optimizer, wherever they lie at that time.

    Attributes:
        lodging: where the optimizer's state is between steps; None: beside the weights.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[ParamGroup],
        *,
        rounding: str = "nearest",
        seed: int = 0,
        is_separable: bool = True,
        device: torch.device | None = None,
    ):
        """Args:
        optimizer: made over stand_ins(groups).
        rounding: of 16-bit weights: "stochastic", "kahan" or "nearest".
        seed: of stochastic rounding.
        is_separable: whether the optimizer may step parameters alone.
        device: the one that computes; None: that of the parameters that don't lie in RAM.
        """
        self.optimizer = optimizer
        self._rounding, self._seed, self._is_separable = rounding, seed, is_separable
        self._device = device
        self.lodging: OffloadedOptimizerState | None = None
        self._names: dict[nn.Parameter, str] = {}
        self._group_of: dict[nn.Parameter, int] = {}
        self._stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        for number, (group, made) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
            for (name, parameter), own in zip(group.parameters.items(), made["params"], strict=True):
                self._names[parameter], self._group_of[parameter] = name, number
                self._stand_ins[parameter] = own
        self.parameters = list(self._names)
        self._idle = {parameter: own.data for parameter, own in self._stand_ins.items()}
        self._compensation: dict[nn.Parameter, Tensor] = {}
        self._changed: dict[int, dict[str, Any]] = {}
        self.skips_on_device = takes_scaled_gradients(optimizer)

    @property
    def device(self) -> torch.device:
        """The one that computes; some parameters may lie in RAM."""
        if self._device is not None:
            return self._device
        devices = [parameter.device for parameter in self.parameters]
        return next((device for device in devices if device.type != "cpu"), devices[0])

    # ------------------------------------------------------------------------------------------------------- stepping

    def step_all(self, number: int, factor: Tensor, is_finite: Tensor | None = None) -> None:
        """Step everything that has a gradient. Args: as of step."""
        members = [parameter for parameter in self.parameters if parameter.grad is not None]
        if (not self._low_precision_params(members) and self.lodging is None) or not self._is_separable:
            self._step(members, number, factor, is_finite)
            return
        for param_bucket in self._bunches_by_group(members):
            self.step(param_bucket, number, factor, is_finite)
        self.commit()

    def step(
        self, members: Sequence[nn.Parameter], number: int, factor: Tensor, is_finite: Tensor | None = None
    ) -> None:
        """Step parameters of one group alone. What the optimizer counts by group goes on with commit() only.

        Args:
            members: with gradients, which may be changed, and are gone behind it where parameters have 16 bits.
            number: optimizer steps done before this one.
            factor: of the gradients, [], or of each, [members]; float32.
            is_finite: whether the gradients are; []; None: they are. If not, weights stay as they are where the optimizer
                sees to that on the device (`skips_on_device`), and are stepped with gradients of 0 where it doesn't.
        """
        with self._alone(members):
            self._step(members, number, factor, is_finite)

    def commit(self) -> None:
        """All that has a gradient was stepped: what the optimizer keeps by group goes on."""
        for group, values in self._changed.items():
            self.optimizer.param_groups[group].update(values)
        self._changed.clear()

    @torch.no_grad()
    def _step(self, members: Sequence[nn.Parameter], number: int, factor: Tensor, is_finite: Tensor | None) -> None:
        narrow = _bunches(self._low_precision_params(members))
        weights = [self._load_master_weights(param_bucket) for param_bucket in narrow]
        for param_bucket in narrow:
            self._lend_gradients(param_bucket)
        gradients = _gradients([self._stand_ins[parameter] for parameter in members])
        if factor.ndim:
            torch._foreach_mul_(gradients, list(factor))
            factor = factor.new_ones(())
        if self.skips_on_device:  # its kernel divides by grad_scale and heeds found_inf: the host needn't wait
            self.optimizer.grad_scale = 1 / factor  # type: ignore[attr-defined]
            self.optimizer.found_inf = None if is_finite is None else (~is_finite).float()  # type: ignore[attr-defined]
        else:
            torch._foreach_mul_(gradients, factor)
            if is_finite is not None:
                for gradient in gradients:
                    gradient.masked_fill_(~is_finite, 0)
        with nullcontext() if self.lodging is None else self.lodging.visit([self._stand_ins[p] for p in members]):
            self.optimizer.step()
        del gradients
        for param_bucket, flat in zip(narrow, weights, strict=True):
            self._store_rounded(param_bucket, flat, number)

    def _low_precision_params(self, members: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Those that are stepped in float32 through stand-ins."""
        return [parameter for parameter in members if self._stand_ins[parameter] is not parameter]

    def _load_master_weights(self, param_bucket: Sequence[nn.Parameter]) -> Tensor:
        """Give stand-ins their weights in float32. Returns the memory behind all of them: [numbers]."""
        flat, views = _flat(param_bucket)
        torch._foreach_copy_(views, list(param_bucket))
        for parameter, view in zip(param_bucket, views, strict=True):
            if parameter in self._compensation:
                view += self._compensation[parameter]
            self._stand_ins[parameter].data = view
        return flat

    def _lend_gradients(self, param_bucket: Sequence[nn.Parameter]) -> None:
        _, views = _flat(param_bucket)
        torch._foreach_copy_(views, _gradients(param_bucket))
        for parameter, view in zip(param_bucket, views, strict=True):
            self._stand_ins[parameter].grad, parameter.grad = view, None

    def _store_rounded(self, param_bucket: Sequence[nn.Parameter], flat: Tensor, number: int) -> None:
        """Round what the optimizer made of the weights."""
        self._put_away(param_bucket)
        if self._rounding == "kahan":
            rounded, rests = compensate(flat, param_bucket[0].dtype)
            for parameter, rest in zip(param_bucket, _views(rests, param_bucket), strict=True):
                self._compensation.setdefault(parameter, torch.empty_like(parameter)).copy_(rest)
        elif self._rounding == "stochastic":
            draw = torch.Generator(flat.device).manual_seed(
                seed_of(self._seed, "rounding", number, self._names[param_bucket[0]])
            )
            rounded = round_stochastically(flat, draw)
        else:
            rounded = flat.to(param_bucket[0].dtype)
        torch._foreach_copy_(list(param_bucket), _views(rounded, param_bucket))

    def _put_away(self, param_bucket: Sequence[nn.Parameter]) -> None:
        """Leave the stand-ins without memory."""
        for parameter in param_bucket:
            own = self._stand_ins[parameter]
            own.grad, own.data = None, self._idle[parameter]

    def _bunches_by_group(self, members: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        for group in range(len(self.optimizer.param_groups)):
            yield from _bunches([parameter for parameter in members if self._group_of[parameter] == group])

    @contextmanager
    def _alone(self, members: Sequence[nn.Parameter]) -> Iterator[None]:
        """The optimizer has these parameters, of one group, alone, and sees the group as it was before any was stepped."""
        groups, number = self.optimizer.param_groups, self._group_of[members[0]]
        own = {**groups[number], "params": [self._stand_ins[parameter] for parameter in members]}
        self.optimizer.param_groups = [own]
        try:
            yield
        finally:
            self.optimizer.param_groups = groups
            self._changed[number] = {key: value for key, value in own.items() if key != "params"}

    # --------------------------------------------------------------------------------------------------- use and states

    @contextmanager
    def eval_weights(self) -> Iterator[None]:
        """Schedule-free parameters are other ones when they are used than when they are trained: meanwhile the former.

        Switching there and back rounds, so the trained ones are kept: a run that saves often ends as one that doesn't.
        """
        if not callable(getattr(self.optimizer, "eval", None)):
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._switch(self.optimizer.eval)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._switch(self.optimizer.train)  # type: ignore[attr-defined]
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters), kept)

    @torch.no_grad()
    def _switch(self, mode: Callable[[], object]) -> None:
        """Put the optimizer into the mode, in float32 too, and round to nearest what becomes of the weights."""
        if not self._low_precision_params(self.parameters):
            mode()
            return
        for param_bucket in self._bunches_by_group(self.parameters):
            with self._alone(param_bucket):
                narrow = self._low_precision_params(param_bucket)
                weights = [(some, self._load_master_weights(some)) for some in _bunches(narrow)]
                mode()
                for some, flat in weights:
                    self._put_away(some)
                    torch._foreach_copy_(list(some), _views(flat, some))
        self.commit()

    def state(self, names: Mapping[int, str]) -> dict[str, Any]:
        """The optimizer's state, and what Kahan's rounding keeps. Args: names: of the parameters, by their id."""
        if self.lodging is not None:
            self.lodging.wait()
        return {
            **optimizer_state(self.optimizer, self._with_stand_ins(names)),
            "rests": {names[id(parameter)]: rest for parameter, rest in self._compensation.items()},
        }

    def restore(self, state: Mapping[str, Any], names: Mapping[int, str], *, same_options: bool) -> None:
        """Go on with what state() gave."""
        restore_optimizer(self.optimizer, state, self._with_stand_ins(names), same_options=same_options)
        if self.lodging is None:
            self._state_of_visitors_to_device()
        saved = state.get("rests", {})
        if self._rounding == "kahan":
            self._compensation = {
                parameter: torch.empty_like(parameter).copy_(saved[name])
                for parameter, name in ((p, names[id(p)]) for p in self._low_precision_params(self.parameters))
                if name in saved
            }

    def _state_of_visitors_to_device(self) -> None:
        """State is restored beside its weights; of those that lie in RAM and only visit the device, it stays on that."""
        for parameter in self.parameters:
            state = self.optimizer.state.get(self._stand_ins[parameter], {})
            if parameter.device != self.device:
                state.update({k: v.to(self.device) for k, v in state.items() if isinstance(v, Tensor)})

    def _with_stand_ins(self, names: Mapping[int, str]) -> dict[int, str]:
        return {
            **names,
            **{id(own): names[id(parameter)] for parameter, own in self._stand_ins.items() if id(parameter) in names},
        }


def _gradients(members: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in members if parameter.grad is not None]


def _bunches(members: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours that are stepped together: as many as fit into the memory that is lent at once, of one dtype and device."""
    buckets_of_params: list[list[nn.Parameter]] = []
    room, kind = 0, None
    for parameter in members:
        own = (parameter.dtype, parameter.device)
        if parameter.numel() > room or own != kind:
            buckets_of_params.append([])
            room, kind = AT_ONCE, own
        buckets_of_params[-1].append(parameter)
        room -= parameter.numel()
    return buckets_of_params


def _flat(members: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """New float32 memory for all of them: as a whole, [numbers], and the part of each, in its shape."""
    flat = torch.empty(sum(parameter.numel() for parameter in members), device=members[0].device)
    return flat, _views(flat, members)


def _views(flat: Tensor, members: Sequence[nn.Parameter]) -> list[Tensor]:
    if len(members) == 1:  # most large ones are stepped alone, and split takes its time
        return [flat.view(members[0].shape)]
    parts = flat.split([parameter.numel() for parameter in members])
    return [part.view(parameter.shape) for part, parameter in zip(parts, members, strict=True)]


def is_separable(make: Callable[[list[ParamGroup]], torch.optim.Optimizer]) -> bool:
    """Whether an optimizer that steps parameters alone ends where it does if it steps them together; tried on two small ones.

    Those that find their own learning rate from all gradients don't. Args: make: the optimizer over groups.
    """

    def after_steps(*, alone: bool) -> Tensor:
        members = {"a": nn.Parameter(torch.zeros(4, 3)), "b": nn.Parameter(torch.zeros(5))}
        group = ParamGroup("all", members, 1.0)
        stepper, draw = MasterWeightOptimizer(make([group]), [group]), torch.Generator().manual_seed(0)
        start_training(stepper.optimizer)
        for number in range(4):
            for parameter in members.values():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            for some in [[parameter] for parameter in members.values()] if alone else [list(members.values())]:
                stepper.step(some, number, torch.ones(()))
            stepper.commit()
        return torch.cat([parameter.detach().flatten() for parameter in members.values()])

    with silence_logging():
        return torch.allclose(after_steps(alone=True), after_steps(alone=False), rtol=1e-4, atol=0)
