"""Prompts: the file of prompts that samples during training are drawn from. No torch here.

Files and inline options: contract, formats.md section 9. What can't be read is told and left out: no run ends for a prompt.
"""

import dataclasses
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import OptionError
from library.generation.options import MOST_SEED
from library.generation.sampler_options import SAMPLERS

_SIDE = 32  # the U-Net halves latents twice, and latents are an eighth of the picture
_LEAST_SIDE = 64
_MOST_STEPS = 1000


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw. None: the run's own resolution, seed or sampler.

    Attributes:
        width, height: in pixels, multiples of 32.
        controlnet_image: the condition, of ControlNet-LLLite's training.
    """

    prompt: str = ""
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    sample_steps: int = 30
    scale: float = 7.5
    sample_sampler: str | None = None
    controlnet_image: Path | None = None


def _side(value: Any) -> int:
    return max(_LEAST_SIDE, int(value) // _SIDE * _SIDE)


def _seed(value: Any) -> int:
    if abs(seed := int(value)) > MOST_SEED:
        raise ValueError
    return seed


def _file(value: Any) -> Path:
    if not Path(str(value)).is_file():
        raise ValueError
    return Path(str(value))


def _sampler(value: Any) -> str:
    if str(value) not in SAMPLERS:
        raise ValueError
    return str(value)


_READ: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "prompt": (str, "text"),
    "negative_prompt": (lambda value: str(value or ""), "text"),
    "width": (_side, "a whole number"),
    "height": (_side, "a whole number"),
    "seed": (_seed, f"a whole number up to {MOST_SEED:,}"),
    "sample_steps": (lambda value: min(max(int(value), 1), _MOST_STEPS), "a whole number"),
    "scale": (float, "a number"),
    "controlnet_image": (_file, "a file that is there"),
    "sample_sampler": (_sampler, f"one of {', '.join(SAMPLERS)}"),
}
_INLINE = {
    "w": "width", "h": "height", "d": "seed", "s": "sample_steps", "l": "scale", "n": "negative_prompt", "ss": "sample_sampler",
    "g": "guidance_scale", "cn": "controlnet_image", "ctr": "cfg_trunc_ratio", "rcfg": "renorm_cfg", "fs": "flow_shift",
}  # fmt: skip
_UNUSED = {"guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "enum"}


def read_sample_prompts(path: Path) -> tuple[list[SamplePrompt], list[str]]:
    """The prompts of a .txt, .toml or .json file, and what is wrong with those that are left out or changed.

    Raises OptionError if the file can't be read at all.
    """
    problems: list[str] = []
    prompts = []
    for where, entry in _entries(path, problems):
        values = {}
        for key, value in entry.items():
            if key in _READ:
                read, wanted = _READ[key]
                try:
                    values[key] = read(value)
                except (TypeError, ValueError, OverflowError):
                    problems.append(f"{where}: {key}: expected {wanted}, got {value!r}; left out")
            elif key in _UNUSED:
                problems.append(f"{where}: {key} changes nothing for SDXL")
            else:
                problems.append(f"{where}: {key!r} is nothing that a sample can be told; left out")
        prompts.append(SamplePrompt(**values))
    return prompts, problems


def _entries(path: Path, problems: list[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(where, keys and values) of each prompt of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return _tables(path, json.loads(text), {}, problems)
        if path.suffix.lower() == ".toml":
            return _toml_tables(path, tomllib.loads(text), problems)
    except UnicodeDecodeError:
        raise OptionError(f"--sample_prompts {path}: it is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise OptionError(f"--sample_prompts {path}: can't be read: {error}") from None
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [(f"{path}, line {n}", _inline(line)) for n, line in lines if line and not line.startswith("#")]


def _toml_tables(path: Path, content: Any, problems: list[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """[prompt] with defaults, [[prompt.subset]] for each picture."""
    table = content.get("prompt")
    if not isinstance(table, dict):
        raise ValueError("expected a table [prompt] with [[prompt.subset]] for each picture")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    return _tables(path, table.get("subset", [{}]), defaults, problems)


def _tables(
    path: Path, content: Any, defaults: Mapping[str, Any], problems: list[str]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not isinstance(content, list):
        raise ValueError("expected a list of prompts")
    found: list[tuple[str, Mapping[str, Any]]] = []
    for n, entry in enumerate(content, 1):
        where = f"{path}, prompt {n}"
        if isinstance(entry, dict):
            found.append((where, {**defaults, **entry}))
        elif isinstance(entry, str):
            found.append((where, {**defaults, **_inline(entry)}))
        else:
            problems.append(f"{where}: expected text or a table, got {entry!r}; left out")
    return found


def _inline(line: str) -> dict[str, Any]:
    """`a cat --w 512 --n dark` as keys and values. What stands before the first option is the prompt, whatever it looks like."""
    prompt, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line)
    found: dict[str, Any] = {"prompt": prompt}
    for option in options:
        name, _, value = option.partition(" ")
        found[_INLINE.get(name.lower(), f"--{name}")] = value.strip()
    return found


def at_size(prompt: SamplePrompt, width: int, height: int) -> SamplePrompt:
    """The prompt with a size, where it has none."""
    return dataclasses.replace(prompt, width=prompt.width or _side(width), height=prompt.height or _side(height))
