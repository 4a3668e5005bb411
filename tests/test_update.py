"""OptimizerStep: gradient accumulation, clipping, NaN and Inf."""

import pytest
import torch
from messages import mentioning
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.data.batch_sampler import BatchPosition
from library.errors import RunError
from library.param_group import ParamGroup
from library.training.optim.backward_step import OptimizerInBackward, param_buckets
from library.training.optim.lr_schedules import make_scheduler
from library.training.optim.master_weights import MasterWeightOptimizer
from library.training.optim.optimizer_step import OptimizerStep, StandardStep
from library.training.optim.optimizers import make_optimizer
from library.training.options.optimizer import ScheduleOptions

pytestmark = pytest.mark.numeric


def make(
    optimizer="AdamW", max_grad_norm=1.0, scales_loss=False, lr=0.1, **arguments
) -> tuple[nn.Linear, OptimizerStep]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    groups = [ParamGroup("all", dict(layer.named_parameters()), lr)]
    made = make_optimizer(optimizer, arguments, groups, lr)
    schedule = make_scheduler(made, ScheduleOptions(), 10, lr)
    gradient_step = StandardStep(
        MasterWeightOptimizer(made, groups), max_grad_norm=max_grad_norm, scales_loss=scales_loss
    )
    return layer, OptimizerStep(layer, groups, gradient_step, schedule)


def scale_of(update: OptimizerStep) -> float:
    names = {id(parameter): name for name, parameter in update.loss_module.named_parameters()}
    return update.state(names)["descent"]["scale"]["value"]


def place(samples: int, *, closes: bool = True) -> BatchPosition:
    return BatchPosition(0, 0, 0, 0, samples, closes, False)


def losses(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return layer(x)[:, 0] ** 2


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def weights(layer: nn.Linear) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in layer.parameters()]).clone()


@pytest.mark.parametrize("cut", [[5], [2, 3], [4, 1], [1] * 5])
def test_every_image_of_a_step_counts_the_same_in_any_micro_batches(cut):
    layer, update = make()
    for i, part in enumerate(X.split(cut)):
        update.backward(losses(layer, part), place(5, closes=i == len(cut) - 1))
    expected, _ = make()
    whole = losses(expected, X).mean()
    whole.backward()
    torch.testing.assert_close(layer.weight.grad, expected.weight.grad)
    updated = update.step()
    torch.testing.assert_close(updated.loss, whole.detach())
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm()
    torch.testing.assert_close(updated.grad_norm, norm)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "lion_pytorch.Lion", "Adafactor"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_over_all_parameters_as_torch_does(optimizer, max_grad_norm):
    arguments = (
        {"relative_step": False, "scale_parameter": False} if optimizer == "Adafactor" else {}
    )
    layer, update = make(optimizer, max_grad_norm, **arguments)
    update.backward(losses(layer, X), place(5))
    update.step()
    twin, reference = make(optimizer, max_grad_norm, **arguments)
    losses(twin, X).mean().backward()
    if max_grad_norm:
        nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
    reference.optimizer.step()
    torch.testing.assert_close(weights(layer), weights(twin))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "lion_pytorch.Lion"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_fault_60_a_gradient_that_isnt_finite_changes_no_weight(optimizer, poison):
    layer, update = make(optimizer)
    before = weights(layer)
    bad = X.clone()
    bad[2, 1] = poison
    update.backward(losses(layer, bad), place(5))
    updated = update.step()
    assert not updated.grad_norm.isfinite() and not updated.loss.isfinite()
    assert torch.equal(weights(layer), before)
    update.backward(losses(layer, X), place(5))  # and the next step is as if it hadn't been
    assert (
        update.step().loss.isfinite()
        and weights(layer).isfinite().all()
        and not torch.equal(weights(layer), before)
    )


def test_float16_overflow_is_left_out_and_counted_and_the_scale_falls():
    layer, update = make(scales_loss=True)
    before, scale = weights(layer), update.gradient_step.scale.value
    bad = X.clone()
    bad[0, 0] = float("inf")
    update.backward(losses(layer, bad), place(5))
    assert update.step().overflowed and update.gradient_step.scale.value < scale
    assert torch.equal(weights(layer), before)
    update.backward(losses(layer, X), place(5))
    updated = update.step()
    torch.testing.assert_close(updated.grad_norm, _unscaled_norm())
    assert not updated.overflowed and not torch.equal(weights(layer), before)


def _unscaled_norm() -> torch.Tensor:
    twin, _ = make()
    losses(twin, X).mean().backward()
    return torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()


def test_float16_that_overflows_at_every_scale_stops_the_run():
    layer, update = make(scales_loss=True)
    with pytest.raises(
        RunError, match=mentioning("float16", "20 steps", "--mixed_precision", "bf16")
    ):
        for _ in range(25):
            update.backward(losses(layer, X * float("inf")), place(5))
            update.step()


@pytest.mark.parametrize("fused", [False, True])
def test_stopped_groups_are_frozen_before_a_checkpointed_forward(fused):
    layer, _ = make()
    groups = [ParamGroup("stops", {"weight": layer.weight}, 0.1, last_step=1), ParamGroup("lasts", {"bias": layer.bias}, 0.1)]  # fmt: skip
    optimizer = MasterWeightOptimizer(make_optimizer("SGD", {}, groups, 0.1), groups)
    gradient_step = StandardStep(optimizer, max_grad_norm=0, scales_loss=False)
    if fused:
        gradient_step = OptimizerInBackward(
            optimizer, param_buckets(groups), max_grad_norm=0, clips_by_previous=False
        )
    update, before = OptimizerStep(layer, groups, gradient_step, None), []
    for step in range(2):
        before.append((layer.weight.detach().clone(), layer.bias.detach().clone()))
        with update.accumulation(here := place(5)._replace(step=step)):
            update.backward(checkpoint(losses, layer, X, use_reentrant=False), here)
        update.step()
    assert not torch.equal(before[0][0], before[1][0]) and torch.equal(layer.weight, before[1][0])
    assert not torch.equal(layer.bias, before[1][1])


def test_gradients_are_cleared_after_a_step_and_the_schedule_advances():
    layer, _ = make()
    groups = [ParamGroup("all", dict(layer.named_parameters()), 0.1)]
    optimizer = make_optimizer("AdamW", {}, groups, 0.1)
    schedule = make_scheduler(optimizer, ScheduleOptions(lr_scheduler="linear"), 4, 0.1)
    update = OptimizerStep(
        layer,
        groups,
        StandardStep(MasterWeightOptimizer(optimizer, groups), max_grad_norm=1, scales_loss=False),
        schedule,
    )
    rates = []
    for _ in range(4):
        rates.append(update.learning_rates()["all"])
        update.backward(losses(layer, X), place(5))
        update.step()
        assert all(p.grad is None for p in layer.parameters())
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
