"""Full fine-tuning: golden 10 `full_blocklr`, what is frozen, what is saved, and going on to the bit."""

import shutil

import pytest
import torch
from conftest import open_models
from messages import mentioning
from replay import Golden, replay
from running import assert_bit_equal, losses_of, tensors_of
from tolerance import REPLAYED_CHANGE

from library.errors import OptionError
from library.models.unet import block_of
from library.param_group import ParamGroup
from library.safetensors_io import read_header
from library.training.options.objective import LossOptions
from library.training.options.optimizer import ScheduleOptions
from library.training.options.tasks import FineTuneOptions
from library.training.setup.step_plan import check_trains_to_the_end
from library.training.tasks.base import TaskSettings
from library.training.tasks.fine_tune import FineTune

QUICK = [
    "--resolution", "64", "--enable_bucket", "--min_bucket_reso", "32", "--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--cache_latents",
    "--cache_text_encoder_outputs", "--max_data_loader_n_workers", "0", "--learning_rate", "1e-4", "--seed", "7", "--output_name", "lora",
]  # fmt: skip
TEXT_TOO = [word for word in QUICK if word != "--cache_text_encoder_outputs"]


def train(model, images, output, *extra, quick=QUICK):
    import sdxl_train

    files = [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--output_dir",
        output,
    ]
    sdxl_train.main([str(word) for word in [*quick, *files, *extra]])
    return output / "lora.safetensors"


def trainable(models, *parts):
    """The models with these parts in float32, to be trained."""
    models.trained = frozenset(parts)
    return models


def test_golden_10_full_blocklr(golden_model):
    """The reference never zeroes the gradients of blocks at 0, so its norms differ; INDEX has those of frozen blocks."""
    golden = Golden("full_blocklr")
    models = trainable(open_models(golden_model), "unet")
    start = {name: tensor.clone() for name, tensor in models.checkpoint.tensors("unet").items()}
    rates = golden.facts["args"][golden.facts["args"].index("--block_lr") + 1]
    task = FineTune(
        models,
        TaskSettings(lr=1e-4, num_tokens=75, text_is_cached=True),
        (FineTuneOptions(block_lr=rates),),
    )
    golden.facts["grad_norm_before_clip"] = [2.058352, 2.458236, 2.070022, 1.537648]
    one, two, three, four = golden.facts["losses"]
    steps = replay(
        golden, models, task, optimizer_args={}, schedule=ScheduleOptions(), loss=LossOptions(), lr=1e-4, accumulation=1, cached_text=True,
        expected_losses=[one, two, three - 4.6e-5, four - 8.5e-5], prediction_atol=5e-3,
    )  # fmt: skip
    for number, found in steps:
        assert found == golden.facts["lr_per_step"][number]
    noisy = set(golden.facts["noise_dominated_keys"])
    prefix, compared = "model.diffusion_model.", 0
    for name, tensor in models.unet.named_parameters():
        _, _, _, change = golden.facts["output_summary"]["tensors"][prefix + name]
        found = (tensor.detach() - start[name]).norm().item()
        if change == 0:
            assert found == 0 and not tensor.requires_grad and tensor.grad is None, name
        elif prefix + name not in noisy:
            compared += 1
            assert found == pytest.approx(change, rel=REPLAYED_CHANGE), name
    assert compared > 300


def test_what_isnt_trained_is_saved_byte_for_byte(golden_model, images, tmp_path):
    rates = ",".join("1e-4" if block in (3, 12) else "0" for block in range(23))
    path = train(
        golden_model, images, tmp_path / "out", "--max_train_steps", "2", "--block_lr", rates
    )
    before, after = tensors_of(golden_model), tensors_of(path)
    assert before.keys() == after.keys()
    changed = {
        name
        for name in after
        if before[name].dtype != after[name].dtype or not torch.equal(before[name], after[name])
    }
    blocks = {block_of(name.removeprefix("model.diffusion_model.")) for name in changed}
    assert blocks == {3, 12} and all(name.startswith("model.diffusion_model.") for name in changed)
    metadata = read_header(path).metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert not [key for key in metadata if not key.startswith("modelspec.")]


@pytest.mark.parametrize("extra, parts", [
    pytest.param(["--train_text_encoder"], {"unet", "te1", "te2"}, marks=pytest.mark.long),
    pytest.param(["--train_text_encoder", "--learning_rate_te1", "0"], {"unet", "te2"}, marks=pytest.mark.long),
    (["--train_text_encoder", "--learning_rate", "0", "--learning_rate_te1", "1e-4", "--learning_rate_te2", "0"], {"te1"}),
])  # fmt: skip
def test_the_parts_that_have_a_rate_are_trained(extra, parts, golden_model, images, tmp_path):
    path = train(
        golden_model, images, tmp_path / "out", "--max_train_steps", "2", *extra, quick=TEXT_TOO
    )
    before, after = tensors_of(golden_model), tensors_of(path)
    prefixes = {
        "unet": "model.diffusion_model.",
        "te1": "conditioner.embedders.0.",
        "te2": "conditioner.embedders.1.",
    }
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert {
        part
        for part, prefix in prefixes.items()
        if any(name.startswith(prefix) for name in changed)
    } == parts
    assert all(name.startswith(tuple(prefixes[part] for part in parts)) for name in changed)
    unused = [
        name
        for name in changed
        if "embedders.0" in name and (".layers.11." in name or "final_layer_norm" in name)
    ]
    assert not unused


