"""Optimizers by name with the user's arguments, and learning-rate schedules against the libraries'."""

import pytest
import torch
from messages import mentioning

from library.errors import OptionError
from library.imports import import_diffusers, import_transformers
from library.param_group import ParamGroup
from library.training.optim.lr_schedules import factor, make_scheduler, num_steps
from library.training.optim.master_weights import MasterWeightOptimizer, is_separable
from library.training.optim.optimizers import (
    current_rate,
    find_optimizer,
    format_optimizer,
    is_schedule_free,
    make_optimizer,
    start_training,
)
from library.training.options.optimizer import OptimizerOptions, ScheduleOptions, read_arguments
from library.training.options.optimizer_table import OPTIMIZERS, optimizer_spec


def groups(lr=0.01):
    torch.manual_seed(0)
    return [
        ParamGroup("a", {"w": torch.nn.Parameter(torch.randn(64, 64))}, lr),
        ParamGroup("b", {"v": torch.nn.Parameter(torch.randn(64))}, lr * 2),
    ]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("", "AdamW"),
        ("adamw", "AdamW"),
        ("ADAMW", "AdamW"),
        ("AdamW8bit", "AdamW8bit"),
        ("PagedAdamW8bit", "PagedAdamW8bit"),
        ("Lion8bit", "Lion8bit"),
        ("lion", "Lion"),
        ("prodigy", "Prodigy"),
        ("AdaFactor", "Adafactor"),
        ("SGDNesterov", "SGD"),
        ("SGDNesterov8bit", "SGD8bit"),
        ("AdamWScheduleFree", "AdamWScheduleFree"),
        ("RMSprop", "RMSprop"),
        ("torch.optim.RAdam", "RAdam"),
        ("bitsandbytes.optim.AdEMAMix8bit", "AdEMAMix8bit"),
    ],
)
def test_names_of_the_contract_and_any_class(name, kind):
    assert find_optimizer(OptimizerOptions(optimizer_type=name).name)[0].__name__ == kind


