"""Training a ControlNet-LLLite: golden 10 replayed, through the script, what its files are, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import end_together, processes
from messages import mentioning, mentions
from PIL import Image
from replay import Golden, replay
from running import assert_bit_equal, losses_of, tensors_of, without
from tolerance import REPLAYED_LLLITE, assert_trained

from library.errors import OptionError
from library.safetensors_io import load_tensors, read_header, write_safetensors
from library.training.options.objective import LossOptions
from library.training.options.optimizer import ScheduleOptions
from library.training.options.tasks import LLLiteOptions
from library.training.tasks.base import TaskSettings
from library.training.tasks.lllite import LLLiteTask

QUICK = [
    "--cond_emb_dim", "4", "--network_dim", "4", "--resolution", "64", "--enable_bucket", "--min_bucket_reso", "32",
    "--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--cache_latents", "--cache_text_encoder_outputs",
    "--max_data_loader_n_workers", "0", "--learning_rate", "1e-3", "--seed", "7", "--max_train_steps", "2",
]  # fmt: skip


@pytest.fixture
def conditions(images) -> Path:
    """The outline of each image, under its name."""
    folder = images.parent / "conditions"
    folder.mkdir()
    for file in (images / "2_shapes").glob("*.png"):
        with Image.open(file) as image:
            edges = (
                np.abs(np.diff(np.asarray(image.convert("L")).astype(int), axis=1, prepend=0)) > 8
            )
            Image.fromarray((edges * 255).astype(np.uint8)).convert("RGB").save(folder / file.name)
    return folder


def train(model: Path, images: Path, conditions: Path | None, output: Path, *extra: object) -> Path:
    import sdxl_train_control_net_lllite as script

    files = ["--pretrained_model_name_or_path", model, "--train_data_dir", images, "--output_dir", output, "--output_name", "lora"]  # fmt: skip
    files += [] if conditions is None else ["--conditioning_data_dir", conditions]
    script.main([str(word) for word in (*QUICK, *files, *extra)])
    return output / "lora.safetensors"


# --------------------------------------------------------------------------------------------------------------- golden


def test_golden_10_lllite(own_models):
    golden = Golden("lllite")
    options = LLLiteOptions(cond_emb_dim=8, network_dim=8)
    task = LLLiteTask(
        own_models, TaskSettings(lr=1e-3, num_tokens=75, text_is_cached=True), (options,)
    )
    steps = replay(
        golden, own_models, task, optimizer_args={}, schedule=ScheduleOptions(), loss=LossOptions(), lr=1e-3, accumulation=1, cached_text=True,
    )  # fmt: skip
    for number, rates in steps:
        assert rates == golden.facts["lr_per_step"][number]
    tensors = task.trainables[0].tensors()
    assert list(tensors) == [name for name in tensors if name in golden.output] and len(
        tensors
    ) == len(golden.output)
    for name, tensor in golden.output.items():
        if not name.endswith(
            "attn1_to_k.up.0.bias"
        ):  # a softmax doesn't see it, so its gradient is rounding error
            torch.testing.assert_close(
                tensors[name].detach(), tensor, rtol=0, atol=REPLAYED_LLLITE, msg=name
            )


# --------------------------------------------------------------------------------------------------- through the script


def test_a_run_trains_every_module_and_saves_what_the_node_reads(
    golden_model, images, conditions, tmp_path
):
    """Names, shapes and metadata by the contract; the base model isn't touched; the file goes on being trained."""
    path = train(golden_model, images, conditions, tmp_path / "out", "--max_train_steps", 3)
    tensors, metadata = tensors_of(path), read_header(path).metadata
    assert {name.split(".", 1)[1].rsplit(".", 1)[0] for name in tensors} == {
        "conditioning1.0", "conditioning1.2", "conditioning1.4", "down.0", "mid.0", "up.0",
    }  # fmt: skip
    assert len({name.partition(".")[0] for name in tensors}) == 32
    # It starts at zero; of networks as narrow as these some are dead.
    assert sum(bool(tensors[name].any()) for name in tensors if name.endswith("up.0.weight")) > 24
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert not any(key.startswith(("ss_", "sshs_")) for key in metadata)
    again = train(golden_model, images, conditions, tmp_path / "again", "--network_weights", path, "--learning_rate", "1e-9")  # fmt: skip
    for name, tensor in tensors_of(again).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-7)


