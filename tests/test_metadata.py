"""Metadata against the recorded files of the reference, key by key."""

import json
import shutil
from pathlib import Path

import pytest
from replay import Golden

from library.safetensors_io import read_header

# What differs in every run, or says which program wrote the file.
OF_THE_RUN = {
    "modelspec.date", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "sshs_model_hash",
    "modelspec.implementation_version", "ss_sd_scripts_commit_hash",
}  # fmt: skip


def trained(name: str, folder: Path, model: Path, monkeypatch, *extra: str) -> dict[str, str]:
    import sdxl_train_network

    shutil.copy(model, folder / "tiny_sdxl.safetensors")
    monkeypatch.chdir(folder)
    arguments = Golden(name).facts["args"]
    if name == "lora_te":  # two rates are two rates here; the reference uses the first for both
        arguments = [word for word in arguments if word != "4e-4"]
    sdxl_train_network.main([*arguments, *extra])
    return dict(read_header(folder / "out" / f"{name}.safetensors").metadata)


@pytest.mark.parametrize("name", ["lora_unet", "lora_te"])
def test_every_key_has_the_value_of_sd_scripts(name, golden_data, golden_model, monkeypatch):
    found = trained(name, golden_data, golden_model, monkeypatch)
    expected = Golden(name).facts["output_metadata"]
    assert found.keys() == expected.keys()
    for key in expected.keys() - OF_THE_RUN:
        is_json = expected[key][:1] in "[{"
        assert (
            (json.loads(found[key]) == json.loads(expected[key]))
            if is_json
            else found[key] == expected[key]
        ), key


def test_no_metadata_keeps_the_keys_that_other_programs_need(
    golden_data, golden_model, monkeypatch
):
    found = trained(
        "lora_unet",
        golden_data,
        golden_model,
        monkeypatch,
        "--no_metadata",
        "--max_train_steps",
        "1",
    )
    ss = {key: value for key, value in found.items() if key.startswith("ss_")}
    assert ss == {
        "ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora",
        "ss_network_dim": "2", "ss_network_alpha": "1.0",
    }  # fmt: skip
    assert (
        found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        and "sshs_model_hash" in found
    )


def test_modelspec_from_the_options(golden_data, golden_model, monkeypatch):
    found = trained(
        "lora_unet", golden_data, golden_model, monkeypatch, "--max_train_steps", "1", "--metadata_title", "T", "--metadata_author", "A",
        "--metadata_thumbnail", "data/img0.png", "--min_timestep", "100", "--v_parameterization", "--clip_skip", "2", "--resolution", "64,96",
    )  # fmt: skip
    spec = {
        key.removeprefix("modelspec."): value
        for key, value in found.items()
        if key.startswith("modelspec.")
    }
    assert (spec["title"], spec["author"], spec["timestep_range"], spec["prediction_type"]) == (
        "T",
        "A",
        "100,1000",
        "v",
    )
    assert (spec["encoder_layer"], spec["resolution"]) == ("2", "64x96")
    assert spec["thumbnail"].startswith("data:image/png;base64,") and "license" not in spec
    assert found["ss_clip_skip"] == "2"


def test_without_a_dataset_file_the_folders_are_described(golden_model, images, tmp_path):
    from running import train_network

    path = train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_steps",
        "1",
        "--gradient_accumulation_steps",
        "2",
    )
    found = read_header(path).metadata
    assert (
        found["ss_resolution"] == "(64, 64)"
        and found["ss_total_batch_size"] == "2"
        and found["ss_num_train_images"] == "8"
    )
    assert json.loads(found["ss_dataset_dirs"]) == {"2_shapes": {"n_repeats": 2, "img_count": 4}}
    assert json.loads(found["ss_tag_frequency"])["2_shapes"]["flat colours"] == 4
    info = json.loads(found["ss_bucket_info"])
    assert (
        sum(bucket["count"] for bucket in info["buckets"].values()) == 8
        and info["mean_img_ar_error"] > 0
    )
    assert "ss_datasets" not in found