def test_a_class_is_known_by_its_short_name_and_by_its_dotted_one():
    assert optimizer_spec("Prodigy").finds_lr and optimizer_spec("prodigyopt.Prodigy").finds_lr
    assert optimizer_spec("schedulefree.AdamWScheduleFree").is_schedule_free
    assert optimizer_spec("torch.optim.adamw.AdamW").is_elementwise
    nesterov, sgd = optimizer_spec("SGDNesterov"), optimizer_spec("torch.optim.SGD")
    assert nesterov.defaults["nesterov"] and nesterov.bytes_per_param == 4
    assert not sgd.defaults and sgd.bytes_per_param == 0
    unknown = optimizer_spec("pytorch_optimizer.Prodigy")
    assert (
        not unknown.is_known
        and not unknown.finds_lr
        and (unknown.module, unknown.class_name) == ("pytorch_optimizer", "Prodigy")
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_table_says_of_an_optimizer_is_true(name):
    """Its class is where it says, is schedule-free if it says so, and steps parameters one by one unless it finds its rate."""
    spec = OPTIMIZERS[name]
    try:
        cls, _ = find_optimizer(name)
    except OptionError as error:
        pytest.skip(str(error))
    optimizer = make_optimizer(
        name, {}, [ParamGroup("a", {"w": torch.nn.Parameter(torch.randn(8, 8))}, 1.0)], 1.0
    )
    assert cls.__name__ == spec.class_name
    assert is_schedule_free(optimizer) is spec.is_schedule_free
    assert bool(getattr(optimizer, "is_paged", False)) is spec.is_paged
    assert is_separable(lambda groups: make_optimizer(name, {}, groups, 1.0)) is not spec.finds_lr


@pytest.mark.parametrize(
    "name",
    [
        "AdamW",
        "AdamW8bit",
        "Lion",
        "Prodigy",
        "SGDNesterov",
        "AdamWScheduleFree",
        "torch.optim.NAdam",
    ],
)
def test_every_family_steps_and_lowers_a_loss(name):
    made = groups()
    if name == "Prodigy":
        made = [ParamGroup(group.name, group.parameters, 1.0) for group in made]
    optimizer = make_optimizer(name, {}, made, 0.01)
    start_training(optimizer)
    parameters = [p for group in made for p in group.parameters.values()]
    first = None
    for _ in range(30):
        loss = sum((p**2).mean() for p in parameters)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with MasterWeightOptimizer(optimizer, made).eval_weights():
        assert sum((p**2).mean() for p in parameters).item() < first


def test_each_group_has_its_own_rate_and_nesterov_its_momentum():
    optimizer = make_optimizer("SGDNesterov", {}, groups(), 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["nesterov"]
    assert (
        make_optimizer("SGDNesterov", {"momentum": 0.5}, groups(), 0.01).defaults["momentum"] == 0.5
    )


def test_adafactor_finds_its_own_rate_unless_relative_step_is_false():
    own = make_optimizer("Adafactor", {}, groups(), 0.01)
    assert own.defaults["relative_step"] and own.param_groups[0]["lr"] is None
    scheduler = make_scheduler(own, ScheduleOptions(), 10, 0.01)
    assert type(scheduler).__name__ == "AdafactorSchedule"
    fixed = make_optimizer(
        "Adafactor", {"relative_step": False, "scale_parameter": False}, groups(), 0.01
    )
    assert [group["lr"] for group in fixed.param_groups] == [0.01, 0.02]


def test_the_rate_that_adafactor_finds_is_reported():
    """By hand: a hundredth of the root mean square of the weights, which is 2, and before the first step of a thousandth."""
    group = ParamGroup("a", {"w": torch.nn.Parameter(torch.full((4, 4), 2.0))}, 1e-4)
    optimizer = make_optimizer("Adafactor", {}, [group], 1e-4)
    make_scheduler(optimizer, ScheduleOptions(), 10, 1e-4)
    (param_group,) = optimizer.param_groups
    assert current_rate(optimizer, param_group) == pytest.approx(1e-5)
    group.parameters["w"].sum().backward()
    optimizer.step()
    assert current_rate(optimizer, param_group) == pytest.approx(0.02)
    fixed = make_optimizer("Adafactor", {"relative_step": False}, [group], 1e-4)
    assert current_rate(fixed, fixed.param_groups[0]) == 1e-4


def test_arguments_are_python_literals():
    values, mistakes = read_arguments(
        "--optimizer_args",
        ["betas=0.9,0.99", "weight_decay=0.01", "flag=True", "text='x'", "rate=1e-3"],
    )
    assert (
        values
        == {"betas": (0.9, 0.99), "weight_decay": 0.01, "flag": True, "text": "x", "rate": 1e-3}
        and not mistakes
    )
    for bad in ("betas", "a=b=c", "text=x", "flag=", "__import__('os')"):
        assert read_arguments("--optimizer_args", [bad])[1], bad


def test_wrong_names_and_arguments_are_mistakes_that_say_what_to_do():
    with pytest.raises(
        OptionError, match=mentioning("--optimizer_type", "torch.optim", "AdamWW", "'AdamW'")
    ):
        find_optimizer("AdamWW")
    with pytest.raises(
        OptionError,
        match=mentioning(
            "--optimizer_type", "nosuchpackage.optim.Best", "pip install nosuchpackage"
        ),
    ):
        find_optimizer("nosuchpackage.optim.Best")
    with pytest.raises(
        OptionError,
        match=mentioning("--optimizer_type", "Prodigy", "learning rate", "a 0.01", "b 0.02"),
    ):
        make_optimizer("Prodigy", {}, groups(), 1.0)
    with pytest.raises(
        OptionError,
        match=mentioning("--optimizer_args", "AdamW", "'beta'", "'betas'", "weight_decay"),
    ):
        make_optimizer("AdamW", {"beta": 1}, groups(), 0.01)


def test_a_package_that_isnt_there_is_one_sentence_with_the_pip_command(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "prodigyopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(
        OptionError, match=mentioning("--optimizer_type", "Prodigy", "pip install prodigyopt")
    ):
        find_optimizer("Prodigy")


def test_the_metadata_form():
    assert (
        format_optimizer(make_optimizer("AdamW", {}, groups(), 0.01), {})
        == "torch.optim.adamw.AdamW"
    )
    given = {"weight_decay": 0.05, "betas": (0.9, 0.99)}
    assert (
        format_optimizer(make_optimizer("AdamW", given, groups(), 0.01), given)
        == "torch.optim.adamw.AdamW(weight_decay=0.05,betas=(0.9, 0.99))"
    )


# ------------------------------------------------------------------------------------------------------------- schedules

TOTAL, LR = 50, 0.01
TRANSFORMERS = [
    ("constant_with_warmup", {"lr_warmup_steps": 5}, {}),
    ("linear", {"lr_warmup_steps": 5}, {}),
    ("linear", {"lr_warmup_steps": 0.1}, {}),
    ("cosine", {"lr_warmup_steps": 5}, {}),
    ("cosine", {}, {}),
    ("cosine_with_restarts", {"lr_warmup_steps": 3, "lr_scheduler_num_cycles": 3}, {"num_cycles": 3}),
    ("polynomial", {"lr_warmup_steps": 3, "lr_scheduler_power": 2.0}, {"power": 2.0}),
    ("inverse_sqrt", {"lr_warmup_steps": 4}, {}),
    ("inverse_sqrt", {"lr_warmup_steps": 4, "lr_scheduler_timescale": 9}, {"timescale": 9}),
    ("cosine_with_min_lr", {"lr_warmup_steps": 4, "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 1}, {"min_lr_rate": 0.1, "num_cycles": 0.5}),
    ("warmup_stable_decay", {"lr_warmup_steps": 4, "lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.2}, {"num_decay_steps": 20, "num_stable_steps": 26, "min_lr_ratio": 0.2, "num_cycles": 0.5}),
    ("constant", {}, {}),
]  # fmt: skip


@pytest.mark.parametrize("name, options, theirs", TRANSFORMERS, ids=lambda value: str(value))
def test_schedules_equal_transformers(name, options, theirs):
    transformers = import_transformers()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    warmup = num_steps(options.get("lr_warmup_steps", 0), TOTAL)
    steps = {} if name == "constant" else {"num_warmup_steps": warmup}
    if name not in ("constant", "constant_with_warmup", "inverse_sqrt"):
        steps["num_training_steps"] = TOTAL
    if name == "warmup_stable_decay":
        steps.pop("num_training_steps")
    if name == "inverse_sqrt":  # whose arguments get_scheduler has forgotten in some versions
        scheduler = transformers.get_inverse_sqrt_schedule(optimizer, warmup, **theirs)
    else:
        scheduler = transformers.get_scheduler(
            name, optimizer, **steps, scheduler_specific_kwargs=theirs
        )
    ours = factor(ScheduleOptions(lr_scheduler=name, **options), TOTAL, LR, {})
    for step in range(TOTAL):
        assert ours(step) * LR == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15), (
            step
        )
        optimizer.step()
        scheduler.step()


def test_piecewise_constant_equals_diffusers():
    rules = "1:10,0.1:20,0.01:30,0.005"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = import_diffusers().optimization.get_piecewise_constant_schedule(optimizer, rules)
    options = ScheduleOptions(
        lr_scheduler="piecewise_constant", lr_scheduler_args=(f"step_rules='{rules}'",)
    )
    ours = factor(options, TOTAL, 1.0, {"step_rules": rules})
    for step in range(40):
        assert ours(step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_any_schedulers_class_with_arguments():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = ScheduleOptions(
        lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2", "gamma=0.5")
    )
    scheduler = make_scheduler(optimizer, options, TOTAL, 1.0)
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25]
    with pytest.raises(OptionError, match=mentioning("--lr_scheduler_type", "NoLR")):
        make_scheduler(optimizer, ScheduleOptions(lr_scheduler_type="NoLR"), TOTAL, 1.0)


@pytest.mark.parametrize(
    "options, tokens",
    [
        (
            {"lr_scheduler": "constant", "lr_warmup_steps": 10},
            ["--lr_warmup_steps", "10", "constant", "constant_with_warmup"],
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr"},
            ["--lr_scheduler", "cosine_with_min_lr", "--lr_scheduler_min_lr_ratio"],
        ),
        (
            {"lr_scheduler": "piecewise_constant"},
            ["--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules"],
        ),
        (
            {"lr_scheduler": "cosine", "lr_scheduler_args": ("a=1",)},
            ["--lr_scheduler_args", "--lr_scheduler", "cosine"],
        ),
    ],
)
def test_fault_59_schedules_that_cant_work_are_mistakes(options, tokens):
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        ScheduleOptions(**options)
