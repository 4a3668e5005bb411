"""A tiny twin of each SDXL, end to end: trained, saved, loaded again, drawn with. And what is special about each."""

import json

import pytest
import torch
from conftest import open_models
from messages import mentioning
from PIL import Image
from running import QUICK, tensors_of, train_network, without
from tolerance import assert_network

from library.data.inpainting_masks import random_masks
from library.errors import OptionError
from library.models import vae
from library.models.checkpoint.reader import open_checkpoint
from library.models.unet_blocks import sinusoidal_embedding
from library.rng import SampleRng
from library.safetensors_io import read_header, write_safetensors
from library.training.tasks.base import Task

TRAIN = without(
    QUICK, "--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only"
)


def fine_tune(model, images, output, *extra, quick=TRAIN):
    import sdxl_train

    files = [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--output_dir",
        output,
    ]
    sdxl_train.main([str(word) for word in [*quick, *files, "--output_name", "tuned", "--max_train_steps", "2", *extra]])  # fmt: skip
    return output / "tuned.safetensors"


@pytest.mark.parametrize("name", [
    *("ssd-1b", "refiner", "inpainting"),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("base", "base-v", "vega")),
])  # fmt: skip
def test_a_twin_of_each_is_trained_saved_loaded_again_and_drawn_with(name, twins, images, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --n dark --w 64 --h 64 --s 2 --l 5\n")
    drawing = ["--sample_prompts", prompts, "--sample_every_n_steps", "2"]
    drawing += ["--mixed_precision", "bf16"] if name == "inpainting" else []
    tuned = fine_tune(twins(name), images, tmp_path / "out", *drawing)
    before, after = tensors_of(twins(name)), tensors_of(tuned)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("model.diffusion_model.") for key in changed)
    assert len(list((tmp_path / "out" / "sample").glob("tuned_000002_00_*.png"))) == 1
    assert {"v_pred", "ztsnr"} & after.keys() == (
        {"v_pred", "ztsnr"} if name == "base-v" else set()
    )
    one, two = open_checkpoint(str(twins(name))), open_checkpoint(str(tuned))
    assert one.unet == two.unet and one.parts == two.parts
    assert torch.equal(
        open_models(tuned).unet.out[2].weight, after["model.diffusion_model.out.2.weight"]
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["base-v", "ssd-1b", "vega", "inpainting"])
def test_a_lora_on_a_twin_of_each_is_trained_and_drawn_with(name, twins, images, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --l 5\n", encoding="utf-8")
    drawing = ["--sample_prompts", prompts, "--sample_every_n_steps", "2", "--max_train_steps", "2"]
    lora = train_network(twins(name), images, tmp_path / "out", *drawing)
    ups = {
        key: tensor for key, tensor in tensors_of(lora).items() if key.endswith("lora_up.weight")
    }
    assert len(list((tmp_path / "out" / "sample").glob("lora_000002_00_*.png"))) == 1
    assert ups and all(tensor.any() for tensor in ups.values())
    assert ("lora_unet_middle_block_1_proj_in.lora_up.weight" in ups) == (
        name in ("base-v", "inpainting")
    )


@pytest.mark.numeric
@pytest.mark.long
@pytest.mark.parametrize("name", ["ssd-1b", "vega"])
def test_a_folder_of_a_smaller_twin_is_diffusers_too(name, twins, tmp_path):
    """Attention depths that differ within a level, and a middle without attention."""
    from library.imports import import_diffusers

    models = folder_of(twins(name), tmp_path)
    theirs = import_diffusers().UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    rng = torch.Generator().manual_seed(2)
    latents, context = (
        torch.randn(1, 4, 8, 8, generator=rng),
        torch.randn(1, 77, 192, generator=rng),
    )
    added = {"text_embeds": torch.zeros(1, 128), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        expected = theirs(latents, torch.tensor([400]), context, added_cond_kwargs=added).sample
        found = models.unet(latents, torch.tensor([400]), context, models_vector())
    assert_network(found, expected)


def folder_of(path, folder):
    """The model as a Diffusers folder."""
    from library.models.checkpoint.writer import save_diffusers

    models = open_models(path)
    save_diffusers(folder, models.checkpoint, {}, models.tokenizers)
    return models


@pytest.mark.numeric
def test_the_refiner_is_diffusers_refiner(twins, tmp_path):
    """One text encoder, and an aesthetic score in the place of the target size."""
    from library.imports import import_diffusers
    from library.models.size_conditioning import conditioning_vector

    models = folder_of(twins("refiner"), tmp_path)
    pipeline = import_diffusers().StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path)
    assert pipeline.text_encoder is None and pipeline.config.requires_aesthetics_score
    latents, timesteps = (
        torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 700]),
    )
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            ["a cat", "dogs"], device="cpu", do_classifier_free_guidance=False
        )
        sizes = [[200.0, 300, 0, 16, 7.5]] * 2
        theirs = pipeline.unet(
            latents,
            timesteps,
            context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor(sizes)},
        ).sample
        text = models.encode_texts(["a cat", "dogs"], 75)
        numbers = torch.tensor(sizes)
        vector = conditioning_vector(text.pooled, numbers[:, :2], numbers[:, 2:4], numbers[:, 4:])
        ours = models.unet(
            latents, timesteps, torch.cat([text.hidden_1, text.hidden_2], -1), vector
        )
    assert text.hidden_1.shape == (2, 77, 0)
    assert_network(text.pooled, pooled)
    assert_network(ours, theirs)
    again = open_checkpoint(str(tmp_path))
    assert again.unet == models.checkpoint.unet and again.parts == ["unet", "text_encoder_2", "vae"]


