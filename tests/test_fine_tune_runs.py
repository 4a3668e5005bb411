"""What holds for every run holds for full fine-tuning: it learns, validates, weighs, is checked before, survives faults."""

import json

import pytest
import torch
from conftest import open_models
from forked import end_together, processes
from messages import mentioning
from PIL import Image
from running import losses_of, tensors_of

from library.errors import NotFinite
from library.models.checkpoint.writer import save_diffusers
from library.safetensors_io import write_safetensors
from library.training.options.tasks import FineTuneOptions
from library.training.tasks.base import TaskSettings
from library.training.tasks.fine_tune import FineTune
from tools.make_tiny_dataset import make_images
from tools.tiny_models import SMALLEST, random_checkpoint

QUICK = [
    "--resolution", "64", "--cache_latents", "--cache_text_encoder_outputs", "--max_data_loader_n_workers", "0", "--learning_rate", "1e-4",
    "--seed", "7", "--output_name", "lora",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of four million numbers, for steps that take no time."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_safetensors(path, random_checkpoint(SMALLEST, 0), {"format": "pt"})
    return path


def words_of(model, images, output, *extra):
    files = [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--output_dir",
        output,
    ]
    return [str(word) for word in [*QUICK, *files, *extra]]


def train(model, images, output, *extra):
    import sdxl_train

    sdxl_train.main(words_of(model, images, output, *extra))
    return output / "lora.safetensors"


@pytest.mark.numeric
@pytest.mark.parametrize("extra", [
    [],
    pytest.param(["--mixed_precision", "bf16", "--full_bf16", "--no_half_vae"], marks=pytest.mark.long),
])  # fmt: skip
def test_the_loss_of_three_images_falls_under_a_third_of_its_start(extra, model, tmp_path):
    make_images(tmp_path / "pictures" / "1_shape", 3, seed=1)
    faster = ["--train_batch_size", "3", "--learning_rate", "3e-3", "--max_train_steps", "45"]
    train(model, tmp_path / "pictures", tmp_path / "out", *faster, *extra)
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 45 and sum(losses[-10:]) / 10 < losses[0] / 3


def test_validation_best_saves_and_weights_of_regularisation_images(model, images, tmp_path):
    make_images(tmp_path / "reg" / "1_shape", 2, seed=9)
    words = [
        "--validation_split",
        "0.5",
        "--validation_seed",
        "3",
        "--validate_every_n_steps",
        "4",
        "--save_best",
    ]
    words += [
        "--reg_data_dir",
        tmp_path / "reg",
        "--prior_loss_weight",
        "0",
        "--max_train_steps",
        "8",
    ]
    final = train(model, images, tmp_path / "out", *words)
    validated = losses_of(tmp_path / "out", "loss/validation/step_average")
    assert len(validated) == 2 and all(loss > 0 for loss in validated)
    assert tensors_of(final).keys() == tensors_of(final.with_name("lora-best.safetensors")).keys()
    losses = losses_of(tmp_path / "out")
    assert len(losses) == 8 and losses.count(0.0) == 4


def test_pixels_that_a_mask_hides_dont_count(model, images, tmp_path):
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.putalpha(0)
        image.save(path)
    train(
        model,
        images,
        tmp_path / "out",
        "--alpha_mask",
        "--max_train_steps",
        "2",
        "--learning_rate",
        "1e-12",
    )
    assert losses_of(tmp_path / "out") == [0.0, 0.0]


def test_a_dry_run_tells_what_would_be_trained_and_writes_nothing(model, images, tmp_path, capsys):
    rates = ",".join("1e-6" if block in (5, 11) else "0" for block in range(23))
    train(
        model,
        images,
        tmp_path / "out",
        "--dry_run",
        "--block_lr",
        rates,
        "--save_every_n_steps",
        "400",
    )
    page = " ".join(capsys.readouterr().out.split())
    assert "block5 " in page and "block11 " in page and "block6 " not in page
    assert "lora-step00000400" in page
    assert not (tmp_path / "out").exists()


def tuned(path, **options):
    models = open_models(path)
    models.trained = frozenset({"unet"})
    return FineTune(
        models,
        TaskSettings(lr=1e-4, num_tokens=75, text_is_cached=True),
        (FineTuneOptions(**options),),
    ).trainables[0]


def test_weights_that_arent_finite_are_never_saved(model, tmp_path):
    part = tuned(model)
    part.save(tmp_path / "lora", None, {})
    before = (tmp_path / "lora.safetensors").read_bytes()
    with torch.no_grad():
        part.tensors()["model.diffusion_model.out.2.bias"][1] = torch.nan
    with pytest.raises(
        NotFinite,
        match=mentioning(
            tmp_path / "lora", "1", "finite|NaN|Inf", "model.diffusion_model.out.2.bias"
        ),
    ):
        part.save(tmp_path / "lora", None, {})
    assert (tmp_path / "lora.safetensors").read_bytes() == before


def test_a_folder_whose_save_fails_stays_what_it_was(model, tmp_path, monkeypatch):
    part = tuned(model, save_model_as="diffusers")
    folder = part.save(tmp_path / "lora", None, {})
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 9

    def full(target, *args, **kwargs):
        save_diffusers(target, *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.training.tasks.fine_tune.save_diffusers", full)
    with torch.no_grad():
        part.tensors()["model.diffusion_model.out.2.bias"].add_(1)
    with pytest.raises(OSError, match="No space left"):
        part.save(tmp_path / "lora", None, {})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_another_vae_is_part_of_the_saved_model_and_nothing_else_changes(model, tmp_path):
    vae = {
        name: tensor + 0.5
        for name, tensor in tensors_of(model).items()
        if name.startswith("first_stage_model.")
    }  # fmt: skip
    write_safetensors(tmp_path / "vae.safetensors", vae, {})
    models = open_models(model, vae=str(tmp_path / "vae.safetensors"))
    models.trained = frozenset({"unet"})
    task = FineTune(
        models, TaskSettings(lr=1e-4, num_tokens=75, text_is_cached=True), (FineTuneOptions(),)
    )
    saved, before = (
        tensors_of(task.trainables[0].save(tmp_path / "lora", None, {})),
        tensors_of(model),
    )
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], vae.get(name, before[name])) for name in before)


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_accumulation(model, images, tmp_path):
    """Images by --dataset_config; losses 1e-5, weights 1e-4."""
    config = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": str(images / "2_shapes"), "num_repeats": 2}]}]}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(config), encoding="utf-8")
    quick = ["--dataset_config", tmp_path / "data.json", "--max_train_steps", "4"]
    one = train(model, images, tmp_path / "one", *quick, "--gradient_accumulation_steps", "2")
    words = words_of(model, images, tmp_path / "two", *quick)
    end_together(processes("sdxl_train.py", *words, count=2))
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), abs=1e-5)
    after = tensors_of(tmp_path / "two" / "lora.safetensors")
    for name, tensor in tensors_of(one).items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-4)
