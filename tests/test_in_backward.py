"""The optimizer in backward: it gives the same weights, and no gradient stays."""

import pytest
import torch
from torch import nn

from library.data.batch_sampler import BatchPosition
from library.param_group import ParamGroup, split_groups
from library.training.optim.backward_step import OptimizerInBackward, param_buckets
from library.training.optim.lr_schedules import make_scheduler
from library.training.optim.master_weights import MasterWeightOptimizer, fp32_params, is_separable
from library.training.optim.optimizer_step import GradientStep, OptimizerStep, StandardStep
from library.training.optim.optimizers import make_optimizer, start_training
from library.training.options.optimizer import ScheduleOptions

pytestmark = pytest.mark.numeric

X = torch.randn(6, 80, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "AdamW": {},
    "AdamW8bit": {},
    "Lion": {},
    "Adafactor": {"relative_step": False},
    "pytorch_optimizer.CAME": {},
    "AdamWScheduleFree": {"warmup_steps": 3},
    "SGDNesterov": {},
    "RAdamScheduleFree": {},
}


class Small(nn.Module):
    """Layers of which one is used twice, one in none but the first batch, and one is large enough for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                "first": nn.Linear(80, 80),
                "twice": nn.Linear(80, 80),
                "rare": nn.Linear(80, 80),
                "last": nn.Linear(80, 1),
            }
        )

    def forward(self, x: torch.Tensor, rarely: bool) -> torch.Tensor:
        x = self.layers["twice"](self.layers["first"](x).tanh()).tanh()
        x = self.layers["twice"](x).tanh()
        return self.layers["last"](self.layers["rare"](x).tanh() if rarely else x)[:, 0] ** 2


def groups_of(model: nn.Module) -> list[ParamGroup]:
    named = dict(model.named_parameters())
    first = {name: named.pop(name) for name in list(named) if "first" in name}
    return [ParamGroup("a", first, 0.01), ParamGroup("b", named, 0.02)]


def make(
    name: str,
    *,
    fused: bool,
    dtype=torch.float32,
    max_grad_norm=0.0,
    clips_by_previous=False,
    cut=0,
    **rounding,
) -> OptimizerStep:
    model = Small().to(dtype)
    groups = split_groups(groups_of(model), cut) if cut else groups_of(model)
    optimizer = make_optimizer(name, OPTIMIZERS[name], fp32_params(groups), 0.01)
    start_training(optimizer)
    scheduler = (
        None
        if "ScheduleFree" in name
        else make_scheduler(optimizer, ScheduleOptions(lr_scheduler="linear"), 10, 0.01)
    )
    master = MasterWeightOptimizer(optimizer, groups, **rounding)
    buckets = (
        [list(group.parameters.values()) for group in groups]
        if cut
        else [[p] for p in master.parameters]
    )
    gradient_step: GradientStep = StandardStep(
        master, max_grad_norm=max_grad_norm, scales_loss=False
    )
    if fused:
        gradient_step = OptimizerInBackward(
            master, buckets, max_grad_norm=max_grad_norm, clips_by_previous=clips_by_previous
        )
    return OptimizerStep(model, groups, gradient_step, scheduler)


def train(update: OptimizerStep, steps: int, first: int = 0) -> list[torch.Tensor]:
    """Train up to step `steps`, by two micro-batches of 2 and 4 images each. Returns the norms."""
    norms, dtype = [], next(update.loss_module.parameters()).dtype
    for step in range(first, steps):
        for i, part in enumerate(X.to(dtype).split([2, 4])):
            place = BatchPosition(0, step, 2 * step + i, 6 * step + 2 * i, 6, i == 1, False)
            losses = update.loss_module(part, rarely=i == 0)
            update.backward(losses.float(), place)
        norms.append(update.step().grad_norm)
        assert all(parameter.grad is None for parameter in update.loss_module.parameters())
    return norms


def numbers(update: OptimizerStep) -> torch.Tensor:
    with update.eval_weights():
        return torch.cat(
            [parameter.detach().flatten() for parameter in update.loss_module.parameters()]
        ).clone()


@pytest.mark.parametrize("cut", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_in_backward_gives_the_same_weights(name, cut):
    """float32, no clipping, windows of two batches; a parameter without a gradient in the closing one; within 1e-6."""
    plain, fused = make(name, fused=False), make(name, fused=True, cut=cut)
    norms = train(plain, 6), train(fused, 6)
    torch.testing.assert_close(torch.stack(norms[0]), torch.stack(norms[1]))
    torch.testing.assert_close(numbers(plain), numbers(fused), rtol=0, atol=1e-6)
    assert plain.learning_rates() == fused.learning_rates()
    assert not torch.allclose(
        numbers(plain), numbers(make(name, fused=False)), rtol=0, atol=1e-3
    ), "nothing moved"


def test_each_gradient_is_freed_before_the_next_one_comes():
    update, alive = make("AdamW", fused=True), []
    for parameter in update.loss_module.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in update.loss_module.parameters()))
        )
    update.backward(update.loss_module(X, rarely=True), BatchPosition(0, 0, 0, 0, 6, True, False))
    assert alive == [0] * 8 and update.is_partly_taken
    update.step()
    assert not update.is_partly_taken


@pytest.mark.parametrize("name", ["SGDNesterov", "Adafactor"])
@pytest.mark.parametrize("by_previous", [False, True])
def test_tensors_are_clipped_by_their_own_norm_or_by_that_of_the_step_before(name, by_previous):
    """By hand: the first step has no norm before it."""
    update, twin = (
        make(name, fused=fused, max_grad_norm=0.05, clips_by_previous=by_previous)
        for fused in (True, False)
    )
    train(update, 3)
    step_by_hand(twin, by_previous, 0.05)
    torch.testing.assert_close(numbers(update), numbers(twin), rtol=0, atol=1e-6)


def step_by_hand(update: OptimizerStep, by_previous: bool, most: float) -> None:
    previous = None
    for _ in range(3):
        for i, part in enumerate(X.split([2, 4])):
            (update.loss_module(part, rarely=i == 0).sum() / 6).backward()
        parameters = list(update.loss_module.parameters())
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item()
        for parameter in parameters:
            if by_previous and previous is not None:
                parameter.grad *= min(1.0, most / (previous + 1e-6))
            else:
                nn.utils.clip_grad_norm_([parameter], most)
        previous = norm
        update.optimizer.step()
        update.optimizer.zero_grad()
        update.skip(1)


@pytest.mark.parametrize("name", ["Lion", "SGDNesterov"])
@pytest.mark.parametrize("clipping", [{}, {"max_grad_norm": 0.05, "clips_by_previous": True}])
def test_a_gradient_that_is_not_finite_makes_no_weight_so(name, clipping):
    """Nor does the next step, though it is clipped by this one's norm."""
    update = make(name, fused=True, **clipping)
    bad = X.clone()
    bad[0, 0] = float("nan")
    update.backward(update.loss_module(bad, rarely=True), BatchPosition(0, 0, 0, 0, 6, True, False))
    assert not update.step().grad_norm.isfinite()
    train(update, 1)
    assert all(parameter.isfinite().all() for parameter in update.loss_module.parameters())