@pytest.mark.numeric
def test_an_inpainting_model_sees_what_diffusers_pipeline_shows_it(twins, tmp_path):
    from library.imports import import_diffusers
    from library.models.inpainting import inpainting_channels

    models = folder_of(twins("inpainting"), tmp_path)
    pipeline = import_diffusers().StableDiffusionXLInpaintPipeline.from_pretrained(tmp_path)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 10:40, 24:70] = 1
    with torch.no_grad():
        shown = image * (mask < 0.5)
        theirs = pipeline.prepare_mask_latents(
            mask,
            shown,
            1,
            64,
            96,
            torch.float32,
            "cpu",
            torch.Generator().manual_seed(5),
            do_classifier_free_guidance=False,
        )
        noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))
        ours = inpainting_channels(
            image, mask[:, 0], lambda masked: models.encode_images(masked, noise)
        )
        assert_network(ours, torch.cat(theirs, 1))
        seen = torch.cat([torch.randn(1, 4, 8, 12), ours], 1)
        context, vector = torch.randn(1, 77, 192), torch.zeros(1, 1664)
        added = {"text_embeds": torch.zeros(1, 128), "time_ids": torch.zeros(1, 6)}
        vector = models_vector()
        expected = pipeline.unet(seen, torch.tensor([5]), context, added_cond_kwargs=added).sample
        assert_network(models.unet(seen, torch.tensor([5]), context, vector), expected)


def models_vector():
    from library.models.size_conditioning import conditioning_vector

    nothing = torch.zeros(1, 2)
    return conditioning_vector(torch.zeros(1, 128), nothing, nothing, nothing)


# ----------------------------------------------------------------------------------------------------------- inpainting


@pytest.fixture
def seen(monkeypatch):
    """What the U-Net gets in each step: (input, vector, batch)."""
    found, model_input, vector = [], Task.model_input, Task.vector

    def noted(self, noisy, batch):
        found.append([model_input(self, noisy, batch)])
        return found[-1][0]

    def noted_too(self, text, batch):
        found[-1] += [vector(self, text, batch), batch]
        return found[-1][1]

    monkeypatch.setattr(Task, "model_input", noted)
    monkeypatch.setattr(Task, "vector", noted_too)
    return found