def test_a_resumed_run_equals_one_that_went_on_and_ema_validation_and_previews_run(golden_model, images, conditions, tmp_path):  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    condition = next(conditions.iterdir())
    prompts.write_text(
        f"a red square --cn {condition} --s 2 --w 64 --h 64 --d 1\n", encoding="utf-8"
    )
    common = [
        "--network_dropout",
        "0.1",
        "--ema_decay",
        "0.5",
        "--validation_split",
        "0.25",
        "--validate_every_n_steps",
        "2",
        "--flip_aug",
    ]
    common += ["--sample_prompts", prompts, "--sample_every_n_steps", "2"]
    whole = train(
        golden_model, images, conditions, tmp_path / "whole", *common, "--max_train_steps", 4
    )
    train(golden_model, images, conditions, tmp_path / "part", *common, "--max_train_steps", 4, "--save_every_n_steps", 2, "--save_state")  # fmt: skip
    state = tmp_path / "part" / "lora-step00000002-state"
    resumed = train(golden_model, images, conditions, tmp_path / "rest", *common, "--max_train_steps", 4, "--resume", state)  # fmt: skip
    assert_bit_equal(tensors_of(resumed), tensors_of(whole))
    assert (tmp_path / "whole" / "lora-ema.safetensors").is_file()
    log = [
        json.loads(line)
        for line in (tmp_path / "whole" / "lora-log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any("validation" in key for row in log for key in row)
    drawn = {path.name.split("_")[1]: np.asarray(Image.open(path)) for path in (tmp_path / "whole" / "sample").glob("lora_0*_1.png")}  # fmt: skip
    assert sorted(drawn) == ["000002", "000004"]


def test_what_is_drawn_uncached_in_bf16_with_checkpointing_only_in_chosen_blocks(golden_model, images, conditions, tmp_path):  # fmt: skip
    words = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--lllite_blocks", "input_blocks.4", "output_blocks", "--color_aug"]  # fmt: skip
    import sdxl_train_control_net_lllite as script

    quick = [word for word in QUICK if not word.startswith("--cache")]
    files = ["--pretrained_model_name_or_path", golden_model, "--train_data_dir", images, "--conditioning_data_dir", conditions]  # fmt: skip
    script.main(
        [
            str(w)
            for w in (
                *quick,
                *files,
                "--output_dir",
                tmp_path / "out",
                "--output_name",
                "lora",
                *words,
            )
        ]
    )
    modules = {name.partition(".")[0] for name in tensors_of(tmp_path / "out" / "lora.safetensors")}
    assert {"_".join(name.split("_")[2:5]) for name in modules} == {"input_blocks_4", *(f"output_blocks_{i}" for i in range(6))}  # fmt: skip
    assert all(np.isfinite(losses_of(tmp_path / "out")))


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_accumulation(
    golden_model, images, conditions, tmp_path
):
    """Losses 1e-5, weights 1e-4; what moves all keys alike has a gradient that is noise, and is left out."""
    one = train(
        golden_model, images, conditions, tmp_path / "one", "--gradient_accumulation_steps", 2
    )
    words = [
        *QUICK,
        "--pretrained_model_name_or_path",
        golden_model,
        "--train_data_dir",
        images,
        "--output_name",
        "lora",
    ]
    words += ["--conditioning_data_dir", conditions, "--output_dir", tmp_path / "two"]
    end_together(processes("sdxl_train_control_net_lllite.py", *words, count=2))
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), abs=1e-5)
    files = tensors_of(tmp_path / "two" / "lora.safetensors"), tensors_of(one)
    noise = {name for name in files[1] if name.endswith("attn1_to_k.up.0.bias")}
    assert_trained(*({name: tensors[name] for name in tensors.keys() - noise} for tensors in files))


