"""sdxl_train_network.py end to end on the tiny model, as users run it."""

import json
import re
from pathlib import Path

import pytest
import torch
from forked import Script, end_together, processes
from messages import mentions
from running import (
    QUICK,
    ROOT,
    arguments,
    assert_bit_equal,
    losses_of,
    run_here,
    script,
    tensors_of,
    train_network,
    without,
)
from tolerance import assert_trained

import sdxl_train_network
from library.safetensors_io import read_header
from tools import before_after, make_tiny_sdxl

SHARED = ROOT.parent / "shared"
WITH_TEXT = without(QUICK, "--network_train_unet_only", "--cache_text_encoder_outputs")


def comfyui_keys(model: Path) -> set[str]:
    """The names under which ComfyUI looks for a LoRA of this checkpoint (trust.md section 4)."""
    names = {f"lora_unet_{name.removeprefix('model.diffusion_model.').removesuffix('.weight').replace('.', '_')}"
             for name in read_header(model).tensors if name.startswith("model.diffusion_model.") and name.endswith(".weight")}  # fmt: skip
    layers = (
        "mlp_fc1",
        "mlp_fc2",
        "self_attn_q_proj",
        "self_attn_k_proj",
        "self_attn_v_proj",
        "self_attn_out_proj",
    )
    return names | {
        f"lora_te{n}_text_model_encoder_layers_{b}_{c}"
        for n in (1, 2)
        for b in range(32)
        for c in layers
    }


def test_two_steps_change_every_module_that_can_train_and_nothing_else(
    golden_model, images, tmp_path
):
    """Text encoders and convolutions too; the base model's file stays what it was."""
    before = golden_model.read_bytes()
    extra = ["--network_args", "conv_dim=2", "--max_train_steps", "2", "--text_encoder_lr", "1e-3"]
    path = train_network(golden_model, images, tmp_path / "out", *extra, quick=WITH_TEXT)
    tensors = tensors_of(path)
    modules = {name.split(".")[0] for name in tensors}
    still = {name for name in modules if tensors[f"{name}.lora_up.weight"].abs().max() == 0}
    assert len(modules) == 348 and {
        name.rsplit("_self_attn", 1)[0].rsplit("_mlp", 1)[0] for name in still
    } == {"lora_te1_text_model_encoder_layers_11"}
    assert modules <= comfyui_keys(golden_model)
    assert golden_model.read_bytes() == before
    assert len(losses_of(tmp_path / "out")) == 2


@pytest.mark.skipif(not SHARED.exists(), reason="the acceptance check lies beside the project")
@pytest.mark.parametrize("unet_only", [pytest.param(True, marks=pytest.mark.long), False])
def test_the_file_loads_in_diffusers_completely(unet_only, golden_model, images, tmp_path):
    extra = ["--max_train_steps", "2", "--network_args", "conv_dim=2", "--save_precision", "fp16"]
    path = train_network(
        golden_model, images, tmp_path / "out", *extra, quick=QUICK if unet_only else WITH_TEXT
    )
    status, told = Script(SHARED / "checks" / "check_lora_diffusers.py", path, golden_model).end()
    assert status == 0, told[-2000:]
    assert "metadata missing (A1111/ComfyUI/Civitai read these): none" in told


RANDOM = [
    "--flip_aug",
    "--noise_offset",
    "0.05",
    "--network_dropout",
    "0.1",
    "--max_train_steps",
    "3",
    "--train_batch_size",
    "2",
]


def test_two_runs_with_one_seed_are_bit_equal_and_another_seed_is_not(
    golden_model, images, tmp_path
):
    paths = [
        train_network(golden_model, images, tmp_path / str(i), *RANDOM, "--seed", seed)
        for i, seed in enumerate((7, 7, 8))
    ]
    assert_bit_equal(tensors_of(paths[0]), tensors_of(paths[1]))
    assert losses_of(tmp_path / "0") == losses_of(tmp_path / "1") != losses_of(tmp_path / "2")