def masks_of(images, folder):
    """A mask for each image, its left half white: as an image's own alpha channel too."""
    folder.mkdir()
    for path in sorted(images.rglob("*.png")):
        with Image.open(path) as image:
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (0, 0, image.width // 2, image.height))
            image = image.convert("RGB")
        image.putalpha(mask)
        image.save(path)
        mask.save(folder / path.name)


FOLDER = ["--conditioning_data_dir", "MASKS"]


MEMORY, DISK = ["--cache_latents"], ["--cache_latents", "--cache_latents_to_disk"]


@pytest.mark.parametrize("extra, cache", [
    (["--alpha_mask", "--flip_aug"], MEMORY), (FOLDER, DISK),
    *(pytest.param(*one, marks=pytest.mark.long) for one in (([*FOLDER, "--masked_loss"], MEMORY), (["--alpha_mask", "--flip_aug"], DISK))),
])  # fmt: skip
def test_an_inpainting_model_paints_what_a_mask_marks_and_what_it_sees_may_be_cached(extra, cache, twins, images, seen, tmp_path, monkeypatch):  # fmt: skip
    """From images and from a cache: the same losses. But for the posterior's noise, which is left out."""
    monkeypatch.setattr(
        vae,
        "_encode",
        lambda model, images, noise, real=vae._encode: real(model, images, 0 * noise),
    )
    masks_of(images, tmp_path / "masks")
    words = [str(tmp_path / "masks") if word == "MASKS" else word for word in extra]
    losses, inputs = [], []
    for number, cached in enumerate(([], cache)):
        seen.clear()
        output = tmp_path / f"out{number}"
        fine_tune(
            twins("inpainting"),
            images,
            output,
            *words,
            *cached,
            quick=without(TRAIN, "--cache_latents"),
        )
        losses.append(logged_losses(output))
        inputs.append([x for x, _, _ in seen])
        assert all((batch.images is None) == bool(cached) for _, _, batch in seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for x, first in zip(*inputs, strict=True):
        assert_network(x, first)
        width = x.shape[3] // 2
        halves = x[:, 4, :, : width - 1], x[:, 4, :, width + 1 :]
        assert {half.unique().item() for half in halves} == {0.0, 1.0} and (
            "--flip_aug" in extra or halves[0].all()
        )


def logged_losses(output):
    lines = (output / "tuned-log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss/current"] for row in map(json.loads, lines) if "loss/current" in row]


def test_masks_of_a_folder_weigh_the_loss_with_masked_loss_alone(twins, images, tmp_path):
    """A mask that is black everywhere: nothing to paint, and with --masked_loss nothing counts. Other models want the option."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            Image.new("L", image.size).save(masks / path.name)
    few = [*FOLDER[:1], masks, "--max_train_steps", "1"]
    fine_tune(twins("inpainting"), images, tmp_path / "all", *few)
    fine_tune(twins("inpainting"), images, tmp_path / "none", *few, "--masked_loss")
    assert logged_losses(tmp_path / "all")[0] > 0.1 and logged_losses(tmp_path / "none") == [0.0]
    with pytest.raises(
        OptionError,
        match=mentioning(images, "conditioning_data_dir", "inpainting", "--masked_loss"),
    ):
        fine_tune(twins("base"), images, tmp_path / "base", *few)


def test_masks_are_drawn_by_place_where_there_are_none(twins, images, seen, tmp_path):
    fine_tune(twins("inpainting"), images, tmp_path / "out", "--max_train_steps", "3")
    masks = [x[:, 4] for x, _, _ in seen]
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any() for mask in masks)
    shares = [random_masks(SampleRng(5, 0, place, 1), 64, 96).mean().item() for place in range(200)]
    assert 0.15 < sum(share == 1 for share in shares) / 200 < 0.35 and min(shares) > 0
    together, apart = (
        random_masks(SampleRng(5, 0, 3, 2), 64, 96),
        random_masks(SampleRng(5, 0, 4, 1), 64, 96),
    )
    assert torch.equal(together[1:], apart)


# -------------------------------------------------------------------------------------------------------------- refiner


def test_the_refiner_is_told_each_images_score(twins, images, seen, tmp_path):
    """From the metadata file; from --aesthetic_score where that has none."""
    files = sorted(images.rglob("*.png"))[:2]
    rows = {str(file): {"caption": "a shape"} for file in files}
    rows[str(files[0])]["aesthetic_score"] = 7.5
    (tmp_path / "meta.json").write_text(json.dumps(rows), encoding="utf-8")
    fine_tune(
        twins("refiner"),
        files[0].parent,
        tmp_path / "out",
        "--in_json",
        tmp_path / "meta.json",
        "--aesthetic_score",
        "4",
    )
    expected = {str(files[0]): 7.5, str(files[1]): 4.0}
    assert {path for _, _, batch in seen for path in batch.paths} == set(expected)
    for _, vector, batch in seen:
        told = torch.stack(
            [sinusoidal_embedding(torch.tensor([expected[path]]), 256)[0] for path in batch.paths]
        )
        torch.testing.assert_close(vector[:, -256:], told)
        assert vector.shape[1] == 128 + 5 * 256


def test_a_lora_on_the_refiner_has_its_second_text_encoder_alone(twins, images, tmp_path):
    words = without(QUICK, "--network_train_unet_only", "--cache_text_encoder_outputs")
    lora = train_network(
        twins("refiner"), images, tmp_path / "out", "--max_train_steps", "2", quick=words
    )
    parts = {name.split("_")[1] for name in tensors_of(lora)}
    assert parts == {"unet", "te2"}
    assert (
        read_header(lora).metadata["modelspec.architecture"]
        == "stable-diffusion-xl-v1-refiner/lora"
    )


def test_what_cant_be_trained_is_refused_by_name(twins, images, tmp_path):
    import sdxl_train_textual_inversion

    files = [
        "--pretrained_model_name_or_path",
        twins("refiner"),
        "--train_data_dir",
        images,
        "--output_dir",
        tmp_path,
    ]
    with pytest.raises(OptionError, match=mentioning(twins("refiner"), "text encoders", "refiner")):
        sdxl_train_textual_inversion.main(
            [
                str(word)
                for word in [
                    *files,
                    "--token_string",
                    "zyx",
                    "--use_object_template",
                    "--resolution",
                    "64",
                ]
            ]
        )
    tensors = tensors_of(twins("base"))
    one = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("conditioner.embedders.0")
    }
    write_safetensors(tmp_path / "one.safetensors", one, {})
    with pytest.raises(OptionError, match=mentioning("one.safetensors", "text encoder 1")):
        fine_tune(tmp_path / "one.safetensors", images, tmp_path / "out")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    write_safetensors(
        tmp_path / "five.safetensors", {**tensors, name: torch.zeros(32, 5, 3, 3)}, {}
    )
    with pytest.raises(OptionError, match=mentioning("five.safetensors", "U-Net", "5", "channels")):
        fine_tune(tmp_path / "five.safetensors", images, tmp_path / "out")
