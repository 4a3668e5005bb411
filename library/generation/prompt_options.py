"""PromptLine: one line of prompts, `a cat --w 832 --n dark`, read. No torch here.

Source: contract, training_math.md section 10 (line options of sdxl_gen_img.py).
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from library.errors import OptionError
from library.generation.options import MOST_SEED, read_unsharp, side_problem
from library.option_types import did_you_mean


@dataclass(frozen=True)
class PromptLine:
    """What a line says; None where it says nothing.

    Attributes:
        width, height: in pixels, multiples of 32.
        seeds: for the line's pictures in turn; the last one goes on.
        negative_scale: NO_NEGATIVE_SCALE where the line turns it off.
        multipliers: of the networks in turn; the last one goes on.
        unsharp: as --gradual_latent_unsharp_params.
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
AND = re.compile(r"\s+AND\s+")  # divides a prompt into those of regions


class _Kind(NamedTuple):
    read: Callable[[str], Any]
    wanted: str


def _whole(least: int | None = None, most: int | None = None) -> _Kind:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text):
            raise ValueError
        return _within(int(text), least, most)

    return _Kind(read, _in_words("a whole number", least, most))


def _number(least: float | None = None, most: float | None = None) -> _Kind:
    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError
        return _within(value, least, most)

    return _Kind(read, _in_words("a number", least, most))


def _within(value: Any, least: float | None, most: float | None) -> Any:
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError
    return value


def _in_words(what: str, least: float | None, most: float | None) -> str:
    if least is None:
        return what
    return f"{what} of {least:g} or more" if most is None else f"{what} from {least:g} to {most:g}"


def _steps(text: str) -> int:
    return min(max(_whole().read(text), 1), 1000)


def _side(text: str) -> int:
    value = _whole().read(text)
    if problem := side_problem(value):
        raise _Told(problem)
    return value


def _unsharp(text: str) -> str:
    try:
        read_unsharp(text)
    except ValueError as error:
        raise _Told(str(error)) from None
    return text


def _negative_scale(text: str) -> float:
    return NO_NEGATIVE_SCALE if text.lower() == "none" else _number().read(text)


class _Told(ValueError):
    """Says in words what is wrong."""


def _list_of(kind: _Kind) -> _Kind:
    return _Kind(lambda text: tuple(kind.read(part.strip()) for part in text.split(",")), f"{kind.wanted}, or several with commas")  # fmt: skip


_TEXT = _Kind(str, "text")
_SIDE = _Kind(_side, "a whole number of pixels")
_SIZE = _whole(0)
_TIMESTEP = _whole(0, 1000)

# Letters -> field, kind.
LINE_OPTIONS: Mapping[str, tuple[str, _Kind]] = {
    "n": ("negative", _TEXT), "c": ("clip_prompt", _TEXT), "p2": ("prompt2", _TEXT), "n2": ("negative2", _TEXT),
    "w": ("width", _SIDE), "h": ("height", _SIDE), "ow": ("original_width", _SIZE), "oh": ("original_height", _SIZE),
    "nw": ("original_width_negative", _SIZE), "nh": ("original_height_negative", _SIZE),
    "ct": ("crop_top", _whole()), "cl": ("crop_left", _whole()),
    "s": ("steps", _Kind(_steps, "a whole number")), "d": ("seeds", _list_of(_whole(0, MOST_SEED))),
    "l": ("scale", _number()), "nl": ("negative_scale", _Kind(_negative_scale, "a number, or none")),
    "t": ("strength", _number(0, 1)), "am": ("multipliers", _list_of(_number())),
    "dsd1": ("ds_depth_1", _whole(0, 8)), "dst1": ("ds_timesteps_1", _TIMESTEP), "dsd2": ("ds_depth_2", _whole(0, 8)),
    "dst2": ("ds_timesteps_2", _TIMESTEP), "dsr": ("ds_ratio", _number(0.01, 1)),
    "glt": ("gl_timesteps", _TIMESTEP), "glr": ("gl_ratio", _number(0.01, 1)), "gle": ("gl_every_n_steps", _whole(1)),
    "gls": ("gl_ratio_step", _number(0.001, 1)), "glsn": ("gl_s_noise", _number(0)),
    "glus": ("gl_unsharp", _Kind(_unsharp, "size,sigma,strength")),
}  # fmt: skip


def read_line(line: str, where: str) -> PromptLine:
    """Read a line. Letters of options may be capitals. Raises OptionError with all that is wrong, in words.

    Args: where: what to call the line in messages.
    """
    prompt, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
    values: dict[str, Any] = {"prompt": prompt.strip()}
    mistakes = []
    for option in options:
        letters, _, text = (part.strip() for part in option.partition(" "))
        if letters.lower() not in LINE_OPTIONS:
            mistakes.append(
                f"{where}: --{letters} is no option of a prompt{did_you_mean(letters.lower(), LINE_OPTIONS)}"
            )
            continue
        name, kind = LINE_OPTIONS[letters.lower()]
        try:
            values[name] = kind.read(text)
        except _Told as error:
            mistakes.append(f"{where}: --{letters} {text}: {error}")
        except (ValueError, OverflowError):
            mistakes.append(f"{where}: --{letters}: expected {kind.wanted}, got {text!r}")
    if mistakes:
        raise OptionError(*mistakes)
    return PromptLine(**values)
