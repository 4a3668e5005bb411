"""Checkpoints: identified by name, read from every layout, saved both ways, byte for byte."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import open_models
from golden_model import live_tensors
from messages import mentioning, mentions
from tolerance import assert_network

from library.errors import OptionError, RunError
from library.models.checkpoint.key_maps import PARTS
from library.models.checkpoint.reader import choose_weights, locate_vae, open_checkpoint
from library.models.checkpoint.writer import save_diffusers, save_single_file
from library.models.sdxl import vae_tensors
from library.models.size_conditioning import conditioning_vector
from library.models.tokenizer import load_tokenizers
from library.safetensors_io import load_tensors, read_header, write_safetensors
from tools.tiny_models import TINY, TextEncoderSizes, random_checkpoint


@pytest.fixture(scope="module")
def folder(golden_models, tmp_path_factory) -> Path:
    """The golden model as a Diffusers folder."""
    path = tmp_path_factory.mktemp("diffusers")
    save_diffusers(path, golden_models.checkpoint, {}, golden_models.tokenizers)
    return path


def small_file(path: Path, *names: str) -> str:
    write_safetensors(path, {name: torch.zeros(2, 2) for name in names}, {})
    return str(path)


# ------------------------------------------------------------------------------------------------------------- identify


def test_the_model_is_named_in_one_line(golden_models):
    found = golden_models.checkpoint.describe()
    assert (
        mentions(found, "tiny_sdxl.safetensors", "tiny SDXL", "single file", "noise prediction")
        and "\n" not in found
    )
    assert golden_models.checkpoint.parts == list(PARTS)


@pytest.mark.parametrize(
    "keys, name",
    [
        (
            [
                "cond_stage_model.transformer.text_model.x",
                "model.diffusion_model.input_blocks.0.0.weight",
            ],
            "SD 1",
        ),
        (
            [
                "cond_stage_model.model.transformer.x",
                "model.diffusion_model.input_blocks.0.0.weight",
            ],
            "SD 2",
        ),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.joint_blocks.0.x"], "SD 3"),
        (["lora_unet_input_blocks_4_1_proj_in.lora_down.weight"], "LoRA"),
        (["unet.down_blocks.1.attentions.0.to_q.lora_A.weight"], "LoRA"),
        (["lllite_unet_input_blocks_4_1.down.0.weight"], "ControlNet-LLLite"),
        (["control_model.input_blocks.0.0.weight"], "ControlNet"),
        (["clip_g", "clip_l"], "Textual Inversion"),
        (["first_stage_model.decoder.conv_in.weight"], "VAE"),
        (["down_blocks.0.resnets.0.conv1.weight"], "Diffusers U-Net"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "U-Net"),
        (["something.else"], "unknown|known|recognised|recognized"),
    ],
)
def test_fault_20_a_wrong_family_is_refused_by_name_in_one_line(keys, name, tmp_path):
    with pytest.raises(OptionError) as error:
        open_checkpoint(small_file(tmp_path / "wrong.safetensors", *keys))
    assert mentions(str(error.value), "wrong.safetensors", name, "SDXL") and "\n" not in str(
        error.value
    )


def test_fault_20_a_diffusers_folder_of_another_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        OptionError, match=mentioning(tmp_path, "StableDiffusionPipeline", "StableDiffusionXL")
    ):
        open_checkpoint(str(tmp_path))


def test_a_missing_file_is_not_looked_for_on_the_hub():
    for name in ("models/none.safetensors", "/none", "C:\\none", "none"):
        with pytest.raises(OptionError, match=mentioning(name, "file", "folder")) as error:
            open_checkpoint(name)
        assert not mentions(str(error.value), "hub")


def test_the_keys_v_pred_and_ztsnr_are_read_and_told(golden_model, tmp_path):
    tensors, metadata = load_tensors(golden_model)
    write_safetensors(
        tmp_path / "v.safetensors",
        {**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
        metadata,
    )
    found = open_checkpoint(str(tmp_path / "v.safetensors"))
    assert found.v_prediction and found.zero_terminal_snr
    assert mentions(found.describe(), "v-prediction", "v_pred", "ztsnr", "zero terminal SNR")


# ----------------------------------------------------------------------------------------------------------- both ways


def test_saving_what_was_not_trained_gives_the_same_bytes(golden_model, tmp_path):
    checkpoint = open_checkpoint(str(golden_model))
    save_single_file(tmp_path / "again.safetensors", checkpoint, {}, {"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == golden_model.read_bytes()


def test_saving_the_live_modules_gives_the_same_bytes(golden_model, golden_models, tmp_path):
    changed = live_tensors(golden_models)
    save_single_file(
        tmp_path / "live.safetensors", golden_models.checkpoint, changed, {"format": "pt"}
    )
    assert (tmp_path / "live.safetensors").read_bytes() == golden_model.read_bytes()


def test_a_diffusers_folder_and_back_gives_the_same_tensors(golden_model, folder, tmp_path):
    save_single_file(
        tmp_path / "back.safetensors", open_checkpoint(str(folder)), {}, {"format": "pt"}
    )
    back, original = load_tensors(tmp_path / "back.safetensors")[0], load_tensors(golden_model)[0]
    assert original.keys() - back.keys() == {
        "conditioner.embedders.1.model.logit_scale"
    }  # written only if the source had it
    assert all(torch.equal(back[name], original[name]) for name in back)


def test_position_ids_are_dropped(golden_model, tmp_path):
    tensors, _ = load_tensors(golden_model)
    key = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    write_safetensors(tmp_path / "old.safetensors", {**tensors, key: torch.arange(77)[None]}, {})
    models = open_models(tmp_path / "old.safetensors")
    assert models.text_encoders[0] is not None
    save_single_file(tmp_path / "new.safetensors", models.checkpoint, {}, {})
    assert key not in read_header(tmp_path / "new.safetensors").tensors


def test_only_what_was_trained_changes_and_precision_is_of_all(
    golden_model, golden_models, tmp_path
):
    changed = golden_models.unet.state_dict()
    changed["out.2.bias"] = changed["out.2.bias"] + 1
    save_single_file(
        tmp_path / "x.safetensors",
        golden_models.checkpoint,
        {"unet": changed},
        {},
        v_prediction=True,
    )
    saved, original = load_tensors(tmp_path / "x.safetensors")[0], load_tensors(golden_model)[0]
    assert [name for name in original if not torch.equal(saved[name], original[name])] == [
        "model.diffusion_model.out.2.bias"
    ]
    assert "v_pred" in saved and "ztsnr" not in saved
    save_single_file(
        tmp_path / "half.safetensors", golden_models.checkpoint, {}, {}, dtype=torch.float16
    )
    assert {info.dtype for info in read_header(tmp_path / "half.safetensors").tensors.values()} == {
        "F16"
    }


def test_replacing_the_source_on_disk_cant_spoil_a_save(golden_model, tmp_path):
    source = tmp_path / "source.safetensors"
    shutil.copy(golden_model, source)
    checkpoint = open_checkpoint(str(source))
    save_single_file(
        tmp_path / "other.safetensors", checkpoint, {}, {"format": "pt"}, dtype=torch.bfloat16
    )
    os.replace(tmp_path / "other.safetensors", source)
    save_single_file(source, checkpoint, {}, {"format": "pt"})  # over itself, too
    assert source.read_bytes() == golden_model.read_bytes()


def test_ckpt_files_are_read_and_written(golden_model, tmp_path):
    checkpoint = open_checkpoint(str(golden_model))
    save_single_file(tmp_path / "x.ckpt", checkpoint, {}, {})
    again = open_checkpoint(str(tmp_path / "x.ckpt"))
    assert again.unet == checkpoint.unet
    for part in PARTS:
        one, two = again.tensors(part), checkpoint.tensors(part)
        assert all(torch.equal(one[name], two[name]) for name in two)
    torch.save(
        {"state_dict": load_tensors(golden_model)[0]},
        tmp_path / "old.ckpt",
        _use_new_zipfile_serialization=False,
    )
    assert open_checkpoint(str(tmp_path / "old.ckpt")).unet == checkpoint.unet


def test_a_ckpt_is_cast_in_ram_not_on_the_card(golden_model, tmp_path, monkeypatch):
    devices, to = set(), torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, *args: devices.add(args[0]) or to(tensor, *args)
    )
    save_single_file(
        tmp_path / "x.ckpt", open_checkpoint(str(golden_model)), {}, {}, dtype=torch.bfloat16
    )
    assert devices == {"cpu"}
    monkeypatch.undo()
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }


class _Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_FOLDER"],)


@pytest.mark.parametrize("is_zip", [True, False])
def test_fault_17_a_pickle_that_runs_code_is_refused_and_doesnt_run(is_zip, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_FOLDER", str(tmp_path / "evil"))
    torch.save(
        {"state_dict": _Evil()}, tmp_path / "model.ckpt", _use_new_zipfile_serialization=is_zip
    )
    with pytest.raises(RunError, match=mentioning("model.ckpt", "code")):
        open_checkpoint(str(tmp_path / "model.ckpt"))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all", b"PK\x03\x04 torn zip", b"\x80\x02 torn pickle"]
)
def test_fault_15_a_damaged_ckpt_is_one_line(content, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(RunError) as error:
        open_checkpoint(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_fault_21_checkpoints_of_every_dtype_load(dtype, golden_model, tmp_path):
    tensors, _ = load_tensors(golden_model)
    write_safetensors(
        tmp_path / "x.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()}, {}
    )
    models = open_models(tmp_path / "x.safetensors")
    assert {
        p.dtype
        for module in (models.unet, models.vae, *models.text_encoders)
        for p in module.parameters()
    } == {torch.float32}
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert torch.equal(models.unet.middle_block[1].proj_in.weight, tensors[key].to(dtype).float())


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_named(golden_model, tmp_path):
    tensors, _ = load_tensors(golden_model)
    prefix = "model.diffusion_model."
    del tensors[prefix + "out.0.bias"]
    tensors[prefix + "out.9.bias"] = torch.zeros(1)
    tensors[prefix + "middle_block.0.in_layers.0.bias"] = torch.zeros(7)
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(
        RunError,
        match=mentioning("1", "out.0.bias", "out.9.bias", "middle_block.0.in_layers.0.bias"),
    ):
        _ = open_models(tmp_path / "x.safetensors").unet


def most_bytes(work) -> int:
    """The most bytes of tensors that were there at once, of those that were made while it worked."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(itertools.accumulate((size for _, size in changes), initial=0))