def test_workers_caches_and_checkpointing_dont_change_a_run(golden_model, images, tmp_path):
    """Workers 0 and 2 are bit-equal; caches in memory and on disk are; gradient checkpointing is within rounding."""
    uncached = without(QUICK, "--cache_latents", "--cache_text_encoder_outputs")
    shuffled = ["--shuffle_caption", "--caption_dropout_rate", "0.2", *RANDOM]
    runs = {}
    for workers in (0, 2):
        extra = [*shuffled, "--max_data_loader_n_workers", workers]
        runs[workers] = tensors_of(
            train_network(golden_model, images, tmp_path / f"w{workers}", *extra, quick=uncached)
        )
    assert_bit_equal(runs[0], runs[2])
    memory = train_network(golden_model, images, tmp_path / "memory", *RANDOM)
    disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", *RANDOM]
    made = train_network(
        golden_model, images, tmp_path / "made", *disk, "--max_data_loader_n_workers", 2
    )
    read = train_network(golden_model, images, tmp_path / "read", *disk)
    for other in (made, read):
        assert_bit_equal(tensors_of(memory), tensors_of(other))
    checkpointed = tensors_of(
        train_network(golden_model, images, tmp_path / "ckpt", *RANDOM, "--gradient_checkpointing")
    )
    for name, tensor in tensors_of(memory).items():
        torch.testing.assert_close(checkpointed[name], tensor, rtol=0, atol=1e-5)


def test_network_weights_go_on_where_they_ended(golden_model, images, tmp_path):
    first = train_network(golden_model, images, tmp_path / "a", "--max_train_steps", "2")
    same = train_network(
        golden_model,
        images,
        tmp_path / "b",
        "--max_train_steps",
        "1",
        "--network_weights",
        first,
        "--learning_rate",
        "1e-12",
    )
    before, after = tensors_of(first), tensors_of(same)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-8)
    extra = [
        "--network_weights",
        first,
        "--dim_from_weights",
        "--max_train_steps",
        "1",
        "--network_args",
        "conv_dim=4",
    ]
    assert (
        tensors_of(train_network(golden_model, images, tmp_path / "c", *extra)).keys()
        == before.keys()
    )


@pytest.mark.numeric
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_mixed_precision_trains_near_float32(precision, golden_model, images, tmp_path):
    plain = train_network(golden_model, images, tmp_path / "no", "--max_train_steps", "1")
    mixed = train_network(
        golden_model,
        images,
        tmp_path / precision,
        "--max_train_steps",
        "1",
        "--mixed_precision",
        precision,
    )
    assert losses_of(tmp_path / precision)[0] == pytest.approx(
        losses_of(tmp_path / "no")[0], rel=0.01
    )
    assert (
        {tensor.dtype for tensor in tensors_of(mixed).values()}
        == {tensor.dtype for tensor in tensors_of(plain).values()}
        == {torch.float32}
    )


def test_saves_during_the_run_and_save_precision(golden_model, images, tmp_path):
    extra = [
        "--max_train_epochs",
        "2",
        "--save_every_n_steps",
        "3",
        "--save_every_n_epochs",
        "1",
        "--save_precision",
        "bf16",
    ]
    final = train_network(golden_model, images, tmp_path, *extra)
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert {"lora.safetensors", "lora-000001.safetensors", "lora-step00000003.safetensors"} <= names
    assert {info.dtype for info in read_header(final).tensors.values()} == {"BF16"}
    assert read_header(tmp_path / "lora-step00000003.safetensors").metadata["ss_steps"] == "3"


def test_tensorboard_gets_the_contracts_scalars(golden_model, images, tmp_path):
    train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_epochs",
        "1",
        "--logging_dir",
        tmp_path / "logs",
        "--log_prefix",
        "p",
    )
    (run,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"p\d{14}", run.name)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "network_train"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/current",
        "loss/average",
        "loss/epoch_average",
        "lr/unet",
    }
    losses = losses_of(tmp_path / "out")
    assert [event.value for event in events.Scalars("loss/current")] == pytest.approx(
        losses, rel=1e-6
    )
    assert [event.step for event in events.Scalars("loss/current")] == list(
        range(1, len(losses) + 1)
    )
    assert events.Scalars("loss/epoch_average")[0].value == pytest.approx(
        sum(losses) / len(losses), rel=1e-6
    )


