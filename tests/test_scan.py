"""The scan: images, captions, sizes; and all that can't be used, at once."""

import json
import logging
import os
import sys
import zlib
from pathlib import Path

import pytest
import scanning
from messages import mentioning, mentions
from PIL import Image

import sdxl_train
from library.data.dataset_config import check_masks_are_used, read_datasets
from library.data.file_index import FileIndex
from library.data.options import DATA_OPTIONS
from library.data.scan import scan
from library.errors import OptionError
from library.images import readable_extensions
from library.options import read_options
from library.size import Size
from library.training.options.objective import LossOptions
from library.training.saving.resume import run_signature


def make(folder: Path, *names: str, size=(64, 64)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(folder / name, format="png")


def scanned(parent: Path, *argv: object, **settings):
    return scanning.scanned(parent, "--resolution", 64, *argv, buckets=[], **settings)


def captions_of(datasets) -> dict[str, str]:
    return {sample.path.name: sample.caption for sample in datasets[0].samples}


def test_images_are_found_sorted_whatever_the_case_of_their_ending(tmp_path):
    make(tmp_path / "2_x", "b.PNG", "a.png", "c.Jpg")
    (tmp_path / "2_x" / "notes.md").write_text("no image")
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
    assert mentions(caplog.text, tmp_path / "1_cat", "*.caption", "1 *.txt")
    assert captions_of(scanned(tmp_path, "--caption_extension", ".caption")) == {
        "a.png": "cat"
    }  # class tokens
    assert captions_of(scanned(tmp_path, "--caption_extention", "txt")) == {"a.png": "from txt"}


def test_images_without_any_caption_are_counted_and_named(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    make(tmp_path, "a.png", "b.png")
    assert captions_of(scanned(tmp_path)) == {"a.png": "", "b.png": ""}
    assert mentions(caplog.text, "WARNING", "2", "caption", tmp_path / "a.png", tmp_path / "b.png")


def test_fault_34_all_captions_that_are_no_utf8_are_told_at_once(tmp_path):
    make(tmp_path / "1_cat", "a.png", "b.png", "c.png")
    (tmp_path / "1_cat" / "a.caption").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "1_cat" / "b.caption").write_bytes("cat".encode("utf-16"))
    (tmp_path / "1_cat" / "c.caption").write_bytes(b"fine")
    with pytest.raises(OptionError) as error:
        scanned(tmp_path)
    assert (
        len(error.value.mistakes) == 2
        and "a.caption" in str(error.value)
        and "b.caption" in str(error.value)
    )


def test_fault_25_all_bad_headers_are_told_at_once_or_skipped(tmp_path):
    make(tmp_path / "1_cat", "good.png")
    (tmp_path / "1_cat" / "empty.png").write_bytes(b"")
    (tmp_path / "1_cat" / "text.jpg").write_text("this is no image")
    with pytest.raises(OptionError) as error:
        scanned(tmp_path)
    assert all(
        piece in str(error.value)
        for piece in ("empty.png", "text.jpg", "not an image", "--skip_bad_images")
    )
    assert [sample.path.name for sample in scanned(tmp_path, skip_bad_images=True)[0].samples] == [
        "good.png"
    ]


@pytest.mark.parametrize("case", ["empty folder", "repeats 0", "only bad images"])
def test_fault_47_no_images_at_all_is_a_mistake(case, tmp_path):
    folder = tmp_path / ("0_cat" if case == "repeats 0" else "1_cat")
    make(folder, *(["a.png"] if case == "repeats 0" else []))
    if case == "only bad images":
        (folder / "a.png").write_bytes(b"")
    with pytest.raises(OptionError):
        scanned(tmp_path, skip_bad_images=True)


def test_a_image_below_one_bucket_step_is_told(tmp_path):
    make(tmp_path / "1_cat", "small.png", size=(20, 60))
    with pytest.raises(OptionError, match=mentioning("small.png", "20x60", "32")):
        scanned(tmp_path, "--enable_bucket", "--bucket_no_upscale", "--bucket_reso_steps", 32)


def test_cache_files_have_the_contracts_names(tmp_path):
    make(tmp_path / "1_cat", "a.b.png", size=(80, 48))
    (sample,) = scanned(tmp_path)[0].samples
    assert sample.size == Size(80, 48)
    assert sample.latents_file == tmp_path / "1_cat" / "a.b_0080x0048_sdxl.npz"
    assert sample.text_file == tmp_path / "1_cat" / "a.b_te_outputs.npz"


def test_fault_40_two_images_of_one_stem_dont_share_cache_files(tmp_path):
    make(tmp_path / "1_cat", "a.png", "a.webp")
    one, two = scanned(tmp_path)[0].samples
    assert (
        one.latents_file.name == "a_0064x0064_sdxl.npz"
        and two.latents_file.name == "a.webp_0064x0064_sdxl.npz"
    )
    assert one.text_file != two.text_file


def test_a_second_resolution_of_one_image_has_cache_files_of_its_own(tmp_path):
    make(tmp_path / "x", "a.png")
    text = "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'x').as_posix()}'\n"
        for side in (64, 128)
    )
    (tmp_path / "data.toml").write_text(text)
    options = read_options("test", DATA_OPTIONS, ["--dataset_config", str(tmp_path / "data.toml")])
    one, two = (
        dataset.samples[0] for dataset in scan(read_datasets(options)[0], skip_bad_images=False)
    )
    assert Path(one.cache_stem).name == "a" and Path(two.cache_stem).name == "a_128x128"