@pytest.mark.parametrize("kind", ["single file", "folder"])
def test_a_save_holds_one_tensor_beside_the_model(kind, tmp_path):
    sizes = dataclasses.replace(
        TINY,
        text_encoder_1=TextEncoderSizes(64, 3, 64, vocabulary=100),
        text_encoder_2=TextEncoderSizes(128, 12, 128, vocabulary=100),
    )
    write_safetensors(tmp_path / "model.safetensors", random_checkpoint(sizes, 0), {"format": "pt"})
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors"))
    trained = {
        part: {name: t.clone() for name, t in checkpoint.tensors(part).items()} for part in PARTS
    }
    largest = max(tensor.nbytes for own in trained.values() for tensor in own.values())
    assert sum(t.nbytes for t in trained["text_encoder_2"].values() if t.ndim == 2) > 4 * largest

    def save():
        if kind == "folder":
            tokenizers = load_tokenizers(None, None)
            save_diffusers(
                tmp_path / "folder", checkpoint, trained, tokenizers, dtype=torch.bfloat16
            )
        else:
            save_single_file(
                tmp_path / "out.safetensors", checkpoint, trained, {}, dtype=torch.bfloat16
            )

    assert 0 < most_bytes(save) < 1.6 * largest


# ----------------------------------------------------------------------------------------------------------- Diffusers


