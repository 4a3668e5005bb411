"""Sample prompts: files, inline options, and the problems of invalid ones."""

import json

import pytest

from library.errors import OptionError
from library.generation.sample_prompts import SamplePrompt, at_size, read_sample_prompts

CAT = SamplePrompt("a cat", "dark, blurry", 512, 768, 5, 20, 3.5, "euler_a")
INLINE = "a cat --n dark, blurry --w 512 --H 769 --d 5 --s 20 --l 3.5 --ss euler_a"


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return read_sample_prompts(path)


@pytest.mark.parametrize("name, text", [
    ("p.txt", f"# a comment\n\n\ufeff{INLINE}\n".replace("\ufeff", "")),
    ("p.json", json.dumps([INLINE])),
    ("p.json", json.dumps([{"prompt": "a cat", "negative_prompt": "dark, blurry", "width": 530, "height": "768", "seed": 5, "sample_steps": 20, "scale": 3.5, "sample_sampler": "euler_a"}])),
    ("p.toml", '[prompt]\nnegative_prompt = "dark, blurry"\nscale = 3.5\nseed = 1\n[[prompt.subset]]\nprompt = "a cat"\nwidth = 512\nheight = 768\nseed = 5\nsample_steps = 20\nsample_sampler = "euler_a"\n'),
])  # fmt: skip
def test_all_kinds_of_files_give_the_same_prompt(name, text, tmp_path):
    assert read(tmp_path / name, text) == ([CAT], [])


def test_words_that_look_like_options_stay_in_the_prompt(tmp_path):
    """The reference takes `w 512` and `n cat` at the start of a prompt for options."""
    found, problems = read(tmp_path / "p.txt", "w 512 n cat, well-lit --s 2\n--n only negative\n")
    assert [(p.prompt, p.negative_prompt, p.width, p.sample_steps) for p in found] == [
        ("w 512 n cat, well-lit", "", None, 2),
        ("", "only negative", None, 30),
    ]
    assert problems == []


def test_bad_values_are_reported_with_their_line_and_ignored(tmp_path):
    found, problems = read(
        tmp_path / "p.txt", f"a --w wide --ss nope --d {2**63}\nb --s 99999 --ar 16:9 --g 3\n"
    )
    assert found == [SamplePrompt("a"), SamplePrompt("b", sample_steps=1000)]
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{tmp_path / 'p.txt'}, line {n}" for n in (1, 1, 1, 2, 2)
    ]
    assert (
        "width: expected a whole number, got 'wide'" in problems[0]
        and "expected one of ddim" in problems[1]
    )


@pytest.mark.parametrize("name, content", [
    ("p.json", b"{"), ("p.json", b'{"prompt": "x"}'), ("p.toml", b"a = 1"), ("p.txt", "\u00e9".encode("utf-16")), ("gone.txt", None),
])  # fmt: skip
def test_files_that_cant_be_read_are_refused(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=f"--sample_prompts .*{name}"):
        read_sample_prompts(tmp_path / name)


def test_prompts_without_a_size_get_the_size_of_the_run():
    assert at_size(SamplePrompt("a", width=96), 1024, 1000) == SamplePrompt(
        "a", width=96, height=992
    )
