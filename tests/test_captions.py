"""Captions: golden 09, and files as real editors write them."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from messages import mentioning

from library.data.captions import (
    CaptionError,
    CaptionSettings,
    caption_variants,
    process_caption,
    read_caption,
)

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "09_captions.json").read_text(encoding="utf-8")
)
EXACT = [case for case in GOLDEN["cases"] if case["kind"] == "exact"]
RANDOM = [case for case in GOLDEN["cases"] if case["kind"] == "random"]


def processed(case: dict, seed: int) -> str:
    settings = CaptionSettings(**{**GOLDEN["defaults"], **case["options"]})
    return process_caption(
        case["caption"], settings, random.Random(seed), epoch=case["epoch"], step=case["step"],
        max_train_steps=case["max_train_steps"], replacements=case["replacements"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "case", EXACT, ids=lambda case: f"{case['caption'][:20]!r} {case['options']}"
)
def test_golden_09_exact(case):
    assert processed(case, 0) == case["result"]


@pytest.mark.parametrize(
    "case", RANDOM, ids=lambda case: f"{case['caption'][:20]!r} {case['options']}"
)
def test_golden_09_random(case):
    """Only results that the reference gives, as often as it gives them (within 4 standard errors)."""
    n = 4000
    counts = Counter(processed(case, seed) for seed in range(n))
    if "frequency" not in case:
        tags = [len(caption.split(", ")) for caption in counts.elements()]
        assert sum(tags) / n == pytest.approx(case["mean_number_of_tags"], abs=0.1)
        assert set(tags) <= set(case["lengths_seen"])
        return
    assert counts.keys() == case["frequency"].keys()
    for caption, expected in case["frequency"].items():
        error = (expected * (1 - expected) / n) ** 0.5
        assert counts[caption] / n == pytest.approx(expected, abs=4 * 2**0.5 * error + 1e-9), (
            caption
        )


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("a cat", "a cat"),
        ("\ufeffa cat", "a cat"),  # fault 35
        ("a cat\r\nmore", "a cat"),  # fault 36
        ("a cat\rmore", "a cat"),
        ("\n  \n a cat  \nmore", "a cat"),
        ("", ""),  # fault 37
        ("   \n", ""),
        ("naïve café 日本", "naïve café 日本"),
    ],
)
def test_faults_35_to_37_the_first_line_that_isnt_blank_is_the_caption(raw, expected, tmp_path):
    (tmp_path / "c.txt").write_bytes(raw.encode())
    assert read_caption(tmp_path / "c.txt", all_lines=False) == expected


def test_all_lines_are_kept_for_wildcards(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"one\r\n\r\n two \n")
    assert read_caption(tmp_path / "c.txt", all_lines=True) == "one\ntwo"


@pytest.mark.parametrize(
    "raw, tokens",
    [
        ("ein Käse".encode("latin-1"), ["UTF-8", "byte 5"]),
        ("a cat".encode("utf-16"), ["UTF-16"]),
        ("a cat".encode("utf-16-le"), ["NUL"]),
        (b"a\0b", ["NUL"]),
        (b"\xff\xd8\xff\xe0", ["UTF-8", "byte 0"]),
    ],
)
def test_fault_34_what_is_no_utf8_text_is_told_with_the_reason(raw, tokens, tmp_path):
    (tmp_path / "c.txt").write_bytes(raw)
    with pytest.raises(CaptionError, match=mentioning(*tokens)):
        read_caption(tmp_path / "c.txt", all_lines=False)


def test_settings_name_what_makes_captions_random():
    assert CaptionSettings(caption_prefix="x", keep_tokens=2).random_settings() == []
    everything = CaptionSettings(
        True,
        caption_dropout_rate=0.1,
        caption_dropout_every_n_epochs=2,
        caption_tag_dropout_rate=0.1,
        token_warmup_step=3,
        enable_wildcard=True,
    )
    assert len(everything.random_settings()) == 6


@pytest.mark.parametrize("case", [case for case in RANDOM if "frequency" in case], ids=lambda case: f"{case['caption'][:20]!r} {case['options']}")  # fmt: skip
def test_golden_09_cached_variants_come_as_often_as_the_uncached_pipeline_draws_them(case):
    settings = CaptionSettings(**{**GOLDEN["defaults"], **case["options"]})
    if settings.drops_captions or settings.token_warmup_step or case["replacements"]:
        pytest.skip("dropout is drawn per step, warm-up is refused, replacements aren't cached")
    n, count = 1000, 4
    counts = Counter(
        variant
        for seed in range(n)
        for variant in caption_variants(
            case["caption"], settings, count, (random.Random(f"{seed} {i}") for i in range(count))
        )
    )
    assert counts.keys() == case["frequency"].keys()
    total = sum(counts.values())
    for caption, expected in case["frequency"].items():
        error = (expected * (1 - expected) / total) ** 0.5
        assert counts[caption] / total == pytest.approx(expected, abs=4 * 2**0.5 * error + 1e-9), (
            caption
        )


def test_variants_leave_caption_dropout_to_the_step():
    settings = CaptionSettings(
        shuffle_caption=True, caption_dropout_rate=0.9, caption_dropout_every_n_epochs=1
    )
    variants = caption_variants("a, b, c", settings, 20, map(random.Random, range(20)))
    assert "" not in variants and len(set(variants)) == 6
