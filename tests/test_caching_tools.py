"""The caching tools, end to end: images to metadata to caches to training; several processes; what they refuse."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from forked import end_together, processes
from messages import mentions
from PIL import Image
from running import QUICK, ROOT, Ended, losses_of, run_here, script, train_network, without

BUCKETS = [
    "--resolution",
    "64",
    "--enable_bucket",
    "--min_bucket_reso",
    "32",
    "--max_bucket_reso",
    "128",
    "--bucket_reso_steps",
    "32",
]


def tool(name: str, model: Path, images: Path, *extra: object) -> list[str]:
    words = [
        ROOT / "tools" / f"{name}.py",
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        *BUCKETS,
    ]
    return [str(word) for word in [*words, *extra]]


def call(name: str, *words: object) -> Ended:
    """Run a tool's main in this process, to its end."""
    ended = ends(name, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def ends(name: str, *words: object) -> Ended:
    return run_here(import_module(name).main, *words)


def arrays_of(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for file in sorted(folder.rglob("*.npz")):
        with np.load(file) as arrays:
            found[file.name] = {name: arrays[name] for name in arrays if name != "fingerprint"}
    return found


def assert_equal(one, two) -> None:
    assert one.keys() == two.keys()
    for file, arrays in one.items():
        assert arrays.keys() == two[file].keys()
        assert all(np.array_equal(arrays[name], two[file][name]) for name in arrays), file


def test_what_the_tools_cache_is_what_training_caches_and_uses(golden_model, images, tmp_path):
    words = [
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--max_train_steps",
        1,
    ]
    train_network(golden_model, images, tmp_path / "first", *words)
    by_training = arrays_of(images)
    for file in images.rglob("*.npz"):
        file.unlink()
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        call(f"tools.{name}", *tool(name, golden_model, images)[1:])
    by_tools = arrays_of(images)
    assert_equal(by_training, by_tools)
    times = {file: file.stat().st_mtime_ns for file in images.rglob("*.npz")}
    train_network(golden_model, images, tmp_path / "second", *words)
    assert times == {file: file.stat().st_mtime_ns for file in images.rglob("*.npz")}
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "second")


def test_two_processes_make_the_files_that_one_makes(golden_model, images):
    words = tool("cache_latents", golden_model, images, "--flip_aug")
    end_together(processes("tools/cache_latents.py", *words[1:], count=2))
    two = arrays_of(images)
    for file in images.rglob("*.npz"):
        file.unlink()
    assert len(two) == 4
    call("tools.cache_latents", *words[1:])
    assert_equal(two, arrays_of(images))


def test_a_config_file_of_training_is_taken_and_damaged_images_are_all_told(
    golden_model, images, tmp_path
):
    (tmp_path / "run.toml").write_text(
        f"pretrained_model_name_or_path = '{golden_model.as_posix()}'\ntrain_data_dir = '{images.as_posix()}'\n"
        "resolution = '64'\nnetwork_module = 'networks.lora'\nlearning_rate = 1e-4\nmin_snr_gamma = 5\nsample_every_n_epochs = 1\n"
        "save_model_as = 'safetensors'\nshuffle_caption = true\n"
    )
    for number in (0, 2):
        (images / "2_shapes" / f"picture{number}.png").write_bytes(
            Image.new("RGB", (64, 64)).tobytes()[:50]
        )
    done = ends("tools.cache_latents", "--config_file", tmp_path / "run.toml")
    assert done.returncode == 2 and all(f"picture{number}.png" in done.stderr for number in (0, 2))
    done = call("tools.cache_latents", "--config_file", tmp_path / "run.toml", "--skip_bad_images")
    assert len(list(images.rglob("*_sdxl.npz"))) == 2 and done.returncode == 0, done.stderr
    assert mentions(done.stderr, "WARNING", "min_snr_gamma", "learning_rate", "network_module")
    done = ends("tools.cache_text_encoder_outputs", "--config_file", tmp_path / "run.toml")
    assert done.returncode == 2 and mentions(
        done.stderr, "shuffle_caption", "--text_cache_variants"
    )


def test_images_become_metadata_caches_and_a_lora(golden_model, images, tmp_path):
    """The whole way of sd-scripts' fine-tuning data, through every tool."""
    folder, names = images / "2_shapes", [tmp_path / f"meta{i}.json" for i in range(4)]
    call(
        "tools.merge_captions_to_metadata",
        folder,
        names[0],
        "--caption_extension",
        ".txt",
        "--full_path",
    )
    call("tools.merge_dd_tags_to_metadata", folder, names[1], "--in_json", names[0], "--full_path")
    call("tools.clean_captions_and_tags", names[1], names[2])
    words = [folder, names[2], names[3], golden_model, "--max_resolution", "64,64", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32]  # fmt: skip
    call("prepare_buckets_latents", *words, "--full_path", "--batch_size", 2)
    entries = json.loads(names[3].read_text(encoding="utf-8"))
    assert len(entries) == 4
    for key, entry in entries.items():
        with Image.open(key) as image, np.load(Path(key).with_suffix(".npz")) as arrays:
            assert entry["image_size"] == list(image.size)
            width, height = entry["train_resolution"]
            assert arrays["latents"].shape == (4, height // 8, width // 8)
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    call("prepare_buckets_latents", *words, "--full_path", "--skip_existing")
    data = [
        "--in_json",
        names[3],
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--max_train_steps",
        3,
    ]
    train_network(golden_model, folder, tmp_path / "out", *data)
    assert times == {
        file: file.stat().st_mtime_ns for file in folder.glob("*.npz") if "_te_" not in file.name
    }
    assert len(losses_of(tmp_path / "out")) == 3 and len(list(folder.glob("*_te_outputs.npz"))) == 4
    metadata = train_metadata(tmp_path / "out" / "lora.safetensors")
    assert metadata["ss_num_train_images"] == "4" and "meta3.json" in metadata["ss_tag_frequency"]


def train_metadata(path: Path) -> dict[str, str]:
    from library.safetensors_io import read_header

    return dict(read_header(path).metadata)


def test_prepare_buckets_refuses_what_cant_work_all_at_once(golden_model, images, tmp_path):
    done = ends(
        "prepare_buckets_latents", images, tmp_path / "none.json", tmp_path / "out.json", golden_model,
        "--max_resolution", "64", "--bucket_reso_steps", "7", "--batch_size", "0", "--v2",
    )  # fmt: skip
    assert (
        done.returncode == 2 and done.stderr.count("error:") == 5 and "Traceback" not in done.stderr
    )


def test_drawn_captions_train_from_a_cache_without_the_text_encoders(
    golden_model, images, tmp_path
):
    words = ["--shuffle_caption", "--caption_dropout_rate", 0.3, "--text_cache_variants", 3, "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]  # fmt: skip
    train_network(golden_model, images, tmp_path / "first", *words, "--max_train_steps", 4)
    with np.load(next(images.rglob("*_te_outputs.npz"))) as arrays:
        assert {"hidden_state1", "pool2_3"} <= set(
            arrays
        ) and "pool2_4" not in arrays  # three captions and the empty one
    made = {file: file.stat().st_mtime_ns for file in images.rglob("*_te_outputs.npz")}
    train_network(golden_model, images, tmp_path / "second", *words, "--max_train_steps", 4)
    assert {file: file.stat().st_mtime_ns for file in images.rglob("*_te_outputs.npz")} == made
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "second")


def test_masks_weigh_the_loss_of_a_run(golden_model, images, tmp_path):
    """Half of each image masked: the loss is that of the other half, without being evened out."""
    words = ["--max_train_steps", 2]
    plain = train_network(golden_model, images, tmp_path / "plain", *words) and losses_of(
        tmp_path / "plain"
    )
    for file in (images / "2_shapes").glob("*.png"):
        image = Image.open(file).convert("RGBA")
        image.putalpha(255)
        image.save(file)
    opaque = train_network(golden_model, images, tmp_path / "opaque", *words, "--alpha_mask") and losses_of(tmp_path / "opaque")  # fmt: skip
    for file in (images / "2_shapes").glob("*.png"):
        image = Image.open(file)
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, image.width, image.height // 2))
        image.putalpha(alpha)
        image.save(file)
    half = train_network(golden_model, images, tmp_path / "half", *words, "--alpha_mask") and losses_of(tmp_path / "half")  # fmt: skip
    np.testing.assert_allclose(opaque, plain, rtol=0.05)  # other files have other posterior samples
    assert all(0.3 < one / other < 0.7 for one, other in zip(half, plain, strict=True)), (
        half,
        plain,
    )


def test_debug_dataset_prints_and_writes_a_page_without_training(
    golden_model, images, tmp_path, capsys
):
    (images / "2_shapes" / "picture1.txt").write_text("a word, " * 60)
    words = without(QUICK, "--cache_latents", "--cache_text_encoder_outputs")
    train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--debug_dataset",
        "--shuffle_caption",
        "--alpha_mask",
        quick=words,
    )
    told = capsys.readouterr().out
    assert mentions(told, "crop") and mentions(told, "8 batches", "1", "8 steps")
    assert mentions(told, "'word,|', a word|'a word"), told
    (page,) = (tmp_path / "out").iterdir()
    html = page.read_text(encoding="utf-8")
    assert (
        page.name == "lora-dataset.html"
        and html.count("data:image/jpeg;base64,") == 4
        and "<script" not in html
    )
    assert "http" not in html  # nothing outside the file


@pytest.mark.parametrize("name", ["cache_latents", "cache_text_encoder_outputs"])
def test_the_tools_tell_mistakes_before_torch(name, tmp_path):
    done = script(ROOT / "tools" / f"{name}.py", "--resolutoin", "64", "--flux", "--debug_dataset")
    assert (
        done.returncode == 2
        and mentions(done.stderr, "--resolutoin", "'resolution'|--resolution")
        and mentions(done.stderr, "--flux", "SDXL")
    )
    assert mentions(done.stderr, "--debug_dataset")


def test_prepare_buckets_writes_no_metadata_when_a_image_cant_be_encoded(
    golden_model, images, tmp_path
):
    folder = images / "2_shapes"
    call(
        "tools.merge_captions_to_metadata",
        folder,
        tmp_path / "in.json",
        "--caption_extension",
        ".txt",
    )
    raw = (folder / "picture1.png").read_bytes()
    (folder / "picture1.png").write_bytes(raw[:60] + bytes(len(raw) - 60))  # its header is whole
    words = [folder, tmp_path / "in.json", tmp_path / "out.json", golden_model, "--max_resolution", "64,64", "--min_bucket_reso", 32, "--bucket_reso_steps", 32]  # fmt: skip
    done = ends("prepare_buckets_latents", *words, "--max_data_loader_n_workers", 2)
    assert (
        done.returncode == 1
        and mentions(done.stderr, "picture1.png")
        and mentions(done.stderr, "--skip_existing")
    )
    assert mentions(done.stderr, "WARNING", "--max_data_loader_n_workers")
    assert not (tmp_path / "out.json").exists() and len(list(folder.glob("*.npz"))) == 3