def test_the_right_condition_makes_the_loss_smaller_than_a_shuffled_one(own_models):
    """Trained for a few steps on four noises that the conditions show: the loss with another's condition is larger."""
    from library.data.batch import Batch
    from library.data.batch_sampler import BatchPosition
    from library.models.text_encoders import EncodedText
    from library.training.objective.noise import NoisedLatents

    torch.manual_seed(0)
    task = LLLiteTask(own_models, TaskSettings(lr=1e-3, num_tokens=75, text_is_cached=True), (LLLiteOptions(cond_emb_dim=8, network_dim=16),))  # fmt: skip
    count, side = 4, 8
    noise, clean = torch.randn(2, count, 4, side, side)
    # The image of the condition shows the noise that the U-Net should find.
    shown = torch.nn.functional.interpolate(noise[:, :3], scale_factor=8).clamp(-1, 1)
    timesteps = torch.full((count,), 999)
    noisy = NoisedLatents(
        latents=torch.randn_like(noise), noise=noise, clean=clean, timesteps=timesteps
    )
    with torch.no_grad():
        text = own_models.encode_texts(["a square"] * count, 75)
    batch = Batch(
        BatchPosition(0, 0, 0, 0, count, True, False), ("",) * count, ("",) * count, None, None, EncodedText(*text),
        torch.full((count, 2), side * 8), torch.zeros(count, 2), torch.full((count, 2), side * 8), torch.ones(count), conditioning=shown,
    )  # fmt: skip
    conditioned = task.encode_text(batch)
    optimizer = torch.optim.AdamW(task.trainables[0].tensors().values(), lr=5e-3)

    def loss(conditions):
        extra = task.control_inputs(conditions)
        predicted = own_models.unet(noisy.latents, timesteps, conditioned.context, task.vector(conditioned, batch), extra)  # fmt: skip
        return torch.nn.functional.mse_loss(predicted, noise)

    for _ in range(30):
        optimizer.zero_grad()
        loss(shown).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (
            loss(shown),
            torch.stack([loss(shown.roll(i, dims=0)) for i in range(1, count)]),
        )
    assert right < 0.95 * wrong.min(), (right, wrong)


# --------------------------------------------------------------------------------------------------- what can't be done


