"""Weights of 16 bits: what each rounding keeps of small steps, and sums of gradients."""

from pathlib import Path

import pytest
import torch
from replay import Golden
from states import state_metadata
from test_in_backward import OPTIMIZERS, X, groups_of, make, numbers, train
from torch import nn

from library.data.batch_sampler import BatchPosition
from library.device import Precision
from library.models.checkpoint.reader import open_checkpoint
from library.models.noise_schedule import NoiseSchedule
from library.models.sdxl import SdxlModels
from library.param_group import ParamGroup
from library.training.forward import DiffusionLoss
from library.training.objective.prediction import Objective
from library.training.optim.master_weights import MasterWeightOptimizer, fp32_params
from library.training.optim.optimizer_step import OptimizerStep, StandardStep
from library.training.optim.optimizers import make_optimizer, start_training
from library.training.optim.rounding import StochasticSums, compensate, round_stochastically
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.tasks import FineTuneOptions
from library.training.saving.state import State, read_state, write_state
from library.training.tasks.base import TaskSettings
from library.training.tasks.fine_tune import FineTune

pytestmark = pytest.mark.numeric

BF16 = torch.bfloat16


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stochastic_rounding_goes_to_a_neighbour_and_on_average_to_the_value():
    """1 + 0.3 of the last bit becomes the upper neighbour in 30 % of cases, whatever the sign."""
    last = 2.0**-7
    for sign in (1, -1):
        rounded = (
            round_stochastically(torch.full((100_000,), sign * (1 + 0.3 * last)), draw()).float()
            * sign
        )
        assert set(rounded.tolist()) == {1.0, 1.0 + last}
        assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=0.006)


def test_exact_values_infinities_and_nan_are_not_changed():
    exact = torch.randn(1000, generator=draw()).to(BF16)
    assert torch.equal(round_stochastically(exact.float(), draw()), exact)
    odd = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-40])
    assert torch.equal(round_stochastically(odd, draw())[:4], odd[:4].to(BF16))
    all_bits_set = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(
        torch.float32
    )  # the NaN of CUDA
    assert round_stochastically(all_bits_set, draw()).isnan().all()


def test_a_value_and_its_compensation_have_twice_the_bits():
    values = torch.randn(1000, generator=draw())
    for dtype, bits in ((BF16, 16), (torch.float16, 22)):
        nearest, compensation = compensate(values, dtype)
        assert torch.equal(nearest, values.to(dtype))
        assert (
            (nearest.float() + compensation.float() - values).abs()
            <= values.abs() * 2.0**-bits + 1e-7
        ).all()


WEIGHTS = torch.randn(60_000, generator=draw(1)) * 0.02  # as a convolution's of SDXL


def moved(rounding: str, dtype: torch.dtype = BF16, steps: int = 20) -> torch.Tensor:
    """The mean step of weights that AdamW moves down by 1e-6 each time, as a share of that; and where they end."""
    weights = nn.Parameter(WEIGHTS.to(dtype))
    start = weights.detach().float().clone()
    groups = [ParamGroup("all", {"w": weights}, 1e-6)]
    optimizer = make_optimizer("AdamW", {"weight_decay": 0.0}, fp32_params(groups), 1e-6)
    master = MasterWeightOptimizer(optimizer, groups, rounding=rounding)
    for number in range(steps):
        weights.grad = torch.ones_like(weights)
        master.step_all(number, torch.ones(()))
    return ((start - weights.detach().float()).double().mean() / (steps * 1e-6)).item()


def test_at_1e6_nearest_loses_nine_tenths_of_the_update_and_stochastic_keeps_its_mean():
    """The claims of --full_bf16, on weights as large as SDXL's."""
    assert moved("nearest", torch.float32) == pytest.approx(1, abs=1e-3)
    assert moved("nearest") < 0.1
    assert moved("stochastic") == pytest.approx(1, abs=0.02)


def test_kahans_compensation_adds_up_small_steps():
    """A rest of 8 bits is rounded too: of steps of 1e-6 it keeps 93 %."""
    assert moved("kahan", steps=300) == pytest.approx(0.93, abs=0.04)


@pytest.mark.parametrize(
    "rounding, share", [("nearest", (-0.1, 0.2)), ("stochastic", (0.9, 1.2)), ("kahan", (0.9, 1.2))]
)
def test_where_nearest_hardly_learns_the_others_learn_like_float32(rounding, share):
    """The fall of a regression's loss in 300 steps of AdamW at 1e-6, as a share of float32's."""

    def fall(rounding: str, dtype: torch.dtype) -> float:
        layer = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(64, 64, generator=draw(2)) * 0.02)
        wanted = layer.weight.detach().to(dtype).float() + 5e-4 * torch.randn(
            64, 64, generator=draw(3)
        )
        layer.to(dtype)
        inputs = torch.randn(256, 64, generator=draw(4))
        groups = [ParamGroup("all", {"w": layer.weight}, 1e-6)]
        master = MasterWeightOptimizer(
            make_optimizer("AdamW", {"weight_decay": 0.0}, fp32_params(groups), 1e-6),
            groups,
            rounding=rounding,
        )

        def loss() -> torch.Tensor:
            return ((inputs @ (layer.weight.float() - wanted).T) ** 2).mean()

        first = loss().item()
        for number in range(300):
            loss().backward()
            master.step_all(number, torch.ones(()))
            layer.weight.grad = None
        return first - loss().item()

    least, most = share
    whole = fall("nearest", torch.float32)
    assert whole > 0 and least <= fall(rounding, BF16) / whole <= most