@pytest.mark.parametrize(
    "optimizer",
    ["Prodigy", *(pytest.param(name, marks=pytest.mark.long) for name in ("AdamW8bit", "Adafactor", "Lion", "AdamWScheduleFree", "torch.optim.RAdam"))],
)  # fmt: skip
def test_optimizers_train_a_network(optimizer, golden_model, images, tmp_path):
    rate = "1" if optimizer == "Prodigy" else "1e-3"
    path = train_network(
        golden_model,
        images,
        tmp_path,
        "--max_train_steps",
        "2",
        "--optimizer_type",
        optimizer,
        "--learning_rate",
        rate,
    )
    ups = [tensor for name, tensor in tensors_of(path).items() if name.endswith("lora_up.weight")]
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in ups)


def test_v_pred_models_are_trained_as_such_by_themselves(golden_model, images, tmp_path, capsys):
    from library.safetensors_io import write_safetensors

    model = tmp_path / "v.safetensors"
    write_safetensors(
        model, {**tensors_of(golden_model), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}
    )
    path = train_network(model, images, tmp_path / "v", "--max_train_steps", "1")
    told = capsys.readouterr().err
    assert mentions(told, "--v_parameterization", "v_pred", "ztsnr")
    metadata = read_header(path).metadata
    assert (
        metadata["modelspec.prediction_type"] == "v" and metadata["ss_zero_terminal_snr"] == "True"
    )
    forced = train_network(
        golden_model,
        images,
        tmp_path / "forced",
        "--max_train_steps",
        "1",
        "--v_parameterization",
        "--zero_terminal_snr",
    )
    assert_bit_equal(tensors_of(path), tensors_of(forced))


# --------------------------------------------------------------------------------------------------- as a user starts it


def command(*words: object, **settings) -> list[object]:
    return [ROOT / "sdxl_train_network.py", *arguments(*words, **settings)]


def test_plain_python_and_accelerate_launch_give_the_same_file(golden_model, images, tmp_path):
    words = arguments(golden_model, images, tmp_path / "plain", "--max_train_steps", "2")
    plain = run_here(sdxl_train_network.main, *words)
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert plain.stdout == ""  # everything that is told goes to stderr
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_cpu_threads_per_process",
        "1",
    ]
    launched = script(
        *launch,
        *command(golden_model, images, tmp_path / "launched", "--max_train_steps", "2"),
        cwd=tmp_path,
    )
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert_bit_equal(
        tensors_of(tmp_path / "plain" / "lora.safetensors"),
        tensors_of(tmp_path / "launched" / "lora.safetensors"),
    )


@pytest.mark.numeric
def test_two_processes_equal_one_with_twice_the_accumulation(golden_model, images, tmp_path):
    """Losses 1e-5, of validation too, weights by the rule; nothing but the number of processes differs, and they are really two."""
    quick = [
        "--max_train_steps",
        "5",
        "--train_batch_size",
        "1",
        "--flip_aug",
        "--noise_offset",
        "0.05",
    ]
    quick += [
        "--validation_split",
        "0.5",
        "--validation_seed",
        "3",
        "--validate_every_n_steps",
        "1",
    ]
    train_network(
        golden_model, images, tmp_path / "one", *quick, "--gradient_accumulation_steps", "2"
    )
    words = arguments(golden_model, images, tmp_path / "two", *quick)
    told = end_together(processes("sdxl_train_network.py", *words, count=2))
    assert re.search(r"\d+ [^\n\d]+ / \(2 [^\n\d]+ 1 [^\n\d]+\) = \d+ steps", told)
    for name, count in (("loss/current", 5), ("loss/validation/step_average", 5)):
        one, two = losses_of(tmp_path / "one", name), losses_of(tmp_path / "two", name)
        assert len(one) == count and one == pytest.approx(two, abs=1e-5)
    assert_trained(*(tensors_of(tmp_path / name / "lora.safetensors") for name in ("two", "one")))