@pytest.mark.parametrize(
    "words, tokens",
    [
        (["--cond_emb_dim", "5"], ("--cond_emb_dim", "5", "even")),
        (["--lllite_blocks", "input4"], ("--lllite_blocks", "input4", "input_blocks.4")),
        (["--lllite_blocks", "input_blocks.1"], ("--lllite_blocks", "input_blocks.1", "input_blocks.4", "input_blocks.5")),
        (["--network_weights", "nowhere.safetensors"], ("--network_weights", "nowhere.safetensors", "file")),
        (["--masked_loss"], ("--masked_loss", "conditioning_data_dir", "--alpha_mask")),
        (["--random_crop"], ("random_crop", "conditioning_data_dir")),
        (["--learning_rate", "0"], ("--learning_rate", "0")),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(
    words, tokens, golden_model, images, conditions, tmp_path
):
    with pytest.raises(OptionError) as error:
        train(golden_model, images, conditions, tmp_path / "out", *words)
    assert mentions(str(error.value), *tokens)


def test_without_buckets_the_condition_must_follow(
    golden_model, images, conditions, tmp_path, monkeypatch
):
    monkeypatch.setitem(globals(), "QUICK", without(QUICK, "--enable_bucket", "--cache_latents"))
    with pytest.raises(OptionError) as error:
        train(
            golden_model,
            images,
            conditions,
            tmp_path / "out",
            "--resolution",
            72,
            "--face_crop_aug_range",
            "1,3",
        )
    assert mentions(str(error.value), "face_crop_aug_range", "conditioning_data_dir")
    assert mentions(str(error.value), "resolution", "72x72", "32")


def test_missing_conditions_are_told(golden_model, images, conditions, tmp_path):
    with pytest.raises(OptionError, match=mentioning("2_shapes", "conditioning_data_dir")):
        train(golden_model, images, None, tmp_path / "out")
    first, second, *_ = sorted(conditions.iterdir())
    first.unlink()
    Image.new("RGB", (30, 300)).save(second)
    with pytest.raises(OptionError) as error:
        train(golden_model, images, conditions, tmp_path / "out")
    assert mentions(str(error.value), first.stem, conditions, "conditioning")
    assert mentions(str(error.value), second, "30x300", "shape|aspect ratio")


def test_a_file_of_other_sizes_or_another_kind_is_told(golden_model, images, conditions, tmp_path):
    path = train(golden_model, images, conditions, tmp_path / "out", "--max_train_steps", 1)
    with pytest.raises(
        OptionError,
        match=mentioning("--network_weights", path, "shape", "[4]", "[6]", "--allow_partial"),
    ):
        train(
            golden_model,
            images,
            conditions,
            tmp_path / "again",
            "--network_weights",
            path,
            "--network_dim",
            "6",
        )
    write_safetensors(
        tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, {}
    )
    with pytest.raises(
        OptionError,
        match=mentioning(
            "--network_weights", "lora.safetensors", "LoRA", "ControlNet-LLLite", "lllite_unet"
        ),
    ):
        train(golden_model, images, conditions, tmp_path / "again", "--network_weights", tmp_path / "lora.safetensors")  # fmt: skip


def test_dry_run_tells_and_writes_nothing(golden_model, images, conditions, tmp_path, capsys):
    train(golden_model, images, conditions, tmp_path / "out", "--dry_run")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_debug_dataset_shows_each_image_with_its_condition(
    golden_model, images, conditions, tmp_path
):
    train(golden_model, images, conditions, tmp_path / "out", "--debug_dataset")
    html = (tmp_path / "out" / "lora-dataset.html").read_text(encoding="utf-8")
    count = len(list((images / "2_shapes").glob("*.png")))
    assert (
        len(re.findall('alt="[^"]*condition[^"]*"', html)) == count
        and html.count("data:image/jpeg;base64,") == 2 * count
    )


def test_the_final_file_draws_as_the_network_that_was_trained(
    golden_model, images, conditions, own_models, tmp_path
):
    """What training's predict gives and what the loaded file gives are the same."""
    from networks.lllite import attention_projections, to_control_inputs
    from networks.lllite_file import lllite_from_file

    path = train(golden_model, images, conditions, tmp_path / "out")
    net = lllite_from_file(
        path, attention_projections(own_models.unet), flag="--control_net_lllite_models"
    )
    golden, _ = load_tensors(Path(__file__).parent / "golden" / "02_unet.safetensors")
    inputs = [golden[f"a.{name}"][:1] for name in ("latents", "timesteps", "context", "y")]
    condition = torch.rand(1, 3, inputs[0].shape[2] * 8, inputs[0].shape[3] * 8) * 2 - 1
    task = LLLiteTask(
        own_models,
        TaskSettings(lr=1e-3, num_tokens=75, text_is_cached=True),
        (LLLiteOptions(network_weights=path),),
    )
    task._net.eval()
    with torch.no_grad():
        loaded = own_models.unet(*inputs, to_control_inputs(net(condition)))
        assert torch.equal(loaded, own_models.unet(*inputs, task.control_inputs(condition)))
        assert not torch.equal(loaded, own_models.unet(*inputs))