def loss_falls(model: Path, rounding: str, *, full: bool) -> float:
    """How much one batch's loss falls in 20 steps of AdamW at 4e-6 on the tiny SDXL's later half. Args: full: in bfloat16, else all in float32."""
    golden, lr, count = Golden("full_blocklr"), 4e-6, 20
    precision = Precision.decide("bf16" if full else "no", None, no_half_vae=True, full=full)
    models = SdxlModels(open_checkpoint(str(model)), precision, torch.device("cpu"))
    models.trained = frozenset(["unet"])
    rates = ",".join(["0"] * 12 + [str(lr)] * 11)
    task = FineTune(
        models,
        TaskSettings(lr=lr, num_tokens=75, text_is_cached=True),
        (FineTuneOptions(block_lr=rates),),
    )
    groups = task.trainables[0].groups()
    with torch.no_grad():
        text = models.encode_texts(golden.facts["batches"][0]["captions"], 75)
    step = DiffusionLoss(
        task, Objective(NoiseSchedule.sdxl(), False), NoiseOptions(), LossOptions(), None
    ).train()
    master = MasterWeightOptimizer(
        make_optimizer("AdamW", {}, fp32_params(groups), lr), groups, rounding=rounding
    )
    update = OptimizerStep(
        step, groups, StandardStep(master, max_grad_norm=0, scales_loss=False), None
    )
    batch, found = golden.batch(0, accumulation=1, text=text), []
    for number in range(count):
        losses = step(batch, golden.rng(0))
        found.append(losses.mean().item())
        update.backward(losses, batch.position._replace(step=number))
        update.step()
    return found[0] - found[-1]


@pytest.mark.long
def test_sdxl_in_bfloat16_learns_as_in_float32_where_nearest_doesnt(golden_model):
    """Measured: 101 % of float32's fall of 0.085, and 6 %."""
    whole = loss_falls(golden_model, "nearest", full=False)
    assert loss_falls(golden_model, "nearest", full=True) < whole / 5
    assert loss_falls(golden_model, "stochastic", full=True) > 0.9 * whole > 0.05


@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "nearest"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "Prodigy"])
def test_every_optimizer_moves_16_bit_weights_as_float32s_and_keeps_the_state_of_those(
    name, rounding
):
    """Ten steps with the same gradients. Prodigy looks at all of them, so it steps all weights together."""
    moves, lr = [], 1.0 if name == "Prodigy" else 0.01
    arguments = {"d0": 1e-3} if name == "Prodigy" else OPTIMIZERS[name]
    for dtype in (torch.float32, BF16):
        members = {
            "a": nn.Parameter((torch.randn(80, 80, generator=draw(1)) * 0.1).to(dtype)),
            "b": nn.Parameter(torch.zeros(80, dtype=dtype)),
        }
        start = torch.cat([parameter.detach().flatten() for parameter in members.values()]).float()
        groups = [ParamGroup("all", members, lr)]
        optimizer = make_optimizer(name, arguments, fp32_params(groups), lr)
        start_training(optimizer)
        master = MasterWeightOptimizer(
            optimizer, groups, rounding=rounding, is_separable=name != "Prodigy"
        )
        gradients = draw(2)
        for number in range(10):
            for parameter in members.values():
                parameter.grad = torch.randn(parameter.shape, generator=gradients).to(dtype)
            master.step_all(number, torch.ones(()))
        with master.eval_weights():
            moves.append(
                torch.cat([parameter.detach().flatten() for parameter in members.values()]).float()
                - start
            )
        assert all(parameter.dtype is dtype for parameter in members.values())
        kept = [
            v
            for values in optimizer.state.values()
            for v in values.values()
            if isinstance(v, torch.Tensor)
        ]
        assert not {value.dtype for value in kept} & {BF16, torch.float16}
    assert torch.cosine_similarity(*moves, dim=0) > 0.85 and moves[0].norm() > 0.01


def test_the_rounding_depends_only_on_seed_step_and_name():
    """Not on what was drawn before: whoever steps first, and in which run."""

    def stepped(seed: int, number: int, disturb: bool) -> torch.Tensor:
        model = make("AdamW", fused=False, dtype=BF16).loss_module
        groups = groups_of(model)
        optimizer = make_optimizer("AdamW", {}, fp32_params(groups), 0.01)
        master = MasterWeightOptimizer(optimizer, groups, rounding="stochastic", seed=seed)
        for parameter in master.parameters:
            parameter.grad = torch.ones_like(parameter)
        if disturb:
            torch.rand(17)
        master.step_all(number, torch.ones(()))
        return torch.cat([parameter.detach().flatten() for parameter in master.parameters])

    assert torch.equal(stepped(1, 5, False), stepped(1, 5, True))
    assert not torch.equal(stepped(1, 5, False), stepped(2, 5, False))
    assert not torch.equal(stepped(1, 5, False), stepped(1, 6, False))


