"""Sample prompts: the file of prompts for the sample images of a training. No torch here.

Files and inline options: contract, formats.md section 9. Invalid values are reported and ignored:
a run never ends because of a prompt.
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
from library.generation.options import MAX_SEED, SIDE
from library.generation.samplers import SAMPLERS

_MIN_SIDE = 64
_MAX_STEPS = 1000


@dataclass(frozen=True)
class SamplePrompt:
    """One sample image; None: the run's own resolution, seed or sampler.

    Attributes:
        width: in pixels, a multiple of 32.
        height: in pixels, a multiple of 32.
        controlnet_image: the condition, for training of a ControlNet-LLLite.
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


def _read_negative_prompt(value: Any) -> str:
    return str(value or "")


def _read_side(value: Any) -> int:
    return max(_MIN_SIDE, int(value) // SIDE * SIDE)


def _read_seed(value: Any) -> int:
    seed = int(value)
    if abs(seed) > MAX_SEED:
        raise ValueError
    return seed


def _read_steps(value: Any) -> int:
    return min(max(int(value), 1), _MAX_STEPS)


def _read_file(value: Any) -> Path:
    path = Path(str(value))
    if not path.is_file():
        raise ValueError
    return path


def _read_sampler(value: Any) -> str:
    if str(value) not in SAMPLERS:
        raise ValueError
    return str(value)


# Key -> how its value is read, and what is expected.
_READERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "prompt": (str, "text"),
    "negative_prompt": (_read_negative_prompt, "text"),
    "width": (_read_side, "a whole number"),
    "height": (_read_side, "a whole number"),
    "seed": (_read_seed, f"a whole number up to {MAX_SEED:,}"),
    "sample_steps": (_read_steps, "a whole number"),
    "scale": (float, "a number"),
    "controlnet_image": (_read_file, "an existing file"),
    "sample_sampler": (_read_sampler, f"one of {', '.join(SAMPLERS)}"),
}

# Letters within a prompt -> key.
INLINE_OPTIONS = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "n": "negative_prompt",
    "ss": "sample_sampler",
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
_NO_EFFECT = {"guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "enum"}


def read_sample_prompts(path: Path) -> tuple[list[SamplePrompt], list[str]]:
    """Read the prompts of a .txt, .toml or .json file.

    Returns:
        The prompts, and what is wrong with those that are ignored in part or completely.

    Raises:
        OptionError: if the file can't be read at all.
    """
    problems: list[str] = []
    prompts = []
    for where, entry in _entries(path, problems):
        values = {}
        for key, value in entry.items():
            if key in _READERS:
                read, expected = _READERS[key]
                try:
                    values[key] = read(value)
                except (TypeError, ValueError, OverflowError):
                    problems.append(f"{where}: {key}: expected {expected}, got {value!r}; ignored")
            elif key in _NO_EFFECT:
                problems.append(f"{where}: {key} has no effect for SDXL")
            else:
                problems.append(f"{where}: {key!r} is not an option of a sample prompt; ignored")
        prompts.append(SamplePrompt(**values))
    return prompts, problems


def _entries(path: Path, problems: list[str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Return (where, keys and values) of each prompt of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            return _tables(path, json.loads(text), {}, problems)
        if path.suffix.lower() == ".toml":
            return _toml_tables(path, tomllib.loads(text), problems)
    except UnicodeDecodeError:
        raise OptionError(
            f"--sample_prompts {path}: the file is not UTF-8; save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise OptionError(f"--sample_prompts {path}: can't be read: {error}") from None
    entries = []
    for i, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            entries.append((f"{path}, line {i}", _read_inline(line)))
    return entries


def _toml_tables(
    path: Path, content: Any, problems: list[str]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Read [prompt] with defaults, and [[prompt.subset]] for each image."""
    table = content.get("prompt")
    if not isinstance(table, dict):
        raise ValueError("expected a table [prompt] with [[prompt.subset]] for each image")
    defaults = {key: value for key, value in table.items() if key != "subset"}
    return _tables(path, table.get("subset", [{}]), defaults, problems)


def _tables(
    path: Path, content: Any, defaults: Mapping[str, Any], problems: list[str]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not isinstance(content, list):
        raise ValueError("expected a list of prompts")
    entries: list[tuple[str, Mapping[str, Any]]] = []
    for i, entry in enumerate(content, 1):
        where = f"{path}, prompt {i}"
        if isinstance(entry, dict):
            entries.append((where, {**defaults, **entry}))
        elif isinstance(entry, str):
            entries.append((where, {**defaults, **_read_inline(entry)}))
        else:
            problems.append(f"{where}: expected text or a table, got {entry!r}; ignored")
    return entries


def _read_inline(line: str) -> dict[str, Any]:
    """Read `a cat --w 512 --n dark`. Everything before the first option is the prompt."""
    prompt, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line)
    values: dict[str, Any] = {"prompt": prompt}
    for option in options:
        letters, _, value = option.partition(" ")
        values[INLINE_OPTIONS.get(letters.lower(), f"--{letters}")] = value.strip()
    return values


def at_size(prompt: SamplePrompt, width: int, height: int) -> SamplePrompt:
    """Return the prompt with this size in pixels if it has none."""
    return dataclasses.replace(
        prompt,
        width=prompt.width or _read_side(width),
        height=prompt.height or _read_side(height),
    )
