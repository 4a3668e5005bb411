"""Options within a prompt: `a cat --w 832 --n dark`. This module doesn't import torch.

Source: contract, training_math.md section 10 (line options of sdxl_gen_img.py).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from library.errors import OptionError
from library.generation.gradual_latent import read_unsharp
from library.generation.options import MAX_SEED, side_problem
from library.option_types import did_you_mean


@dataclass(frozen=True)
class PromptLine:
    """A prompt and its own options; None: the option isn't given.

    Attributes:
        width: in pixels, a multiple of 32.
        height: in pixels, a multiple of 32.
        seeds: of the prompt's images in order; the last one is used for all that follow.
        negative_scale: NO_NEGATIVE_SCALE if the prompt turns it off.
        multipliers: of the networks in order; the last one is used for all that follow.
        gl_unsharp: as --gradual_latent_unsharp_params.
    """

    prompt: str = ""
    prompt2: str | None = None
    negative: str | None = None
    negative2: str | None = None
    clip_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    original_width_negative: int | None = None
    original_height_negative: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    steps: int | None = None
    seeds: tuple[int, ...] | None = None
    scale: float | None = None
    negative_scale: float | None = None
    strength: float | None = None
    multipliers: tuple[float, ...] | None = None
    ds_depth_1: int | None = None
    ds_timesteps_1: int | None = None
    ds_depth_2: int | None = None
    ds_timesteps_2: int | None = None
    ds_ratio: float | None = None
    gl_timesteps: int | None = None
    gl_ratio: float | None = None
    gl_every_n_steps: int | None = None
    gl_ratio_step: float | None = None
    gl_s_noise: float | None = None
    gl_unsharp: str | None = None


NO_NEGATIVE_SCALE = -math.inf
AND = re.compile(r"\s+AND\s+")  # separates the sub-prompts of regions


class _ValueType(NamedTuple):
    """How a value is read, and its description in messages."""

    read: Callable[[str], Any]
    expected: str


class _InvalidValue(ValueError):
    """A value is invalid; the message explains why."""


def _integer(least: int | None = None, most: int | None = None) -> _ValueType:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError
        return _within(int(text), least, most)

    return _ValueType(read, _with_bounds("a whole number", least, most))


def _real(least: float | None = None, most: float | None = None) -> _ValueType:
    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError
        return _within(value, least, most)

    return _ValueType(read, _with_bounds("a number", least, most))


def _within(value: Any, least: float | None, most: float | None) -> Any:
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError
    return value


def _with_bounds(description: str, least: float | None, most: float | None) -> str:
    if least is None:
        return description
    if most is None:
        return f"{description} of {least:g} or more"
    return f"{description} from {least:g} to {most:g}"


def _read_steps(text: str) -> int:
    return min(max(_integer().read(text), 1), 1000)


def _read_side(text: str) -> int:
    value = _integer().read(text)
    problem = side_problem(value)
    if problem:
        raise _InvalidValue(problem)
    return value


def _read_unsharp(text: str) -> str:
    try:
        read_unsharp(text)
    except ValueError as error:
        raise _InvalidValue(str(error)) from None
    return text


def _read_negative_scale(text: str) -> float:
    return NO_NEGATIVE_SCALE if text.lower() == "none" else _real().read(text)


def _list_of(kind: _ValueType) -> _ValueType:
    return _ValueType(
        lambda text: tuple(kind.read(part.strip()) for part in text.split(",")),
        f"{kind.expected}, or several separated by commas",
    )


_TEXT = _ValueType(str, "text")
_SIDE = _ValueType(_read_side, "a whole number of pixels")
_SIZE = _integer(0)
_TIMESTEP = _integer(0, 1000)

# Letters -> field, value type.
LINE_OPTIONS: Mapping[str, tuple[str, _ValueType]] = {
    "n": ("negative", _TEXT),
    "c": ("clip_prompt", _TEXT),
    "p2": ("prompt2", _TEXT),
    "n2": ("negative2", _TEXT),
    "w": ("width", _SIDE),
    "h": ("height", _SIDE),
    "ow": ("original_width", _SIZE),
    "oh": ("original_height", _SIZE),
    "nw": ("original_width_negative", _SIZE),
    "nh": ("original_height_negative", _SIZE),
    "ct": ("crop_top", _integer()),
    "cl": ("crop_left", _integer()),
    "s": ("steps", _ValueType(_read_steps, "a whole number")),
    "d": ("seeds", _list_of(_integer(0, MAX_SEED))),
    "l": ("scale", _real()),
    "nl": ("negative_scale", _ValueType(_read_negative_scale, "a number, or none")),
    "t": ("strength", _real(0, 1)),
    "am": ("multipliers", _list_of(_real())),
    "dsd1": ("ds_depth_1", _integer(0, 8)),
    "dst1": ("ds_timesteps_1", _TIMESTEP),
    "dsd2": ("ds_depth_2", _integer(0, 8)),
    "dst2": ("ds_timesteps_2", _TIMESTEP),
    "dsr": ("ds_ratio", _real(0.01, 1)),
    "glt": ("gl_timesteps", _TIMESTEP),
    "glr": ("gl_ratio", _real(0.01, 1)),
    "gle": ("gl_every_n_steps", _integer(1)),
    "gls": ("gl_ratio_step", _real(0.001, 1)),
    "glsn": ("gl_s_noise", _real(0)),
    "glus": ("gl_unsharp", _ValueType(_read_unsharp, "size,sigma,strength")),
}


def read_line(line: str, where: str) -> PromptLine:
    """Read a prompt with its options, whose letters may be upper case.

    Args:
        line: the prompt as the user wrote it.
        where: what to call the line in messages.

    Raises:
        OptionError: with all mistakes of the line.
    """
    prompt, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
    mistakes = []
    for option in options:
        letters, _, text = (part.strip() for part in option.partition(" "))
        if letters.lower() not in LINE_OPTIONS:
            hint = did_you_mean(letters.lower(), LINE_OPTIONS)
            mistakes.append(f"{where}: --{letters} is not an option of a prompt{hint}")
            continue
        name, kind = LINE_OPTIONS[letters.lower()]
        try:
            values[name] = kind.read(text)
        except _InvalidValue as error:
            mistakes.append(f"{where}: --{letters} {text}: {error}")
        except (ValueError, OverflowError):
            mistakes.append(f"{where}: --{letters}: expected {kind.expected}, got {text!r}")
    if mistakes:
        raise OptionError(*mistakes)
    return PromptLine(**values)
