"""A tiny twin of each SDXL, end to end: trained, saved, loaded again, drawn with. And what is special about each."""

import pytest
import torch
from conftest import open_models
from running import QUICK, tensors_of

from library.models.checkpoint import open_checkpoint
from library.safetensors_io import write_safetensors
from tools.tiny_models import TWINS, tiny_checkpoint

TRAIN = [word for word in QUICK if word not in ("--network_module", "networks.lora", "--network_dim", "2", "--network_train_unet_only")]  # fmt: skip


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Makes the twin of a name, once."""
    folder = tmp_path_factory.mktemp("twins")

    def twin(name):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            family, is_v = name.removesuffix("-v"), name.endswith("-v")
            write_safetensors(path, tiny_checkpoint(3, twin=family, v_prediction=is_v), {"format": "pt"})
        return path

    return twin


def fine_tune(model, pictures, output, *extra):
    import sdxl_train

    files = ["--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--output_dir", output]
    sdxl_train.main([str(word) for word in [*TRAIN, *files, "--output_name", "tuned", "--max_train_steps", "2", *extra]])  # fmt: skip
    return output / "tuned.safetensors"


@pytest.mark.parametrize("name", ["base-v", *TWINS])
def test_a_twin_of_each_is_trained_saved_loaded_again_and_drawn_with(name, twins, pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --n dark --w 64 --h 64 --s 2 --l 5\n")
    drawing = ["--sample_prompts", prompts, "--sample_every_n_steps", "2"]
    tuned = fine_tune(twins(name), pictures, tmp_path / "out", *drawing)
    before, after = tensors_of(twins(name)), tensors_of(tuned)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("model.diffusion_model.") for key in changed)
    assert len(list((tmp_path / "out" / "sample").glob("tuned_000002_00_*.png"))) == 1
    assert {"v_pred", "ztsnr"} & after.keys() == ({"v_pred", "ztsnr"} if name == "base-v" else set())
    one, two = open_checkpoint(str(twins(name))), open_checkpoint(str(tuned))
    assert one.unet == two.unet and one.parts == two.parts
    assert torch.equal(open_models(tuned).unet.out[2].weight, after["model.diffusion_model.out.2.weight"])


def folder_of(path, folder):
    """The model as a Diffusers folder."""
    from library.models.save_checkpoint import save_diffusers

    models = open_models(path)
    save_diffusers(folder, models.checkpoint, {}, models.tokenizers)
    return models


def test_the_refiner_is_diffusers_refiner(twins, tmp_path):
    """One text encoder, and an aesthetic score in the place of the target size."""
    from library.imports import import_diffusers
    from library.models.conditioning import conditioning_vector

    models = folder_of(twins("refiner"), tmp_path)
    pipeline = import_diffusers().StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path)
    assert pipeline.text_encoder is None and pipeline.config.requires_aesthetics_score
    latents, timesteps = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            ["a cat", "dogs"], device="cpu", do_classifier_free_guidance=False
        )
        sizes = [[200.0, 300, 0, 16, 7.5]] * 2
        theirs = pipeline.unet(
            latents, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor(sizes)}
        ).sample
        text = models.encode_texts(["a cat", "dogs"], 75)
        numbers = torch.tensor(sizes)
        vector = conditioning_vector(text.pooled, numbers[:, :2], numbers[:, 2:4], numbers[:, 4:])
        ours = models.unet(latents, timesteps, torch.cat([text.hidden_1, text.hidden_2], -1), vector)
    assert text.hidden_1.shape == (2, 77, 0)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    again = open_checkpoint(str(tmp_path))
    assert again.unet == models.checkpoint.unet and again.parts == ["unet", "text_encoder_2", "vae"]


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
        ours = inpainting_channels(image, mask[:, 0], lambda masked: models.encode_images(masked, noise))
        torch.testing.assert_close(ours, torch.cat(theirs, 1), rtol=0, atol=1e-5)
        seen = torch.cat([torch.randn(1, 4, 8, 12), ours], 1)
        context, vector = torch.randn(1, 77, 192), torch.zeros(1, 1664)
        added = {"text_embeds": torch.zeros(1, 128), "time_ids": torch.zeros(1, 6)}
        vector = models_vector()
        expected = pipeline.unet(seen, torch.tensor([5]), context, added_cond_kwargs=added).sample
        torch.testing.assert_close(models.unet(seen, torch.tensor([5]), context, vector), expected, rtol=0, atol=1e-5)


def models_vector():
    from library.models.conditioning import conditioning_vector

    nothing = torch.zeros(1, 2)
    return conditioning_vector(torch.zeros(1, 128), nothing, nothing, nothing)
