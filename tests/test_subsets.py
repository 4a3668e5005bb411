"""The scan: pictures, captions, sizes; and all that can't be used, at once."""

import logging
from pathlib import Path

import pytest
import scanning
from PIL import Image

from library.data.dataset_config import read_datasets
from library.data.options import CacheOptions, CaptionOptions, DatasetOptions
from library.data.size import Size
from library.data.subsets import scan
from library.errors import OptionError
from library.options import read_options


def make(folder: Path, *names: str, size=(64, 64)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(folder / name, format="png")


def scanned(parent: Path, *argv: object, **settings):
    return scanning.scanned(parent, "--resolution", 64, *argv, buckets=[], **settings)


def captions_of(datasets) -> dict[str, str]:
    return {sample.path.name: sample.caption for sample in datasets[0].samples}


def test_pictures_are_found_sorted_whatever_the_case_of_their_ending(tmp_path):
    make(tmp_path / "2_x", "b.PNG", "a.png", "c.Jpg")
    (tmp_path / "2_x" / "notes.md").write_text("no picture")
    (dataset,) = scanned(tmp_path)
    assert [sample.path.name for sample in dataset.samples] == ["a.png", "b.PNG", "c.Jpg"]
    assert dataset.num_samples == 6


def test_a_caption_file_wins_over_the_class_tokens(tmp_path):
    make(tmp_path / "1_cat", "a.png", "b.png")
    (tmp_path / "1_cat" / "a.caption").write_text("my cat\n")
    assert captions_of(scanned(tmp_path)) == {"a.png": "my cat", "b.png": "cat"}


def test_txt_captions_are_used_and_told_where_no_caption_lies(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    caplog.set_level("INFO", "library")
    make(tmp_path / "1_cat", "a.png")
    (tmp_path / "1_cat" / "a.txt").write_text("from txt")
    assert captions_of(scanned(tmp_path)) == {"a.png": "from txt"}
    assert "captions are read from the 1 *.txt" in caplog.text
    assert captions_of(scanned(tmp_path, "--caption_extension", ".caption")) == {"a.png": "cat"}  # class tokens
    assert captions_of(scanned(tmp_path, "--caption_extention", "txt")) == {"a.png": "from txt"}


def test_pictures_without_any_caption_are_counted_and_named(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    make(tmp_path, "a.png", "b.png")
    assert captions_of(scanned(tmp_path)) == {"a.png": "", "b.png": ""}
    assert "2 pictures have no caption" in caplog.text and "a.png" in caplog.text


def test_fault_34_all_captions_that_are_no_utf8_are_told_at_once(tmp_path):
    make(tmp_path / "1_cat", "a.png", "b.png", "c.png")
    (tmp_path / "1_cat" / "a.caption").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "1_cat" / "b.caption").write_bytes("cat".encode("utf-16"))
    (tmp_path / "1_cat" / "c.caption").write_bytes(b"fine")
    with pytest.raises(OptionError) as error:
        scanned(tmp_path)
    assert len(error.value.mistakes) == 2 and "a.caption" in str(error.value) and "b.caption" in str(error.value)


def test_fault_25_all_bad_headers_are_told_at_once_or_skipped(tmp_path):
    make(tmp_path / "1_cat", "good.png")
    (tmp_path / "1_cat" / "empty.png").write_bytes(b"")
    (tmp_path / "1_cat" / "text.jpg").write_text("this is no picture")
    with pytest.raises(OptionError) as error:
        scanned(tmp_path)
    assert all(piece in str(error.value) for piece in ("empty.png", "text.jpg", "no picture", "--skip_bad_images"))
    assert [sample.path.name for sample in scanned(tmp_path, skip_bad_images=True)[0].samples] == ["good.png"]


@pytest.mark.parametrize("case", ["empty folder", "repeats 0", "only bad pictures"])
def test_fault_47_no_pictures_at_all_is_a_mistake(case, tmp_path):
    folder = tmp_path / ("0_cat" if case == "repeats 0" else "1_cat")
    make(folder, *(["a.png"] if case == "repeats 0" else []))
    if case == "only bad pictures":
        (folder / "a.png").write_bytes(b"")
    with pytest.raises(OptionError):
        scanned(tmp_path, skip_bad_images=True)


def test_a_picture_below_one_bucket_step_is_told(tmp_path):
    make(tmp_path / "1_cat", "small.png", size=(20, 60))
    with pytest.raises(OptionError, match=r"small.png: its size 20x60 is below one bucket step"):
        scanned(tmp_path, "--enable_bucket", "--bucket_no_upscale", "--bucket_reso_steps", 32)


def test_cache_files_have_the_contracts_names(tmp_path):
    make(tmp_path / "1_cat", "a.b.png", size=(80, 48))
    (sample,) = scanned(tmp_path)[0].samples
    assert sample.size == Size(80, 48)
    assert sample.latents_file == tmp_path / "1_cat" / "a.b_0080x0048_sdxl.npz"
    assert sample.text_file == tmp_path / "1_cat" / "a.b_te_outputs.npz"


def test_fault_40_two_pictures_of_one_stem_dont_share_cache_files(tmp_path):
    make(tmp_path / "1_cat", "a.png", "a.webp")
    one, two = scanned(tmp_path)[0].samples
    assert one.latents_file.name == "a_0064x0064_sdxl.npz" and two.latents_file.name == "a.webp_0064x0064_sdxl.npz"
    assert one.text_file != two.text_file


def test_a_second_resolution_of_one_picture_has_cache_files_of_its_own(tmp_path):
    make(tmp_path / "x", "a.png")
    text = "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'x').as_posix()}'\n"
        for side in (64, 128)
    )
    (tmp_path / "data.toml").write_text(text)
    options = read_options(
        "test", [DatasetOptions, CaptionOptions, CacheOptions], ["--dataset_config", str(tmp_path / "data.toml")]
    )
    one, two = (dataset.samples[0] for dataset in scan(read_datasets(options)[0], skip_bad_images=False))
    assert Path(one.cache_stem).name == "a" and Path(two.cache_stem).name == "a_128x128"


@pytest.mark.parametrize("name", ["ü ñ 日本.png", "a [x] 100%.png", "a\nb.png"])
def test_fault_52_odd_names_work(name, tmp_path):
    make(tmp_path / "1_cat", name)
    (tmp_path / "1_cat" / name).with_suffix(".caption").write_text("odd")
    assert captions_of(scanned(tmp_path)) == {name: "odd"}


def test_mirrored_pictures_were_cropped_from_the_other_side(tmp_path):
    make(tmp_path / "1_cat", "a.png", size=(100, 60))
    (sample,) = scanned(
        tmp_path, "--enable_bucket", "--min_bucket_reso", 32, "--max_bucket_reso", 128, "--bucket_reso_steps", 32
    )[0].samples
    crop, bucket = sample.crop, sample.fit.bucket
    assert sample.crop_top_left(flipped=False) == (int(crop.top), int(crop.left))
    assert sample.crop_top_left(flipped=True) == (int(crop.top), int(bucket.width - crop.right))
