"""Dataset definitions: where values come from, folders named N_class, and every mistake with its table."""

from pathlib import Path

import pytest
from messages import mentioning, mentions

from library.data.dataset_config import DatasetDefinition, read_datasets
from library.data.options import DATA_OPTIONS
from library.errors import OptionError
from library.options import read_options
from library.size import Size

GROUPS = DATA_OPTIONS


def options_of(*argv: object):
    return read_options("test", GROUPS, [str(word) for word in argv])


def plans_of(tmp_path: Path, text: str, *argv: object):
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "b").mkdir(exist_ok=True)
    path = tmp_path / "data.toml"
    path.write_text(text.replace("DIR", tmp_path.as_posix()), encoding="utf-8")
    return read_datasets(options_of("--dataset_config", path, *argv))[0]


def mistakes_of(tmp_path: Path, text: str, *argv: object) -> list[str]:
    with pytest.raises(OptionError) as error:
        plans_of(tmp_path, text, *argv)
    return [mistake.text for mistake in error.value.mistakes]


WHOLE = """
[general]
enable_bucket = true
keep_tokens = 1
caption_extension = ".txt"
shuffle_caption = true

[[datasets]]
resolution = [512, 768]
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "DIR/a"
  num_repeats = 3
  class_tokens = "a cat"

  [[datasets.subsets]]
  image_dir = "DIR/b"
  keep_tokens = 5
  shuffle_caption = false
  flip_aug = true

[[datasets]]
resolution = 640

  [[datasets.subsets]]
  image_dir = "DIR/a"
"""


def test_values_come_from_subset_then_dataset_then_general_then_command_line_then_default(tmp_path):
    first, second = plans_of(
        tmp_path, WHOLE, "--train_batch_size", 7, "--caption_dropout_rate", 0.5, "--keep_tokens", 9
    )
    assert first.batch_size == 4 and second.batch_size == 7
    assert first.buckets.resolution == Size(512, 768) and second.buckets.resolution == Size(
        640, 640
    )
    assert [subset.captions.keep_tokens for subset in (*first.subsets, *second.subsets)] == [
        2,
        5,
        1,
    ]
    assert [subset.captions.shuffle_caption for subset in first.subsets] == [True, False]
    assert [subset.pixels.flip_aug for subset in first.subsets] == [False, True]
    assert first.subsets[0].num_repeats == 3 and first.subsets[0].class_tokens == "a cat"
    assert first.subsets[0].captions.caption_dropout_rate == 0.5
    assert first.buckets.max_bucket_reso == 1024 and first.buckets.bucket_reso_steps == 64