def test_the_folder_loads_in_diffusers_and_gives_the_same_numbers(folder, golden_models):
    from library.imports import import_diffusers

    pipeline = import_diffusers().StableDiffusionXLPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    latents, context, pooled = (
        torch.randn(2, 4, 16, 24),
        torch.randn(2, 77, 192),
        torch.randn(2, 128),
    )
    timesteps, sizes = torch.tensor([3, 700]), torch.tensor([[200.0, 300, 0, 16, 128, 192]] * 2)
    with torch.no_grad():
        theirs = pipeline.unet(
            latents,
            timesteps,
            context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
        vector = conditioning_vector(pooled, sizes[:, :2], sizes[:, 2:4], sizes[:, 4:])
        ours = golden_models.unet(latents, timesteps, context, vector)
        assert_network(ours, theirs)
        # Without "!", which Diffusers' second tokenizer takes for a pad token.
        prompt = "a cat, don't (look), " + "very long " * 60
        context, _, pooled, _ = pipeline.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False
        )
        text = golden_models.encode_texts([prompt], 75)
        assert_network(torch.cat([text.hidden_1, text.hidden_2], -1), context)
        assert_network(text.pooled, pooled)


def test_a_trained_single_file_loads_in_diffusers_and_gives_the_same_numbers(
    golden_models, folder, tmp_path
):
    """from_single_file with a local configuration: U-Net, both text encoders and VAE, all of them changed."""
    from library.imports import import_diffusers

    rng = torch.Generator().manual_seed(1)
    trained = {
        part: {name: t + 0.02 * torch.randn(t.shape, generator=rng) for name, t in golden_models.checkpoint.tensors(part).items()}
        for part in PARTS
    }  # fmt: skip
    path = tmp_path / "trained.safetensors"
    save_single_file(
        path, golden_models.checkpoint, trained, {"modelspec.title": "trained"}, v_prediction=True
    )
    pipeline = import_diffusers().StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True
    )
    models = open_models(path)
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=rng), torch.tensor([500])
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            "a cat", device="cpu", do_classifier_free_guidance=False
        )
        text = models.encode_texts(["a cat"], 75)
        assert_network(torch.cat([text.hidden_1, text.hidden_2], -1), context)
        assert_network(text.pooled, pooled)
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        theirs = pipeline.unet(latents, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample  # fmt: skip
        vector = conditioning_vector(pooled, sizes[:, :2], sizes[:, 2:4], sizes[:, 4:])
        assert_network(models.unet(latents, timesteps, context, vector), theirs)
        assert_network(models.decode_latents(latents), pipeline.vae.decode(latents).sample)  # fmt: skip


def test_shards_variants_and_pickles_are_found():
    names = [
        "config.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.safetensors",
    ]
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert (
        choose_weights(
            [*names, *shards, "diffusion_pytorch_model.safetensors.index.json"], prefer_fp16=False
        )
        == shards
    )
    assert choose_weights([*names, *shards], prefer_fp16=True) == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert choose_weights(names, prefer_fp16=False) == ["diffusion_pytorch_model.bin"]
    assert choose_weights(["model.fp16.safetensors"], prefer_fp16=False) == [
        "model.fp16.safetensors"
    ]
    assert choose_weights(["config.json"], prefer_fp16=False) == []


def test_a_folder_of_shards_is_read_whole(folder, golden_models, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole, _ = load_tensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(whole)
    for i, part in enumerate((names[:300], names[300:]), 1):
        write_safetensors(
            tmp_path / "unet" / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors",
            {n: whole[n] for n in part},
            {},
        )
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    tensors = open_checkpoint(str(tmp_path)).tensors("unet")
    assert all(
        torch.equal(tensors[name], tensor)
        for name, tensor in golden_models.checkpoint.tensors("unet").items()
    )


def test_a_folders_scheduler_says_what_the_model_predicts(golden_models, tmp_path):
    save_diffusers(
        tmp_path,
        golden_models.checkpoint,
        {},
        golden_models.tokenizers,
        v_prediction=True,
        zero_terminal_snr=True,
    )
    found = open_checkpoint(str(tmp_path))
    assert found.v_prediction and found.zero_terminal_snr


def test_a_hub_that_cant_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OptionError, match=mentioning("nobody/nothing", "hub", "HF_HUB_OFFLINE|offline")
    ):
        open_checkpoint("nobody/nothing")


# ----------------------------------------------------------------------------------------------------------------- VAE


def test_another_vae_is_taken_from_every_layout(golden_model, golden_models, folder, tmp_path):
    expected = golden_models.checkpoint.tensors("vae")
    alone = {
        name.removeprefix("first_stage_model."): t
        for name, t in load_tensors(golden_model)[0].items()
        if name.startswith("first_stage_model.")
    }
    write_safetensors(tmp_path / "vae.safetensors", alone, {})
    torch.save({"state_dict": alone}, tmp_path / "vae.pt")
    for source in (
        golden_model,
        tmp_path / "vae.safetensors",
        tmp_path / "vae.pt",
        folder,
        folder / "vae",
    ):
        found = vae_tensors(str(source))
        assert found.keys() == expected.keys() and all(
            torch.equal(found[name], expected[name]) for name in expected
        )
    with pytest.raises(OptionError, match=mentioning("--vae", "none.safetensors")):
        locate_vae("none.safetensors")


def test_old_attention_names_of_diffusers_vaes_are_known(golden_models, folder, tmp_path):
    tensors, _ = load_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            if f"mid_block.attentions.0.{new}." in name:
                name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    write_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", renamed, {})
    assert vae_tensors(str(tmp_path)).keys() == golden_models.checkpoint.tensors("vae").keys()


def test_mapping_can_be_turned_off(golden_model):
    mapped, read = (
        open_checkpoint(str(golden_model), mapped=flag).tensors("unet") for flag in (True, False)
    )
    assert all(torch.equal(mapped[name], read[name]) for name in mapped)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_16_numbers_that_arent_finite_in_a_model_are_told_when_it_is_loaded(
    value, golden_model, tmp_path
):
    tensors = load_tensors(golden_model)[0]
    name = "model.diffusion_model.out.2.bias"
    tensors[name] = tensors[name].clone().fill_(value)
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(RunError, match=mentioning("x.safetensors", "U-Net", "1", "finite|NaN|Inf", "float32", "out.2.bias")):  # fmt: skip
        _ = open_models(tmp_path / "x.safetensors").unet


@pytest.mark.parametrize("key, prefix", [("modelspec.hash_sha256", "0x"), ("sshs_model_hash", "")])
def test_fault_16_a_flipped_bit_in_a_model_is_told_by_verify_model(
    key, prefix, golden_model, tmp_path
):
    import hashlib

    from library.errors import OptionError
    from library.models.options import ModelOptions
    from library.safetensors_io import read_header
    from library.training.setup.inputs import open_model

    path = tmp_path / "x.safetensors"
    tensors = load_tensors(golden_model)[0]
    data = golden_model.read_bytes()[
        min(info.start for info in read_header(golden_model).tensors.values()) :
    ]
    write_safetensors(path, tensors, {key: prefix + hashlib.sha256(data).hexdigest()})
    chosen = ModelOptions(pretrained_model_name_or_path=str(path), verify_model=True)
    assert open_model(chosen, prefer_fp16=False).path == path
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # a number changes in its last bits, and stays finite
    path.write_bytes(content)
    with pytest.raises(OptionError, match=mentioning("x.safetensors", "sha256")):
        open_model(chosen, prefer_fp16=False)


def test_verify_model_needs_something_to_compare_with(golden_model):
    from library.errors import OptionError
    from library.models.options import ModelOptions
    from library.training.setup.inputs import open_model

    with pytest.raises(OptionError, match=mentioning("--verify_model", "sha256", "metadata")):
        open_model(
            ModelOptions(pretrained_model_name_or_path=str(golden_model), verify_model=True),
            prefer_fp16=False,
        )