def test_a_diffusers_folder_is_saved_and_trains_on(golden_model, images, tmp_path):
    train(golden_model, images, tmp_path / "out", "--max_train_steps", "1", "--save_model_as", "diffusers", "--save_precision", "fp16")  # fmt: skip
    folder = tmp_path / "out" / "lora"
    assert (folder / "model_index.json").exists()
    assert {
        t.dtype
        for t in tensors_of(folder / "unet" / "diffusion_pytorch_model.safetensors").values()
    } == {torch.float16}
    train(folder, images, tmp_path / "again", "--max_train_steps", "1")
    assert (tmp_path / "again" / "lora" / "unet" / "config.json").exists(), (
        "a folder gives a folder"
    )


def test_resuming_is_bit_equal(golden_model, images, tmp_path):
    words = [
        "--train_text_encoder",
        "--max_train_steps",
        "3",
        "--save_state",
        "--save_every_n_steps",
        "2",
        "--ema_decay",
        "0.9",
    ]
    whole = train(golden_model, images, tmp_path / "whole", *words, quick=TEXT_TOO)
    shutil.copytree(
        tmp_path / "whole" / "lora-step00000002-state",
        tmp_path / "parts" / "lora-step00000002-state",
    )
    parts = train(golden_model, images, tmp_path / "parts", *words, "--auto_resume", quick=TEXT_TOO)
    assert_bit_equal(tensors_of(whole), tensors_of(parts))
    assert_bit_equal(
        *(tensors_of(path.with_name("lora-ema.safetensors")) for path in (whole, parts))
    )
    assert losses_of(tmp_path / "whole")[2:] == losses_of(tmp_path / "parts")


def test_bf16_arithmetic_keeps_float32_weights(golden_model, images, tmp_path):
    path = train(golden_model, images, tmp_path / "out", "--max_train_steps", "2", "--mixed_precision", "bf16", "--learning_rate", "1e-6")  # fmt: skip
    before, after = tensors_of(golden_model), tensors_of(path)
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    assert (
        after[name].dtype is torch.float32
        and 0 < (after[name] - before[name].float()).abs().max() < 1e-5
    )


@pytest.mark.parametrize("extra, tokens", [
    (["--block_lr", "1,2"], ["--block_lr", "23", "'1,2'"]),
    (["--train_text_encoder"], ["--train_text_encoder", "--cache_text_encoder_outputs"]),
    (["--learning_rate_te1", "1e-4"], ["--learning_rate_te1", "--train_text_encoder"]),
    (["--learning_rate", "0"], ["learning rate", "0"]),
    (["--block_lr", ",".join(["0"] * 23)], ["learning rate", "0"]),
])  # fmt: skip
def test_what_cant_work_is_refused(extra, tokens, golden_model, images, tmp_path):
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        train(golden_model, images, tmp_path / "out", *extra)


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_text_encoders_that_are_trained_alone_may_not_stop_before_the_run_ends(dry, golden_model, images, tmp_path, capsys):  # fmt: skip
    words = ["--learning_rate", "0", "--train_text_encoder", "--learning_rate_te1", "1e-5", "--max_train_steps", "4", "--stop_text_encoder_training"]  # fmt: skip
    with pytest.raises(OptionError, match=mentioning("--stop_text_encoder_training", "2", "4")):
        train(golden_model, images, tmp_path / "out", *words, "2", *dry, quick=TEXT_TOO)
    assert "caching" not in capsys.readouterr().err
    check_trains_to_the_end([ParamGroup("text_encoder1", {}, 1e-5, "text_encoder_1", 4)], 4)
    check_trains_to_the_end(
        [ParamGroup("text_encoder1", {}, 1e-5, "text_encoder_1", 2), ParamGroup("unet", {}, 1e-5)],
        4,
    )
    with pytest.raises(
        OptionError,
        match=r"^--stop_text_encoder_training and --ti_stop_ratio: .* after step 3 of 4",
    ):
        check_trains_to_the_end(
            [
                ParamGroup("textencoder", {}, 1e-5, "text_encoders", 2),
                ParamGroup("token", {}, 1e-5, "token", 3),
            ],
            4,
        )