def test_two_processes_train_text_encoders_with_dropped_modules_and_share_caches_on_disk(golden_model, images, tmp_path):  # fmt: skip
    """Each process leaves other modules out; gradients are exchanged all the same."""
    dropout = ["--network_args", "module_dropout=0.5", "rank_dropout=0.2"]
    words = arguments(
        golden_model, images, tmp_path / "out", "--max_train_steps", 6, "--cache_latents_to_disk", *dropout, quick=WITH_TEXT
    )  # fmt: skip
    end_together(processes("sdxl_train_network.py", *words, count=2))
    assert len(list(images.rglob("*_sdxl.npz"))) == 4
    ups = {
        name: t
        for name, t in tensors_of(tmp_path / "out" / "lora.safetensors").items()
        if name.startswith("lora_te2") and "up" in name
    }
    assert ups and all(tensor.abs().max() > 0 for tensor in ups.values())


def test_quickstarts_pieces_make_a_image(tmp_path, golden_model, images):
    lora = train_network(golden_model, images, tmp_path / "out", "--max_train_steps", "2")
    extra = [
        "--ckpt",
        golden_model,
        "--network_weights",
        lora,
        "--output",
        tmp_path / "both.png",
        "--width",
        "64",
        "--height",
        "64",
    ]
    done = run_here(before_after.main, *extra, "--steps", "2", "--prompt", "a red circle")
    assert done.returncode == 0, done.stderr[-2000:]
    from PIL import Image

    with Image.open(tmp_path / "both.png") as image:
        assert image.size == (128, 64)
    assert float(re.search(r"\b(\d+\.\d+)\b", done.stdout)[1]) > 0