def test_json_says_the_same(tmp_path):
    import json
    import tomllib

    toml = plans_of(tmp_path, WHOLE)
    tables = tomllib.loads(WHOLE.replace("DIR", tmp_path.as_posix()))
    (tmp_path / "data.json").write_text(json.dumps(tables), encoding="utf-8")
    assert read_datasets(options_of("--dataset_config", tmp_path / "data.json"))[0] == toml


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("[genral]\n", ("'genral'", "'general'")),
        ("[[datasets]]\nresolution = 512\n", ("[[datasets]] 1", "[[datasets.subsets]]")),
        ("[[datasets]]\nresolution = 512\nimage_dir = 'x'\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("[[datasets]] 1", "'image_dir'", "[[datasets.subsets]]")),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nbatch_size = 2\n", ("subset 1", "'batch_size'", "[general]", "[[datasets]]")),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'DIR/none'\n", ("subset 1", "image_dir", "DIR/none")),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 2\n", ("subset 1", "image_dir")),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("[[datasets]] 1", "--resolution")),
        ("[[datasets]]\nresolution = [1,2,3]\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("[[datasets]] 1", "resolution", "[1, 2, 3]")),
        ("[[datasets]]\nresolution = 2048\nenable_bucket = true\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("max_bucket_reso", "1024", "resolution", "2048")),
        ("[[datasets]]\nresolution = 512\nenable_bucket = true\nbucket_reso_steps = 40\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("bucket_reso_steps", "40", "32")),
        ("[[datasets]]\nresolution = 500\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("resolution", "500x500", "8")),
        ("[[datasets]]\nresolution = 512\nkeep_tokens = 'two'\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("keep_tokens", "number|integer", "'two'")),
        ("[[datasets]]\nresolution = 512\nkeep_token = 2\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n", ("'keep_token'", "'keep_tokens'")),
        ("[datasets]\nresolution = 512\n", ("[[datasets]]", "[[datasets.subsets]]", "bracket")),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_table(text, tokens, tmp_path):
    found = mistakes_of(tmp_path, text)
    assert mentions(
        found, "data.toml", *(token.replace("DIR", tmp_path.as_posix()) for token in tokens)
    ), found


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    text = "[general]\nkeep_token = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DIR/none'\nflip_aug = 'maybe'\n"
    assert len(mistakes_of(tmp_path, text)) == 4


def test_a_missing_file_and_an_unknown_ending_are_told(tmp_path):
    for name, tokens in (
        ("none.toml", ["file"]),
        ("x.yaml", [".toml", ".json"]),
        ("x.toml", ["line 1"]),
    ):
        (tmp_path / "x.yaml").write_text("", encoding="utf-8")
        (tmp_path / "x.toml").write_text("= =", encoding="utf-8")
        with pytest.raises(OptionError, match=mentioning("--dataset_config", name, *tokens)):
            read_datasets(options_of("--dataset_config", tmp_path / name))


def test_folders_named_n_class_give_repeats_and_class_tokens(tmp_path):
    for name in ("10_a cat_with hat", "2", "3_", "0_none", "notes"):
        (tmp_path / name).mkdir()
    plans, notices = read_datasets(
        options_of("--train_data_dir", tmp_path, "--resolution", "64,96")
    )
    found = {
        subset.image_dir.name: (subset.num_repeats, subset.class_tokens)
        for subset in plans[0].subsets
    }
    assert found == {"10_a cat_with hat": (10, "a cat_with hat"), "2": (2, ""), "3_": (3, "")}
    assert mentions(notices, "0_none", "num_repeats") and mentions(notices, "N_class", "notes")
    assert plans[0].buckets.resolution == Size(64, 96)


def test_a_plain_folder_of_images_is_taken_once_and_told(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    plans, notices = read_datasets(options_of("--train_data_dir", tmp_path, "--resolution", 64))
    assert (plans[0].subsets[0].image_dir, plans[0].subsets[0].num_repeats) == (tmp_path, 1)
    assert mentions(notices[0], "N_class", tmp_path)


def test_a_folder_without_images_or_classes_says_what_is_expected_and_found(tmp_path):
    (tmp_path / "cats").mkdir()
    with pytest.raises(OptionError, match=mentioning("--train_data_dir", "N_class", "cats")):
        read_datasets(options_of("--train_data_dir", tmp_path, "--resolution", 64))
    with pytest.raises(OptionError, match=mentioning("--train_data_dir", tmp_path / "none")):
        read_datasets(options_of("--train_data_dir", tmp_path / "none", "--resolution", 64))


def test_a_shortest_side_below_the_step_is_the_step(tmp_path):
    text = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n"
    plans = plans_of(tmp_path, text)
    assert (plans[0].buckets.min_bucket_reso, plans[0].buckets.bucket_reso_steps) == (64, 64)


def test_a_folder_named_twice_in_a_dataset_is_used_once_and_told(tmp_path):
    (tmp_path / "a").mkdir()
    twice = "[[datasets]]\nresolution = 512\n" + "[[datasets.subsets]]\nimage_dir = 'DIR/a'\n" * 2
    path = tmp_path / "data.toml"
    path.write_text(twice.replace("DIR", tmp_path.as_posix()), encoding="utf-8")
    plans, notices = read_datasets(options_of("--dataset_config", path))
    assert len(plans[0].subsets) == 1 and mentions(
        notices[0], tmp_path / "a", "twice|duplicate|more than once"
    )


@pytest.mark.parametrize(
    "name",
    [
        "shuffle_caption",
        "caption_dropout_rate",
        "caption_tag_dropout_rate",
        "token_warmup_step",
        "enable_wildcard",
    ],
)
def test_fault_59_cached_text_and_captions_that_change_exclude_each_other(name, tmp_path):
    (tmp_path / "1_x").mkdir()
    value = () if name in ("shuffle_caption", "enable_wildcard") else (0.5,)
    options = options_of(
        "--train_data_dir",
        tmp_path,
        "--resolution",
        64,
        "--cache_text_encoder_outputs",
        f"--{name}",
        *value,
    )
    (mistake,) = DatasetDefinition().check(options)
    assert mentions(mistake.text, name, "--cache_text_encoder_outputs")


@pytest.mark.parametrize("name, value", [("shuffle_caption", ()), ("caption_dropout_rate", (0.5,)), ("caption_tag_dropout_rate", (0.5,)), ("enable_wildcard", ()), ("caption_dropout_every_n_epochs", (2,))])  # fmt: skip
def test_cached_variants_lift_the_refusal_of_captions_that_change(name, value, tmp_path):
    (tmp_path / "1_x").mkdir()
    words = [
        "--train_data_dir",
        tmp_path,
        "--resolution",
        64,
        "--cache_text_encoder_outputs",
        f"--{name}",
        *value,
    ]
    (mistake,) = DatasetDefinition().check(options_of(*words))
    assert mentions(mistake.text, name, "--text_cache_variants")
    assert list(DatasetDefinition().check(options_of(*words, "--text_cache_variants", 4))) == []


def test_token_warmup_cant_be_cached_at_all(tmp_path):
    (tmp_path / "1_x").mkdir()
    words = [
        "--train_data_dir",
        tmp_path,
        "--resolution",
        64,
        "--cache_text_encoder_outputs",
        "--token_warmup_step",
        10,
    ]
    for more in ([], ["--text_cache_variants", 4]):
        (mistake,) = DatasetDefinition().check(options_of(*words, *more))
        assert mentions(mistake.text, "token_warmup_step", "--cache_text_encoder_outputs")


@pytest.mark.parametrize("name", ["color_aug", "random_crop"])
def test_cached_latents_and_pixels_that_change_exclude_each_other(name, tmp_path):
    (tmp_path / "1_x").mkdir()
    (mistake,) = DatasetDefinition().check(
        options_of("--train_data_dir", tmp_path, "--resolution", 64, "--cache_latents", f"--{name}")
    )
    assert mentions(mistake.text, name, "--cache_latents")


def test_settings_that_have_no_effect_are_told(tmp_path):
    (tmp_path / "a").mkdir()
    text = "[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nnetwork_multiplier = 0.5\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\nface_crop_aug_range = [1.0, 2]\n"  # fmt: skip
    path = tmp_path / "data.toml"
    path.write_text(text.replace("DIR", tmp_path.as_posix()), encoding="utf-8")
    plans, notices = read_datasets(options_of("--dataset_config", path))
    assert mentions(notices, "face_crop_aug_range")
    assert mentions(notices, "network_multiplier")
    assert plans[0].subsets[0].pixels.face_crop_aug_range is None


def test_empty_text_is_unset_but_where_it_says_something(tmp_path):
    (tmp_path / "a").mkdir()
    text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'a').as_posix()}'\n"
    empty = ("resize_interpolation", "caption_separator", "caption_extension", "class_tokens")
    (tmp_path / "data.toml").write_text(
        text + "".join(f'{key} = ""\n' for key in empty), encoding="utf-8"
    )
    (subset,) = read_datasets(options_of("--dataset_config", tmp_path / "data.toml"))[0][0].subsets
    assert subset.pixels.resize_interpolation is None and subset.captions.caption_separator == ","
    assert subset.caption_extension == ".caption" and subset.class_tokens == ""


def test_metadata_and_folders_cant_share_a_dataset(tmp_path):
    (tmp_path / "m.json").write_text("{}")
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'DIR/a'\n[[datasets.subsets]]\nmetadata_file = 'DIR/m.json'\n"  # fmt: skip
    assert mentions(
        mistakes_of(tmp_path, text), "metadata_file", "[[datasets]] 1", "two|separate|own"
    )