class Parts:
    """A fake of Shards: layer "first" is sharded, the others are replicated, and wait for the end of backward."""

    def __init__(self, model: Small):
        self.cut = dict(model.layers["first"].named_parameters())
        self.whole_ones = {
            parameter: nn.Parameter(torch.zeros(2, *parameter.shape))
            for parameter in self.cut.values()
        }

    def source(self, parameter):
        return self.whole_ones.get(parameter)


def test_stopped_parameters_stay_unchanged_while_they_wait_for_their_average():
    model = Small()
    groups = groups_of(model)
    master = MasterWeightOptimizer(make_optimizer("SGD", {}, fp32_params(groups), 0.01), groups)
    shards = Parts(model)
    shards.norms, shards.store_shard = lambda norms, _: norms, lambda _: None
    gradient_step = OptimizerInBackward(
        master, param_buckets(groups), max_grad_norm=0.0, clips_by_previous=False, shards=shards
    )
    stopped, goes_on = model.layers["last"].bias, model.layers["last"].weight
    before = stopped.detach().clone(), goes_on.detach().clone()
    gradient_step.begin(BatchPosition(0, 0, 0, 0, 6, True, False), {stopped})
    for parameter in (stopped, goes_on):
        parameter.grad = torch.ones_like(parameter)
    gradient_step.finish()
    assert (
        torch.equal(stopped, before[0])
        and not torch.equal(goes_on, before[1])
        and stopped.grad is None
    )


def test_ranks_agree_which_tensors_step_together(monkeypatch):
    """A shard may be small on one rank and large on another: the full tensor counts."""
    from library import param_group

    monkeypatch.setattr(param_group, "SMALL", 10_000)
    model = Small()
    assert [len(bucket) for bucket in param_buckets(groups_of(model))] == [2, 6]
    assert [len(bucket) for bucket in param_buckets(groups_of(model), Parts(model))] == [1, 1, 6]


@pytest.mark.parametrize(
    "name, expected",
    [
        *((name, True) for name in OPTIMIZERS),
        ("Prodigy", False),
        ("pytorch_optimizer.DAdaptAdam", False),
    ],
)
def test_optimizers_that_look_at_all_gradients_are_recognized(name, expected):
    assert (
        is_separable(lambda groups: make_optimizer(name, OPTIMIZERS.get(name, {}), groups, 1.0))
        is expected
    )


def test_large_tensors_step_one_by_one_and_small_ones_of_a_group_together(monkeypatch):
    from library import param_group

    monkeypatch.setattr(param_group, "SMALL", 81)
    groups = groups_of(Small())
    sizes = [sorted(parameter.numel() for parameter in bucket) for bucket in param_buckets(groups)]
    assert sizes == [[6400], [80], [6400], [6400], [1, 80, 80, 80]]


def test_groups_are_split_by_count_and_rate():
    """Contract: tensors in order, ceil(total / N) each, and a new one where the rate changes: 2 at 0.01 and 6 at 0.02."""
    cut = split_groups(groups_of(Small()), 3)
    assert [(group.lr, len(group.parameters)) for group in cut] == [(0.01, 2), (0.02, 3), (0.02, 3)]