def test_make_tiny_sdxl_makes_the_same_model_from_the_same_seed(tmp_path):
    for name in ("a", "b"):
        done = run_here(
            make_tiny_sdxl.main, "--output", tmp_path / f"{name}.safetensors", "--precision", "fp16"
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    from library.models.checkpoint.reader import open_checkpoint

    assert mentions(open_checkpoint(str(tmp_path / "a.safetensors")).describe(), "tiny SDXL")


def test_every_config_in_the_repository_is_read(golden_model, images, tmp_path):
    for path in (ROOT / "configs").glob("*.toml"):
        name = "sdxl_train.py" if path.stem.startswith("sdxl_finetune") else "sdxl_train_network.py"
        done = script(ROOT / name, "--config_file", path, "--pretrained_model_name_or_path", tmp_path / "none.safetensors",
                      "--train_data_dir", images, "--output_dir", tmp_path)  # fmt: skip
        assert (
            done.returncode == 2
            and mentions(done.stderr, "error", tmp_path / "none.safetensors", "file")
            and not mentions(done.stderr, "WARNING", path)
        ), done.stderr


def test_torch_is_not_imported_before_a_mistake_is_told(tmp_path):
    program = "import sys, sdxl_train_network as s\ntry: s.main(['--learning_rat', '1'])\nexcept Exception as e: print(type(e).__name__, 'torch' in sys.modules)"
    assert script("-c", program).stdout.split() == ["OptionError", "False"]


def test_the_step_log_is_json_lines(golden_model, images, tmp_path):
    train_network(golden_model, images, tmp_path, "--max_train_steps", "2")
    lines = [json.loads(line) for line in (tmp_path / "lora-log.jsonl").read_text().splitlines()]
    assert lines.pop()["saved"] == ["lora.safetensors"]
    assert [line["step"] for line in lines] == [1, 2] and {
        "epoch",
        "grad_norm",
        "seconds",
        "loss/current",
        "lr/unet",
    } <= lines[0].keys()


def test_what_a_gui_writes_is_taken_with_a_few_lines(golden_model, images, tmp_path, caplog):
    """Foreign keys get one line together, and so do options that mean nothing in this version; nothing is refused."""
    from library.options import read_options
    from library.training.options.compatibility import (
        COMMON_TRAINING,
        NO_EFFECT,
        UNSUPPORTED,
        check_training,
    )
    from library.training.options.optimizer import OptimizerOptions
    from networks.options import NetworkOptions

    argv = [
        "--config_file",
        ROOT / "tests" / "gui_lora.toml",
        "--pretrained_model_name_or_path",
        golden_model,
    ]
    argv += ["--train_data_dir", images, "--output_dir", tmp_path]
    options = read_options(
        sdxl_train_network.__doc__, [NetworkOptions, *COMMON_TRAINING], [str(word) for word in argv],
        checks=[check_training], refused=UNSUPPORTED, unused=NO_EFFECT,
    )  # fmt: skip
    assert len(options.notices) == 2
    for piece in (
        "epoch",
        "noise_offset_type",
        "sdxl",
        "clip_skip changes nothing",
    ):
        assert sum(piece in notice for notice in options.notices) == 1, piece
    assert options[NetworkOptions].text_encoder_lr == (5e-5,)
    assert options[OptimizerOptions].optimizer_args == ("weight_decay=0.01", "betas=0.9,0.99")


def test_with_complete_caches_neither_transformers_nor_diffusers_is_imported(
    golden_model, images, tmp_path
):
    disk = [
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--max_train_steps",
        "1",
    ]
    train_network(golden_model, images, tmp_path / "a", *disk)
    words = [str(word) for word in command(golden_model, images, tmp_path / "b", *disk)[1:]]
    program = f"import sys, sdxl_train_network as s\ns.main({words!r})\nprint({{'transformers', 'diffusers'}} & set(sys.modules))"
    done = script("-c", program)
    assert done.stdout.strip() == "set()", done.stderr[-2000:]


def test_the_output_may_not_overwrite_the_base_model(golden_model, images, tmp_path):
    import shutil

    shutil.copy(golden_model, tmp_path / "lora.safetensors")
    words = arguments(tmp_path / "lora.safetensors", images, tmp_path, "--max_train_steps", "1")
    done = run_here(sdxl_train_network.main, *words)
    assert done.returncode == 2 and mentions(
        done.stderr, "error", "--output_name", "--output_dir", tmp_path / "lora.safetensors"
    )
    assert (tmp_path / "lora.safetensors").read_bytes() == golden_model.read_bytes()


@pytest.mark.parametrize("ending", ["ckpt", pytest.param("pt", marks=pytest.mark.long)])
def test_other_formats_of_the_network_hold_the_same_tensors(ending, golden_model, images, tmp_path):
    path = train_network(golden_model, images, tmp_path / "a", "--max_train_steps", "1")
    train_network(
        golden_model, images, tmp_path / "b", "--max_train_steps", "1", "--save_model_as", ending
    )
    assert_bit_equal(
        tensors_of(path), torch.load(tmp_path / "b" / f"lora.{ending}", weights_only=True)
    )


def test_weighted_captions_change_what_is_learnt_cached_or_not(golden_model, images, tmp_path):
    """(word:1.5) is text unless --weighted_captions reads it; a cache of the one doesn't serve the other."""
    for file in (images / "2_shapes").glob("*.txt"):
        file.write_text("a (red:1.8) [square]")
    losses = {}
    for name, extra in {
        "plain": [],
        "weighted": ["--weighted_captions"],
        "cached": ["--weighted_captions", "--cache_text_encoder_outputs_to_disk"],
        "cached plain": ["--cache_text_encoder_outputs_to_disk"],
    }.items():
        words = without(QUICK, "--cache_text_encoder_outputs") if "cached" not in name else QUICK
        train_network(
            golden_model, images, tmp_path / name, "--max_train_steps", "1", *extra, quick=words
        )
        losses[name] = losses_of(tmp_path / name)
    assert losses["weighted"] == pytest.approx(losses["cached"], abs=1e-5)
    assert losses["plain"] == pytest.approx(losses["cached plain"], abs=1e-5)
    assert losses["plain"] != pytest.approx(losses["weighted"], abs=1e-5)


def test_scale_weight_norms_holds_every_module_of_a_run_below_its_limit(
    golden_model, images, tmp_path
):
    limit = 1e-3
    words = ["--max_train_steps", "3", "--learning_rate", "1e-2"]
    free = tensors_of(train_network(golden_model, images, tmp_path / "free", *words))
    held = tensors_of(
        train_network(
            golden_model, images, tmp_path / "held", *words, "--scale_weight_norms", limit
        )
    )

    def norms(tensors):
        names = {name.partition(".")[0] for name in tensors}
        return [
            (tensors[f"{n}.alpha"] / len(tensors[f"{n}.lora_down.weight"]) * tensors[f"{n}.lora_up.weight"].flatten(1) @ tensors[f"{n}.lora_down.weight"].flatten(1)).norm().item()
            for n in names
        ]  # fmt: skip

    assert max(norms(free)) > 2 * limit and max(norms(held)) <= limit * 1.001