def test_one_folder_in_two_spellings_shares_no_cache_files(tmp_path, monkeypatch):
    make(tmp_path / "x", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    folders = ("x", (tmp_path / "x").as_posix(), "link", "link/../x")
    text = "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
        for side, folder in zip((64, 96, 128, 160), folders, strict=True)
    )
    (tmp_path / "data.toml").write_text(text)
    options = read_options("test", DATA_OPTIONS, ["--dataset_config", str(tmp_path / "data.toml")])
    samples = [
        dataset.samples[0] for dataset in scan(read_datasets(options)[0], skip_bad_images=False)
    ]
    assert len({Path(sample.cache_stem).resolve() for sample in samples}) == 4


@pytest.mark.parametrize("name", ["ü ñ 日本.png", "a [x] 100%.png", "a\nb.png"])
def test_fault_52_odd_names_work(name, tmp_path):
    make(tmp_path / "1_cat", name)
    (tmp_path / "1_cat" / name).with_suffix(".caption").write_text("odd")
    assert captions_of(scanned(tmp_path)) == {name: "odd"}


def test_mirrored_images_were_cropped_from_the_other_side(tmp_path):
    make(tmp_path / "1_cat", "a.png", size=(100, 60))
    (sample,) = scanned(
        tmp_path,
        "--enable_bucket",
        "--min_bucket_reso",
        32,
        "--max_bucket_reso",
        128,
        "--bucket_reso_steps",
        32,
    )[0].samples
    crop, bucket = sample.crop, sample.fit.bucket
    assert sample.crop_top_left(flipped=False) == (int(crop.top), int(crop.left))
    assert sample.crop_top_left(flipped=True) == (int(crop.top), int(bucket.width - crop.right))


def test_fault_38_no_file_of_the_ending_that_was_given_is_a_mistake_naming_what_lies_there(
    tmp_path,
):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(
        OptionError,
        match=mentioning(
            tmp_path, "*.tags", "2", "1 *.txt", "--caption_extension", "--allow_missing_captions"
        ),
    ):
        scanned(tmp_path, "--caption_extension", "tags")
    assert captions_of(scanned(tmp_path, "--caption_extension", "tags", allow_missing_captions=True)) == {"a.png": "", "b.png": ""}  # fmt: skip
    make(tmp_path / "1_cat", "a.png")
    assert captions_of(scanned(tmp_path, "--caption_extension", "tags")) == {
        "a.png": "cat"
    }  # class tokens are captions


