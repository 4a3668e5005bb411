"""The helper that tests look at messages with: what its tokens find, and what they don't."""

import pytest
from messages import lines_mentioning, mentioning, mentions, shows_caching


@pytest.mark.parametrize(
    "text, token, expected",
    [
        ("--resume: it is for another run", "--resume", True),
        ("give --resume_anyway", "--resume", False),
        ("must be at least 1, got -3", "1", True),
        ("must be at least 1, got -3", "-3", True),
        ("got 10, or 0.1, or 2,001", "1", False),
        ("bucket 64x96", "64x96", True),
        ("expected 0..1", "1", True),
        ("the latents contain NaN", "finite|NaN|Inf", True),
        ("its latents aren't finite", "finite|NaN|Inf", True),
        ("infinite loss", "finite|NaN|Inf", False),
        ("Permission denied", "permission", True),
        ("--resume: no state", "resum", False),
        ("resumed from step 2", "resum", True),
        ("/tmp/a_missing_file_0/x.png", "file", False),
        ("x.png: no such file", "file", True),
        ("lora_unet_odd.lora_up.weight [2, 3]", "lora_unet_odd", True),
        ("lora_unet_odd.lora_up.weight [2, 3]", "[2, 3]", True),
        ("a vae is needed", "VAE", False),
    ],
)
def test_a_token_is_found_as_an_entire_name_number_or_start_of_a_word(text, token, expected):
    assert mentions(text, token) is expected


def test_all_tokens_are_in_one_line_in_any_order():
    text = "error: --steps: must be at least 1, got 0\nerror: --seed: expected a number"
    assert mentions(text, "0", "--steps", "1") and mentions(text.splitlines(), "--seed")
    assert not mentions(text, "--seed", "0")
    assert lines_mentioning(text, "error") == text.splitlines()
    with pytest.raises(ValueError, match=mentioning("--seed", "number")):
        raise ValueError(text)


def test_caching_is_seen_in_the_console_and_isnt_in_an_error():
    assert shows_caching("12:00:00 INFO    latents: 0 of 4 are cached\n")
    assert shows_caching("caching text-encoder outputs: 100%\n")
    assert not shows_caching(
        "12:00:00 WARNING --cache_latents is set\nerror: latents of another size\n"
    )