def test_gradients_add_up_without_losing_what_is_small():
    """1, then 200 times 0.001 in bfloat16: to nearest it would stay 1."""
    weights = nn.Parameter(torch.zeros(20_000, dtype=BF16))
    sums = StochasticSums([ParamGroup("all", {"w": weights}, 1.0)], seed=0)
    for i in range(201):
        sums.begin(BatchPosition(0, 0, i, i, 201, False, False))
        (weights * (1.0 if i == 0 else 0.001)).sum().backward()
    assert weights.grad.dtype is BF16
    assert weights.grad.float().mean().item() == pytest.approx(
        1 + 200 * torch.tensor(0.001).to(BF16).item(), abs=0.01
    )
    plain = nn.Parameter(torch.zeros(1, dtype=BF16))
    for i in range(201):
        (plain * (1.0 if i == 0 else 0.001)).sum().backward()
    assert plain.grad.item() == 1


def test_the_optimizer_in_backward_rounds_with_the_same_random_numbers():
    """Each tensor alone in both: the fused run of 16-bit weights ends where the other does, to the bit."""
    plain, fused = (
        make("SGDNesterov", fused=fused, dtype=BF16, rounding="stochastic", seed=3)
        for fused in (False, True)
    )
    plain.gradient_step.optimizer.step_all = lambda step, factor, is_finite=None: one_by_one(
        plain, step, factor
    )
    for update in (plain, fused):
        train(update, 4)
    assert torch.equal(numbers(plain), numbers(fused)) and len(X)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_state_is_bit_equal(rounding, fused, tmp_path):
    """Through a folder, after 3 of 6 steps; clipped by the norm of the step before, windows of two batches."""

    def fresh() -> OptimizerStep:
        return make(
            "Lion",
            fused=fused,
            dtype=BF16,
            max_grad_norm=0.05,
            clips_by_previous=True,
            rounding=rounding,
            seed=1,
        )

    whole, part, rest = fresh(), fresh(), fresh()
    train(whole, 6)
    train(part, 3)
    names = {id(p): name for name, p in part.loss_module.named_parameters()}
    write_state(
        tmp_path / "s",
        State(state_metadata(3), dict(part.loss_module.named_parameters()), part.state(names)),
    )
    saved = read_state(tmp_path / "s")
    rest.loss_module.load_state_dict(saved.weights)
    rest.restore(
        saved.optimizer,
        {id(p): name for name, p in rest.loss_module.named_parameters()},
        same_options=True,
    )
    train(rest, 6, first=3)
    assert torch.equal(numbers(whole), numbers(rest)) and not torch.equal(
        numbers(whole), numbers(part)
    )


def one_by_one(update, number, factor):
    master = update.gradient_step.optimizer
    for parameter in master.parameters:
        master.step_params([parameter], number, factor)
    master.commit()


def test_a_state_written_before_its_words_changed_still_loads():
    """Its keys are a format: "rests" is Kahan's compensation, "descent" the gradient step."""
    update = make(
        "AdamW",
        fused=True,
        dtype=BF16,
        max_grad_norm=0.05,
        clips_by_previous=True,
        rounding="kahan",
    )
    parameters = dict(update.loss_module.named_parameters())
    per_parameter = {
        name: {
            "step": {"value": torch.tensor(3.0), "beside": True},
            "exp_avg": {"value": torch.full(parameter.shape, 0.5), "beside": True},
            "exp_avg_sq": {"value": torch.full(parameter.shape, 0.25), "beside": True},
        }
        for name, parameter in parameters.items()
    }
    names = {id(parameter): name for name, parameter in parameters.items()}
    old = {
        "optimizer": {
            "kind": "torch.optim.adamw.AdamW",
            "groups": [{"lr": 0.01}, {"lr": 0.02}],
            "state": per_parameter,
            "rests": {
                name: torch.full_like(parameter, 2.0**-20) for name, parameter in parameters.items()
            },
        },
        "schedule": None,
        "descent": {"previous_norm": torch.tensor(0.75)},
    }
    update.restore(old, names, same_options=True)
    state = update.state(names)
    assert state.keys() == old.keys() and state["optimizer"].keys() == old["optimizer"].keys()
    assert state["descent"] == {"previous_norm": 0.75}
    for name in parameters:
        assert torch.equal(state["optimizer"]["rests"][name], old["optimizer"]["rests"][name])
        for key, entry in state["optimizer"]["state"][name].items():
            assert entry.keys() == {"value", "beside"}
            assert torch.equal(entry["value"], per_parameter[name][key]["value"])
