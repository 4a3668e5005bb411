"""--dry_run: its page tells what the run then does, and writes nothing. NAME-run.toml: the same run again."""

import json
import re
import statistics
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import (
    QUICK,
    ROOT,
    arguments,
    assert_bit_equal,
    script,
    tensors_of,
    train_network,
    without,
)
from torch import nn

from library.errors import Mistake, MistakeCollector, OptionError
from library.models.checkpoint.reference_shapes import SDXL_BASE, stand_in
from library.models.text_encoders import build_text_encoder
from library.option_types import as_toml
from library.options import read_options
from library.param_group import ParamGroup
from library.size import Size
from library.training.optim.optimizers import make_optimizer
from library.training.options.compatibility import COMMON_TRAINING
from library.training.options.output import ResumeOptions, SavingOptions
from library.training.options.tasks import PivotalOptions
from library.training.progress import Progress
from library.training.saving.schedule import SaveSchedule
from library.training.setup import dry_run as page_module
from library.training.setup import measure as measure_module
from library.training.setup.memory_estimate import (
    Frozen,
    Work,
    estimate,
    optimizer_bytes,
    optimizer_bytes_in_state,
    state_bytes,
    unet_activations,
)
from library.training.setup.step_plan import Bucket, StepPlan
from networks.options import NetworkOptions
from tools import tiny_models

TEXT_TOO = without(
    QUICK, "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"
)
DISK = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]


def page_of(capsys, *words: object) -> str:
    """The page of a dry run that could start."""
    import sdxl_train_network

    capsys.readouterr()
    sdxl_train_network.main([*map(str, words), "--dry_run"])
    page = capsys.readouterr().out
    assert page.endswith("\nNothing keeps the run from starting.\n")
    return page


def refused_page(capsys, *words: object) -> tuple[str, list[str]]:
    """The page of one that couldn't, and the mistakes behind it."""
    import sdxl_train_network

    capsys.readouterr()
    with pytest.raises(OptionError) as error:
        sdxl_train_network.main([*map(str, words), "--dry_run"])
    page, mistakes = capsys.readouterr().out, [mistake.text for mistake in error.value.mistakes]
    assert page.endswith(f"\nErrors that keep the run from starting: {len(mistakes)}\n")
    return page, mistakes


def line_of(page: str, start: str) -> str:
    """The rest of a line of the plan, which may be wrapped, after its start."""
    paragraph = page.partition(f"  {start}: ")[2]
    lines = [paragraph.splitlines()[0]]
    for line in paragraph.splitlines()[1:]:
        if not line.startswith("  ") or re.match(r"  (on the disk|memory|saves|memory plan)", line):
            break
        lines.append(line.strip())
    return " ".join(lines)


def row(page: str, label: str) -> str:
    """The text after a label, in one line."""
    lines = page.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  {label:16}"))
    more = [line for line in lines[first + 1 :] if line]
    rest = []
    for line in more:
        if not line.startswith(" " * 18):
            break
        rest.append(line.strip())
    return " ".join([lines[first][18:], *rest])


