"""The estimate of memory, the plan that goes by it, and the presets; the bars are counted on the full-size model."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_size import peak_of
from messages import mentioning
from running import ROOT, train_network

from benchmarks.memory import BARS, plan_of
from library.errors import OptionError
from library.models.checkpoint.reference_shapes import stand_in
from library.models.sdxl import SdxlModels
from library.training.options.memory import MemoryOptions
from library.training.setup import training_state
from library.training.setup.memory_plan import GIB
from library.training.setup.plan import RunPlan

PRESETS = [
    path
    for kind in ("sdxl_finetune", "lora")
    for path in sorted((ROOT / "configs").glob(f"{kind}_*gb.toml"))
]
OFTEN = ("sdxl_finetune_8gb", "lora_4gb")


def plan_for(task: str, words: list[str]) -> RunPlan:
    """The plan of a run on the full-size model, from headers alone."""
    return plan_of(task, words, stand_in(Path("sdxl.safetensors")), torch.device("cpu"))


def estimated(task: str, words: list[str]) -> int:
    return plan_for(task, words).memory().total


@pytest.mark.parametrize("name", BARS)
def test_the_estimate_keeps_the_bars(name):
    most, task, words = BARS[name]
    assert estimated(task, words) <= most * GIB


@pytest.mark.long
@pytest.mark.parametrize("name", BARS)
def test_the_bars_are_held_by_the_full_size_model(name):
    """All tensors that are alive at once, and the estimate within a tenth of them."""
    most, task, words = BARS[name]
    peak, _ = peak_of(task, words)
    assert peak <= most * GIB
    assert estimated(task, words) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in OFTEN else pytest.mark.long)
        for path in PRESETS
    ],
)
def test_each_preset_fits_its_card_by_a_dry_run(preset, images, tmp_path, capsys, monkeypatch):
    """With SDXL base's sizes in place of the model, which isn't there: that is the one error, on a disk that is large enough."""
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, used=0, free=1 << 40)
    )
    script = "sdxl_train" if "finetune" in preset.stem else "sdxl_train_network"
    card = int(re.search(r"_(\d+)gb", preset.stem)[1])
    words = [
        "--config_file",
        preset,
        "--train_data_dir",
        images,
        "--output_dir",
        tmp_path,
        "--max_data_loader_n_workers",
        "0",
        "--dry_run",
    ]
    with pytest.raises(OptionError) as error:
        __import__(script).main([str(word) for word in words])
    (mistake,) = error.value.mistakes
    assert "sd_xl_base_1.0.safetensors" in mistake.text
    page = capsys.readouterr().out
    amount, unit = re.search(r"^  memory: about ([\d.]+) ([GM]B)", page, re.MULTILINE).groups()
    assert float(amount) * {"GB": 1e9, "MB": 1e6}[unit] <= (card - 0.8) * GIB


def plan(name: str, card: str, *extra: str) -> MemoryOptions:
    _, task, words = BARS[name]
    words = [word for word in words if word != "--gradient_checkpointing"]
    return plan_for(task, [*words, "--memory_plan", card, *extra]).options[MemoryOptions]


@pytest.mark.parametrize("name, card, words", [
    ("lora", "fast", (False, None)), ("lora", "16", (False, None)), ("lora", "10.5", ("selective", None)), ("lora", "7", ("full", None)),
    ("full", "8", ("full", None)), ("full", "5", ("full", 1)),
])  # fmt: skip
def test_the_plan_is_the_fastest_that_fits(name, card, words):
    found = plan(name, card)
    policy = found.gradient_checkpointing and found.checkpoint_policy
    assert policy == words[0] and (found.blocks_to_swap is None) == (words[1] is None)
    if words[1] is not None:
        leaner = plan(
            name,
            card,
            "--blocks_to_swap",
            str(found.blocks_to_swap + 1),
            "--gradient_checkpointing",
        )
        assert leaner.blocks_to_swap == found.blocks_to_swap + 1, "what was given stays"


@pytest.mark.long
def test_a_plan_that_cant_be_kept_says_what_would_help():
    with pytest.raises(
        OptionError, match=mentioning("--memory_plan", "1.2", "--fp8_base", "--base_quant")
    ):
        plan("lora", "1.2")
    with pytest.raises(
        OptionError, match=mentioning("--memory_plan", "fast", "auto", "GB", "'small'")
    ):
        plan("lora", "small")


def test_encoders_and_vae_leave_once_caches_are_filled_and_are_never_loaded_when_they_are_there(
    golden_model, images, tmp_path, monkeypatch
):
    words = [
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--max_train_steps",
        "1",
    ]
    loaded: list[set[str]] = []
    build = training_state.build_loss_module
    monkeypatch.setattr(
        training_state,
        "build_loss_module",
        lambda task, models, *rest, **more: (
            loaded.append(set(vars(models))) or build(task, models, *rest, **more)
        ),
    )
    train_network(golden_model, images, tmp_path / "filling", *words)
    monkeypatch.setattr(SdxlModels, "_text_encoder", None)
    monkeypatch.setattr(SdxlModels, "_load_vae", None)
    train_network(golden_model, images, tmp_path / "there", *words)
    assert (
        all("unet" in names and not names & {"vae", "text_encoders"} for names in loaded)
        and len(loaded) == 2
    )