def test_fault_37_empty_caption_files_are_counted(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    make(tmp_path / "1_cat", "a.png", "b.png")
    (tmp_path / "1_cat" / "a.caption").write_text(" \n")
    assert captions_of(scanned(tmp_path)) == {"a.png": "", "b.png": "cat"}
    assert mentions(caplog.text, "WARNING", "1", "empty", "a.caption")


def test_fault_41_stems_that_start_alike_are_kept_apart(tmp_path):
    make(tmp_path / "1_x", "img1.png", "img10.png", "img1_2.png")
    for stem in ("img1", "img10"):
        (tmp_path / "1_x" / f"{stem}.caption").write_text(stem)
    assert captions_of(scanned(tmp_path)) == {
        "img1.png": "img1",
        "img10.png": "img10",
        "img1_2.png": "x",
    }
    stems = [sample.latents_file.name for sample in scanned(tmp_path)[0].samples]
    assert len(set(stems)) == 3


def test_a_face_in_the_name_isnt_part_of_the_captions_name(tmp_path):
    make(tmp_path / "1_x", "cat_10_20_30_40.png")
    (tmp_path / "1_x" / "cat.caption").write_text("a cat")
    assert captions_of(scanned(tmp_path)) == {"cat_10_20_30_40.png": "a cat"}


def test_fault_48_a_folder_that_isnt_there_is_a_mistake(tmp_path):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'none'\n"
    (tmp_path / "d.toml").write_text(text)
    options = read_options("", DATA_OPTIONS, ["--dataset_config", str(tmp_path / "d.toml")])
    with pytest.raises(OptionError, match=mentioning("d.toml", "subset 1", "image_dir", "none")):
        read_datasets(options)


@pytest.mark.parametrize("size", [(6400, 64), (64, 6400), (16, 16), (3000, 3)])
@pytest.mark.parametrize("extra", [[], ["--bucket_no_upscale"]])
def test_fault_49_extreme_images_have_a_defined_result(size, extra, tmp_path):
    """A bucket that the resized image covers, or one sentence that names the image."""
    make(tmp_path / "1_x", "a.png", size=size)
    words = [
        "--enable_bucket",
        "--min_bucket_reso",
        32,
        "--max_bucket_reso",
        256,
        "--bucket_reso_steps",
        32,
        *extra,
    ]
    try:
        (sample,) = scanned(tmp_path, *words)[0].samples
    except OptionError as error:
        assert mentions(str(error), "a.png", "x".join(map(str, size)), "32") and extra
        return
    assert sample.fit.resized.width >= sample.fit.bucket.width > 0
    assert sample.fit.resized.height >= sample.fit.bucket.height > 0


def test_fault_50_caches_lie_in_cache_dir_when_it_is_given(tmp_path):
    make(tmp_path / "data" / "1_x", "a.png")
    make(tmp_path / "other" / "1_x", "a.png")
    files = [
        scanned(tmp_path / name, cache_dir=tmp_path / "caches")[0].samples[0].latents_file
        for name in ("data", "other")
    ]
    assert all(
        file.is_relative_to(tmp_path / "caches") and file.name == "a_0064x0064_sdxl.npz"
        for file in files
    )
    assert files[0] != files[1]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_fault_51_links_are_followed_loops_end_and_dead_links_are_told(tmp_path):
    make(tmp_path / "elsewhere", "a.png")
    folder = tmp_path / "data"
    make(folder / "deep", "b.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "deep" / "c.png").symlink_to(folder / "deep" / "b.png")
    (tmp_path / "d.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{folder}'\nrecursive = true\n"
    )
    options = read_options("", DATA_OPTIONS, ["--dataset_config", str(tmp_path / "d.toml")])
    samples = scan(read_datasets(options)[0])[0].samples
    assert [str(sample.path.relative_to(folder)) for sample in samples] == [
        "deep/b.png",
        "deep/c.png",
        "linked/a.png",
    ]
    assert samples[1].latents_file.parent == folder / "deep"  # beside the link
    (folder / "dead.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(OptionError, match=mentioning("dead.png", "link")):
        scan(read_datasets(options)[0])


def test_fault_53_a_image_is_what_its_content_says(tmp_path):
    (tmp_path / "1_x").mkdir()
    Image.new("RGB", (80, 48), "red").save(tmp_path / "1_x" / "a.png", format="jpeg")
    Image.new("RGB", (80, 48), "red").save(tmp_path / "1_x" / "b.JpEg", format="webp")
    assert [sample.size for sample in scanned(tmp_path)[0].samples] == [Size(80, 48), Size(80, 48)]


def test_fault_31_a_image_made_to_fill_the_memory_is_refused_by_its_header(tmp_path):
    make(tmp_path / "1_x", "a.png")
    raw = bytearray((tmp_path / "1_x" / "a.png").read_bytes())
    raw[16:24] = (50_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (tmp_path / "1_x" / "a.png").write_bytes(raw)
    with pytest.raises(OptionError, match=mentioning("a.png", "2500000000 pixels")):
        scanned(tmp_path)


def test_fault_40_three_datasets_and_two_endings_share_no_cache_files(tmp_path):
    make(tmp_path / "x", "a.png", "a.webp", "a_64x64.png")
    text = "".join(f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'x').as_posix()}'\n" for side in (64, 128, 64))  # fmt: skip
    (tmp_path / "d.toml").write_text(text)
    options = read_options("", DATA_OPTIONS, ["--dataset_config", str(tmp_path / "d.toml")])
    samples = [sample for dataset in scan(read_datasets(options)[0]) for sample in dataset.samples]
    assert len(samples) == 9 and len({sample.cache_stem for sample in samples}) == 9


def test_regularisation_images_are_shown_as_often_as_the_others(tmp_path):
    make(tmp_path / "train" / "5_cat", "a.png", "b.png")
    make(tmp_path / "reg" / "1_cat", "r0.png", "r1.png", "r2.png")
    (dataset,) = scanned(tmp_path / "train", "--reg_data_dir", tmp_path / "reg")
    assert {sample.path.name: sample.repeats for sample in dataset.samples} == {"a.png": 5, "b.png": 5, "r0.png": 4, "r1.png": 3, "r2.png": 3}  # fmt: skip
    assert [sample.subset.is_reg for sample in dataset.samples] == [False, False, True, True, True]


def test_too_many_regularisation_images_are_left_out_and_told(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    make(tmp_path / "train" / "2_cat", "a.png")
    make(tmp_path / "reg" / "1_cat", "r0.png", "r1.png", "r2.png")
    (dataset,) = scanned(tmp_path / "train", "--reg_data_dir", tmp_path / "reg")
    assert [sample.path.name for sample in dataset.samples] == ["a.png", "r0.png", "r1.png"]
    assert mentions(caplog.text, "WARNING", "1", "3", "regulari")


def test_a_validation_split_takes_its_share_once_and_without_overlap(tmp_path):
    make(tmp_path / "3_x", *[f"{i}.png" for i in range(10)])
    found = {}
    for seed in (1, 1, 2):
        (dataset,) = scanned(tmp_path, "--validation_split", 0.25, "--validation_seed", seed)
        kept, held_out = (
            {sample.path.name for sample in part} for part in (dataset.samples, dataset.validation)
        )
        assert (
            len(kept) == 8 and len(held_out) == 2 and not kept & held_out
        )  # ceil(10 * 0.75) are trained
        assert {sample.repeats for sample in dataset.validation} == {1}
        found.setdefault(seed, set()).add(frozenset(held_out))
    assert len(found[1]) == 1 and found[1] != found[2]


def test_cache_info_is_written_and_read_and_the_files_themselves_win(tmp_path):
    folder = tmp_path / "1_x"
    make(folder, "a.png", "b.png")
    (folder / "a.caption").write_text("from file")
    scanned(tmp_path, "--cache_info")
    info = json.loads((folder / "metadata_cache.json").read_text())
    assert info[str(folder / "a.png")] == {"caption": "from file", "resolution": [64, 64]}
    info[str(folder / "b.png")]["caption"] = "by hand"
    info[str(folder / "a.png")]["caption"] = "by hand too"
    (folder / "metadata_cache.json").write_text(json.dumps(info))
    assert captions_of(scanned(tmp_path, "--cache_info")) == {
        "a.png": "from file",
        "b.png": "by hand",
    }


def test_cache_info_keeps_no_class_tokens_which_may_be_others_next_time(tmp_path):
    make(tmp_path / "1_cat", "a.png")
    assert captions_of(scanned(tmp_path, "--cache_info")) == {"a.png": "cat"}
    (tmp_path / "1_cat").rename(tmp_path / "1_dog")
    assert captions_of(scanned(tmp_path, "--cache_info")) == {"a.png": "dog"}


def test_the_size_in_sd_scripts_cache_info_from_before_the_exif_orientation_isnt_believed(tmp_path):
    folder = tmp_path / "1_x"
    make(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (160, 80)).save(folder / "a.png", exif=exif)
    row = {"caption": "theirs", "resolution": [160, 80]}
    (folder / "metadata_cache.json").write_text(json.dumps({str(folder / "a.png"): row}))
    (sample,) = scanned(tmp_path, "--cache_info")[0].samples
    assert (sample.size, sample.caption) == (Size(80, 160), "theirs")


def test_cache_info_leaves_a_bad_image_out_and_tells_it_with_its_path(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    folder = tmp_path / "1_x"
    make(folder, "a.png")
    (folder / "zz.png").write_bytes(b"")
    assert list(captions_of(scanned(tmp_path, "--cache_info", skip_bad_images=True))) == ["a.png"]
    assert mentions(caplog.text, folder / "zz.png")
    assert list(json.loads((folder / "metadata_cache.json").read_text())) == [str(folder / "a.png")]


def test_conditioning_images_go_by_stem_and_shape(tmp_path):
    make(tmp_path / "pics", "a.png", "b.png", "c.png", "d.png", size=(64, 32))
    make(tmp_path / "cond", "a.webp", "b.png", "b.jpg", size=(128, 64))
    make(tmp_path / "cond", "c.png", size=(64, 64))
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'pics'}'\nconditioning_data_dir = '{tmp_path / 'cond'}'\n"
    (tmp_path / "d.toml").write_text(text)
    groups = [*DATA_OPTIONS, LossOptions]
    configs, _ = read_datasets(
        read_options("", groups, ["--dataset_config", str(tmp_path / "d.toml")])
    )
    with pytest.raises(
        OptionError, match=mentioning(tmp_path / "pics", "conditioning_data_dir", "--masked_loss")
    ):
        check_masks_are_used(configs)
    options = read_options(
        "", groups, ["--dataset_config", str(tmp_path / "d.toml"), "--masked_loss"]
    )
    with pytest.raises(OptionError) as error:
        scan(read_datasets(options)[0])
    told = str(error.value)
    assert mentions(told, "pics", "b.png", "2", "b.jpg") and mentions(
        told, "d.png", tmp_path / "cond"
    )
    assert mentions(told, tmp_path / "cond" / "c.png", "64x64", "64x32")
    (sample,) = scan(read_datasets(options)[0], skip_bad_images=True)[0].samples
    assert sample.conditioning == str(tmp_path / "cond" / "a.webp")


def test_the_scan_takes_sizes_and_captions_from_the_index_while_files_are_as_they_were(
    tmp_path, monkeypatch
):
    folder = tmp_path / "1_x"
    make(folder, "a.png")
    (folder / "a.caption").write_text("first")
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    known = FileIndex(tmp_path / "index")
    first = scanned(tmp_path, file_index=known)
    monkeypatch.setattr(
        "library.data.scan.read_image_info", lambda file: pytest.fail(f"looked at {file}")
    )
    monkeypatch.setattr(
        "library.data.scan.read_caption", lambda file, **how: pytest.fail(f"read {file}")
    )
    assert captions_of(scanned(tmp_path, file_index=known)) == captions_of(first)
    monkeypatch.undo()
    (folder / "a.caption").write_text("edited")
    assert captions_of(scanned(tmp_path, file_index=known)) == {"a.png": "edited"}


def test_images_that_need_a_plugin_are_told(tmp_path, caplog):
    logging.getLogger("library").propagate = True
    make(tmp_path / "1_x", "a.png")
    (tmp_path / "1_x" / "b.jxl").write_bytes(b"x")
    scanned(tmp_path)
    if ".jxl" not in readable_extensions():
        assert mentions(caplog.text, "WARNING", "1 .jxl", "pip install pillow-jxl-plugin")


def test_the_signature_of_a_dataset_is_that_of_earlier_versions(tmp_path):
    """States that were saved before settings were renamed can be resumed: their text is hashed."""
    make(tmp_path / "2_x", "a.png", size=(128, 128))
    make(tmp_path / "2_x", "b.png", size=(160, 112))
    words = ["--keep_tokens_separator", "|||", "--shuffle_caption", "--token_warmup_step", "5"]
    facts = []
    for more in ([], words):
        arguments = [
            "--train_data_dir",
            str(tmp_path),
            *scanning.BUCKETS,
            *more,
            "--output_dir",
            "out",
        ]
        arguments += ["--output_name", "x", "--pretrained_model_name_or_path", "model.safetensors"]
        options = read_options("test", sdxl_train.OPTIONS, arguments)
        datasets = scan(read_datasets(options)[0])
        signature = run_signature(
            {}, datasets, base_model="", latents_are_cached=False, text_is_cached=False
        )
        facts.append(signature["files, sizes and captions"])
    assert facts == ["d64b8408bfc82ede", "ef1ae0c6bca8977a"]