def listing(*folders: Path) -> dict[str, bytes | None]:
    found = [path for folder in folders for path in folder.rglob("*")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


# ---------------------------------------------------------------------------------------------------------- the page


def test_the_pages_numbers_are_those_of_the_run(golden_model, images, tmp_path, capsys):
    """Rank 32, so that a file is its numbers and little else."""
    out = tmp_path / "out"
    words = arguments(
        golden_model, images, out, "--network_dim", 32, "--max_train_epochs", 3, "--train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--save_every_n_steps", 3, "--save_every_n_epochs", 1, "--save_state_on_train_end",
        "--network_args", "loraplus_lr_ratio=4",
    )  # fmt: skip
    page = page_of(capsys, *words)
    import sdxl_train_network

    sdxl_train_network.main(words)
    rows = [
        json.loads(line)
        for line in (out / "lora-log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [line for line in rows if "loss/current" in line]
    batches, each, total, epochs = map(
        int,
        re.search(
            r"(\d+) batches / \(1 processes x 2 accumulated\) = (\d+) steps an epoch; (\d+) steps in all, (\d+) epochs",
            page,
        ).groups(),
    )
    assert (len(steps), each * epochs, epochs) == (total, total, 3) and each == -(-batches // 2)
    table = re.findall(r"^ +(\d+x\d+) +(\d+) +(\d+) +(\d+) +2$", page, re.MULTILINE)
    assert (
        sum(int(images) for _, images, _, _ in table) == 4
        and sum(int(shown) for _, _, shown, _ in table) == 8
    )
    assert sum(int(count) for _, _, _, count in table) == batches

    saved = sorted(path.stem for path in out.glob("*.safetensors"))
    count, size, names = re.fullmatch(
        r"(\d+) of ([\d.]+) MB: (.*)", line_of(page, "saves")
    ).groups()
    assert sorted(names.split(", ")) == saved and int(count) == len(saved) == 1 + total // 3 + 2
    for path in out.glob("*.safetensors"):
        assert path.stat().st_size == pytest.approx(float(size) * 1e6, rel=0.02)
    state = re.search(r"1 states of about ([\d.]+) MB", line_of(page, "on the disk at once"))[1]
    written = sum(path.stat().st_size for path in (out / "lora-state").iterdir())
    assert written == pytest.approx(float(state) * 1e6, rel=0.05)

    tensors = tensors_of(out / "lora.safetensors")
    for name, ending in (("unet", "lora_down.weight"), ("unet plus", "lora_up.weight")):
        members, numbers, lr = re.search(
            rf"^  {name} +(\d+) +([\d,]+)  (\S+)$", page, re.MULTILINE
        ).groups()
        own = [tensor for key, tensor in tensors.items() if key.endswith(ending)]
        assert (int(members), int(numbers.replace(",", ""))) == (
            len(own),
            sum(map(torch.Tensor.numel, own)),
        )
        assert float(lr) == steps[0][f"lr/{name}"]
    assert row(page, "begins") == "at step 0"
    assert row(page, "model") == "tiny_sdxl.safetensors: tiny SDXL (for tests), single file"
    assert all(len(line) <= 100 for line in page.splitlines() if "/" not in line)


def test_a_dry_run_writes_nothing_and_does_not_make_the_output_folder(
    golden_model, images, tmp_path, capsys, monkeypatch
):
    cache = tmp_path / "user"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    before = listing(tmp_path)
    words = [*DISK, "--cache_dir", tmp_path / "caches", "--logging_dir", tmp_path / "log", "--save_state", "--ema_decay", "0.9"]  # fmt: skip
    page_of(capsys, *arguments(golden_model, images, tmp_path / "out", *words))
    assert listing(tmp_path) == before


def test_caches_are_looked_at_and_told_without_being_made(golden_model, images, tmp_path, capsys):
    words = arguments(golden_model, images, tmp_path / "out", "--max_train_steps", 1, *DISK)
    page = page_of(capsys, *words)
    assert row(page, "latents").startswith("0 of 4 are there and valid; to encode: 4 not there")
    assert row(page, "decoded").startswith("4;")
    import sdxl_train_network

    sdxl_train_network.main(words)
    files = sorted((images / "2_shapes").glob("*.txt"))
    files[0].write_text("another caption", encoding="utf-8")
    next((images / "2_shapes").glob("*_sdxl.npz")).unlink()
    page = page_of(capsys, *words)
    assert row(page, "latents").startswith("3 of 4 are there and valid; to encode: 1 not there")
    assert row(page, "text").startswith(
        "3 of 4 are there and valid; to encode: 1 of other captions"
    )
    assert row(page, "decoded") == "1; 0 can't be used"  # valid latents stand for their images


def test_without_caches_all_parts_are_in_every_step(golden_model, images, tmp_path, capsys):
    page = page_of(capsys, *arguments(golden_model, images, tmp_path / "out", quick=TEXT_TOO))
    for part, numbers in (
        ("unet", "8,666,692"),
        ("text_encoder_2", "6,945,536"),
        ("vae", "1,399,879"),
    ):
        assert row(page, part).strip() == f"{numbers} frozen parameters, float32, in every step"
    assert "none: images and captions are encoded in every step" in page
    assert re.search(r"^  textencoder +\d+ +[\d,]+  0.001$", page, re.MULTILINE)


def test_a_dry_run_tells_the_state_that_would_be_resumed_and_what_differs(golden_model, images, tmp_path, capsys, monkeypatch):  # fmt: skip
    out, done = tmp_path / "out", []
    words = ["--max_train_steps", 4, "--save_every_n_steps", 2, "--save_state"]
    train_network(golden_model, images, out, *words)
    monkeypatch.setattr(
        SaveSchedule, "check_space", lambda self, total_steps, place: done.append(place.step)
    )
    resumed = arguments(
        golden_model, images, out, *words, "--resume", out / "lora-step00000002-state"
    )
    assert row(page_of(capsys, *resumed), "begins").endswith(
        "lora-step00000002-state; 2 steps are left"
    )
    assert done == [2]
    finished = page_of(capsys, *arguments(golden_model, images, out, *words, "--auto_resume"))
    assert row(finished, "begins").startswith("not at all:")
    _, mistakes = refused_page(capsys, *resumed, "--learning_rate", "1e-4")
    assert len(mistakes) == 1 and "learning_rate: 0.001 -> 0.0001" in mistakes[0]


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("model", ["gone.safetensors", "nobody/nothing"])
def test_without_its_model_a_dry_run_checks_all_else(model, images, tmp_path, capsys):
    """A file that isn't there; a hub id while offline. The sizes are then SDXL base's."""
    words = arguments(Path(model), images, tmp_path / "out", "--max_train_epochs", 2)
    page, mistakes = refused_page(capsys, *words)
    assert len(mistakes) == 1 and mistakes[0].startswith(f"{model}: no such")
    assert row(page, "model") == f"NOT THERE: {mistakes[0]}"
    assert "2,567,463,684 frozen parameters" in page and "16 steps in all, 2 epochs" in page
    assert re.search(
        r"^  unet +1444 +5,319,680 ", page, re.MULTILINE
    )  # rank 2: an eighth of the 42.6 M of rank 16


def test_a_dry_run_that_cant_start_exits_2_and_imports_no_more_than_it_needs(images, tmp_path):
    """Text encoders that would be trained are counted by the checkpoint's header."""
    words = [
        *arguments(tmp_path / "gone.safetensors", images, tmp_path / "out", quick=TEXT_TOO),
        "--dry_run",
    ]
    program = (
        "import sys, sdxl_train_network as s\nfrom library.errors import run\n"
        f"try: run(lambda: s.main({words!r}))\nfinally: print({{'transformers', 'diffusers'}} & set(sys.modules))"
    )
    done = script("-c", program)
    assert (
        done.returncode == 2
        and "error: " in done.stderr
        and done.stdout.splitlines()[-1] == "set()"
    )


def test_everything_that_is_wrong_is_told_at_once_behind_the_page(golden_model, images, tmp_path, capsys, monkeypatch):  # fmt: skip
    broken = images / "2_shapes" / "picture0.png"
    broken.write_bytes(broken.read_bytes()[:-200])
    monkeypatch.setattr("library.training.saving.schedule.free_space", lambda folder: 1000)
    words = arguments(golden_model, images, tmp_path / "out", "--resume", "latest")
    page, mistakes = refused_page(capsys, *words)
    assert [next(piece for piece in ("picture0.png", "--resume latest", "are free") if piece in text) for text in mistakes] == ["picture0.png", "--resume latest", "are free"]  # fmt: skip
    assert row(page, "decoded") == "4; 1 can't be used"
    page, mistakes = refused_page(capsys, *words, "--skip_bad_images")
    assert len(mistakes) == 2 and "3 images, 6 with repeats" in page


def test_wrong_options_and_unreadable_images_end_a_dry_run_before_its_page(
    golden_model, images, tmp_path, capsys
):
    import sdxl_train_network

    words = arguments(golden_model, images, tmp_path / "out")
    with pytest.raises(OptionError, match="did you mean 'learning_rate'"):
        sdxl_train_network.main([*words, "--dry_run", "--learning_rat", "1"])
    (images / "2_shapes" / "picture0.png").write_bytes(b"no image")
    words = arguments(tmp_path / "gone.safetensors", images, tmp_path / "out")
    with pytest.raises(OptionError) as error:
        sdxl_train_network.main([*words, "--dry_run"])
    gone, bad, *_ = [mistake.text for mistake in error.value.mistakes]
    assert "gone.safetensors" in gone and "picture0.png" in bad and capsys.readouterr().out == ""


def test_a_folder_that_cant_be_written_in_is_told(
    golden_model, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    _, mistakes = refused_page(capsys, *arguments(golden_model, images, tmp_path / "out" / "deep"))
    assert mistakes == [f"--output_dir {tmp_path / 'out' / 'deep'}: {tmp_path} can't be written in"]


@pytest.mark.long
@pytest.mark.parametrize(
    "script_name, words",
    [
        ("sdxl_train_network", QUICK),
        ("sdxl_train_network", TEXT_TOO),
        ("sdxl_train", ["--resolution", "64", "--train_text_encoder"]),
        (
            "sdxl_train_textual_inversion",
            ["--resolution", "64", "--token_string", "zyx", "--use_object_template"],
        ),
    ],
    ids=["lora", "lora and text", "fine-tuning", "textual inversion"],
)
def test_a_dry_run_takes_at_most_three_times_as_long_as_importing_torch(script_name, words, golden_model, images, tmp_path):  # fmt: skip
    """CPU seconds of new processes, the median ratio of three pairs, one after another: a slow or busy machine is so for both.

    Ratios of the pairs differ by up to a tenth; that of a first pair, whose files aren't in memory yet, by a quarter.
    """
    resource = pytest.importorskip("resource")

    def seconds(*words: object) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = script(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    whole = arguments(golden_model, images, tmp_path / "out", "--dry_run", quick=words)
    ratios = [
        seconds(ROOT / f"{script_name}.py", *whole) / seconds("-c", "import torch")
        for _ in range(3)
    ]
    assert statistics.median(ratios) <= 3, ratios


# --------------------------------------------------------------------------------------------------------- measurement


@pytest.mark.parametrize(
    "quick", [QUICK, without(QUICK, "--cache_latents", "--cache_text_encoder_outputs")]
)
def test_a_step_on_the_largest_batch_can_be_measured(
    quick, golden_model, images, tmp_path, monkeypatch, capsys
):
    """On the CPU, where only the time is; the page itself measures on CUDA alone."""
    seen = []
    random_batch = measure_module.random_batch
    monkeypatch.setattr(
        measure_module, "random_batch", lambda *all: seen.append(random_batch(*all)) or seen[-1]
    )
    monkeypatch.setattr(
        page_module, "time_rows", lambda plan, collector, measured: [("took", f"{measured()}")]
    )
    page = page_of(
        capsys,
        *arguments(golden_model, images, tmp_path / "out", "--train_batch_size", 3, quick=quick),
    )
    assert re.fullmatch(r"Measurement\(peak=0, seconds=\d+\.\d+\)", row(page, "took"))
    pixels = seen[0].latents if seen[0].latents is not None else seen[0].images
    assert len(seen) == 1 and pixels.shape[0] == 3


def test_the_expected_time_of_a_run_goes_by_its_pixels():
    """1 s for 2 images of 100x100; an epoch has 6 of those and 4 of half their size, and the run 5 epochs of 5 steps."""
    buckets = [Bucket(Size(100, 100), 6, 6, 2), Bucket(Size(50, 100), 4, 4, 2)]
    order = SimpleNamespace(world_size=2, steps_per_epoch=5)
    models = SimpleNamespace(device=torch.device("cuda"))
    plan = SimpleNamespace(models=models, buckets=buckets, steps=StepPlan(order, 25, 5))
    measurement = measure_module.Measurement(12_000_000_000, 90.0)
    collector = MistakeCollector(raises=False)
    assert (
        dict(page_module.time_rows(plan, collector, lambda: measurement))
        == {
            "measured": "batches of 2 at 100x100: 90.00 s each, 12.00 GB at the peak",
            "expected": "15 min, without caching, samples, validation and saving",  # 90 / 2 * 8 * 5 / 2 processes = 900 s
        }
    )
    collector.mistakes.append(Mistake("something"))
    (row,) = page_module.time_rows(plan, collector, lambda: measurement)
    assert row == ("", "not measured: the run can't start")


def test_the_names_that_are_planned_are_those_that_are_saved(tmp_path):
    for options in ({}, {"save_every_n_steps": 4}, {"save_every_n_epochs": 2}, {"save_n_epoch_ratio": 3, "output_name": "n"}, {"save_every_n_steps": 3, "save_every_n_epochs": 1}):  # fmt: skip
        schedule = SaveSchedule(SavingOptions(output_dir=tmp_path, **options), ResumeOptions(), 6)
        saved, progress = [], Progress()
        for step in range(1, 23):  # the last epoch is broken off
            progress.step = step
            if schedule.step_is_due(step):
                saved.append(schedule.stem("step", progress))
            if step % 4 == 0:
                progress.epoch += 1
                if schedule.epoch_is_due(progress.epoch):
                    saved.append(schedule.stem("epoch", progress))
        assert schedule.planned_names(22, 4) == [*saved, schedule.stem("final", progress)]


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "config, kept, selected, recomputed",
    [
        (tiny_models.SDXL_BASE, 3024, 2002, 287),
        (tiny_models.SSD_1B, 1807, 1140, 232),
        (tiny_models.VEGA, 1109, 644, 203),
        (tiny_models.TINY.unet, 118.8, 69.7, 21.25),
    ],
)
def test_the_estimate_of_activations_fits_the_counts(config, kept, selected, recomputed):
    """Counted without numbers; one block that is computed again comes on top of what is kept."""
    assert unet_activations(config, 128 * 128, None) / 1e6 == pytest.approx(kept, rel=0.03)
    assert unet_activations(config, 128 * 128, "selective") / 1e6 == pytest.approx(
        selected, rel=0.03
    )
    block = 24.17e-6 * 64 * 64 * 2 * config.model_channels
    assert unet_activations(config, 128 * 128, "full") / 1e6 == pytest.approx(
        recomputed + block, rel=0.03
    )


def test_the_estimate_of_a_lora_run_by_hand():
    work = Work(tiny_models.SDXL_BASE, 1024 * 1024, batch_size=4, bytes_each=2)
    found = estimate([Frozen("unet", 100, 2), Frozen("vae", 10, 4)], work, trained=7, optimizer=14)
    assert found[:5] == (240, 28, 28, 14, 0)
    assert found.activations == pytest.approx(4 * 2 * 3024e6, rel=0.01) and found.total == sum(
        found
    )
    encoding = work._replace(vae_channels=128, vae_batch=4, policy="full")
    assert estimate([], encoding, trained=0, optimizer=0).activations == 4 * 2 * 3 * 128 * 1024**2
    assert estimate([], work, trained=7, optimizer=56, average_on_device=True)[1:5] == (
        28,
        28,
        56,
        28,
    )
    assert estimate([], work, trained=7, optimizer=56, bytes_each=2, has_compensation=True)[
        1:4
    ] == (28, 14, 56)
    assert estimate([], work, trained=7, optimizer=56, bytes_each=2, fused=3)[1:4] == (14, 60, 56)


@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdamW8bit", "Lion8bit", "SGDNesterov", "Prodigy", "AdamWScheduleFree", "Adagrad", "Adafactor"])  # fmt: skip
def test_what_an_optimizer_keeps_is_what_the_estimate_counts(name):
    weights = {"down": nn.Parameter(torch.randn(32, 320)), "up": nn.Parameter(torch.randn(320, 32))}
    try:
        optimizer = make_optimizer(name, {}, [ParamGroup("unet", weights, 1.0)], 1.0)
    except OptionError as error:
        pytest.skip(str(error))
    if hasattr(optimizer, "train"):
        optimizer.train()
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    kept = sum(
        _bytes_of(state) for key, state in optimizer.state.items() if isinstance(key, torch.Tensor)
    )
    numbers = sum(weight.numel() for weight in weights.values())
    estimated = state_bytes(name, [weight.shape for weight in weights.values()])
    assert abs(kept - estimated) < numbers and (
        name != "Adafactor" or kept == pytest.approx(estimated, rel=0.01)
    )
    assert optimizer_bytes("some.package.Unknown") == optimizer_bytes("AdamW") == 8


def test_what_a_state_holds_of_the_optimizer_depends_on_the_optimizer():
    """By hand: Adafactor keeps 20 + 30 numbers for a matrix, AdamW 2 x 600; Kahan's rounding a 16-bit number for each."""
    group = ParamGroup("unet", {"a": nn.Parameter(torch.zeros(20, 30, dtype=torch.bfloat16))}, 1.0)
    for name, rounding, expected in (
        ("Adafactor", None, 200),
        ("AdamW", None, 4800),
        ("AdamW", "kahan", 6000),
    ):
        optimizing, update = SimpleNamespace(name=name), SimpleNamespace(rounding=rounding)
        assert optimizer_bytes_in_state([group], optimizing, update) == expected


def _bytes_of(state) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(map(_bytes_of, state.values() if isinstance(state, dict) else state)) if isinstance(state, dict | list | tuple) else 0  # fmt: skip


def test_the_stand_in_has_the_sizes_of_sdxl_base():
    assert tiny_models.SDXL_BASE == SDXL_BASE and SDXL_BASE.family == "SDXL base"
    checkpoint = stand_in(Path("gone.safetensors"))
    for number, millions in ((1, 123.06), (2, 694.66)):
        tensors = checkpoint.tensors(f"text_encoder_{number}")
        built = build_text_encoder(tensors, number)
        count = sum(parameter.numel() for parameter in built.parameters())
        assert (
            sum(tensor.numel() for tensor in tensors.values())
            == count
            == pytest.approx(millions * 1e6, rel=1e-4)
        )


# -------------------------------------------------------------------------------------------------------- the run file


def test_the_run_file_repeats_the_run_to_the_bit(golden_model, images, tmp_path):
    """Options of every type; the seed that was drawn."""
    seedless = without(QUICK, "--seed", "7")
    extra = ["--max_train_steps", 3, "--network_args", "rank_dropout=0.2", "--optimizer_args", "weight_decay=0.02", "betas=(0.9,0.98)",
             "--training_comment", 'C:\\x41\\"é"', "--caption_prefix", "a\tb\x7f ", "--noise_offset", "0.05", "--save_precision", "bf16"]  # fmt: skip
    first = train_network(golden_model, images, tmp_path / "a", *extra, quick=seedless)
    file = tmp_path / "a" / "lora-run.toml"
    text = file.read_text(encoding="utf-8")
    assert re.match(r"# .*\d{4}-\d\d-\d\d.*\n# torch \S+, diffusers \S+, transformers \S+\n", text)

    def options_of(*argv):
        return dict(
            read_options(
                "", [NetworkOptions, PivotalOptions, *COMMON_TRAINING], list(map(str, argv))
            ).items()
        )

    given = options_of(*arguments(golden_model, images, tmp_path / "a", *extra, quick=seedless))
    again = options_of("--config_file", file)
    assert {**given, "seed": again["seed"], "config_file": file} == again and again[
        "seed"
    ] is not None
    again_path = tmp_path / "b" / "lora.safetensors"
    import sdxl_train_network

    sdxl_train_network.main(["--config_file", str(file), "--output_dir", str(tmp_path / "b")])
    assert_bit_equal(tensors_of(first), tensors_of(again_path))


def test_the_run_file_holds_no_secrets(golden_model, images, tmp_path):
    secrets = {
        "wandb_api_key": "0123456789abcdef",
        "huggingface_token": "hf_abcdefghijklmnopqrstuvwxyz",
    }
    words = [word for name, value in secrets.items() for word in (f"--{name}", value)]
    train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 1, *words)
    text = (tmp_path / "out" / "lora-run.toml").read_text(encoding="utf-8")
    assert not any(name in text or value in text for name, value in secrets.items())
    assert "dry_run" not in text and "config_file =" not in text


@pytest.mark.parametrize("value", [True, 3, 2**62, 1e-5, 5e-324, 1e22, 0.1, 'a\\x41"b"\n\x00\x7f', "é…", "C:\\U1", [1e-4, 2], ["a=1", "b"], {"a": "b"}])  # fmt: skip
def test_values_survive_as_toml(value):
    read = tomllib.loads(f"value = {as_toml(value)}\n")["value"]
    assert read == value and type(read) is type(value)


def test_a_surrogate_in_an_option_costs_the_run_nothing(golden_model, images, tmp_path):
    train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_steps",
        1,
        "--training_comment",
        "a\ud83d",
    )
    assert (
        tomllib.loads((tmp_path / "out" / "lora-run.toml").read_text(encoding="utf-8"))[
            "training_comment"
        ]
        == "a?"
    )


def test_the_start_of_a_run_tells_the_short_form_once(golden_model, images, tmp_path, capsys):
    train_network(golden_model, images, tmp_path / "out", "--max_train_steps", 1)
    told = capsys.readouterr().err
    for piece in ("tiny SDXL (for tests)", "with repeats", "steps an epoch", "saves: 1 of", "on the disk at once", "memory: about"):  # fmt: skip
        assert told.count(piece) == 1, piece
