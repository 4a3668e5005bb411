"""State folders: which ones there are, and what their state.json says. Torch-free, so that a wrong one is reported early."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from library.errors import OptionError, RunError
from library.files import remove_left_over
from library.log import log

FORMAT, VERSION = "sdxl-training-state", 1
STATE_JSON = "state.json"
FILES = {f"{name}.safetensors": name for name in ("weights", "optimizer", "ema")}
_FOREIGN = ("optimizer.bin", "train_state.json", "random_states_0.pkl", "scheduler.bin")
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError)
"""The errors of Python and torch for a state that someone has changed."""


def read_state_metadata(folder: Path) -> dict[str, Any]:
    """What state.json says, checked against the files' sizes. Raises RunError naming what is wrong with the folder."""
    path = folder / STATE_JSON
    if not folder.is_dir():
        raise RunError(f"{folder}: no such state folder")
    if not path.is_file():
        if any((folder / name).exists() for name in _FOREIGN):
            raise RunError(
                f"{folder}: this is a state of sd-scripts or of accelerate, which can't be resumed here; "
                "go on from its saved model with --network_weights"
            )
        raise RunError(f"{folder}: incomplete state: it has no {STATE_JSON}, which is written last")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT or facts["version"] > VERSION:
            raise RunError(
                f"{folder}: this state is of another program or a newer version ({facts['format']} {facts['version']})"
            )
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in facts["files"].items()}
        if not set(FILES) >= files.keys() >= set(FILES) - {"ema.safetensors"}:
            raise ValueError(f"its files are {', '.join(files)[:200]}")
        _, _ = int(facts["step"]), float(facts["written"])
    except DAMAGE as error:
        raise RunError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    for name, (size, _) in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise RunError(f"{folder}: incomplete state: {name} is missing or not {size:,} bytes long")
    assert isinstance(facts, dict)
    return facts


def whole_states(output: Path, name: str) -> Iterator[tuple[float, Path]]:
    """(when it was written, folder) of every whole state of that output name; torn ones are named and left out."""
    with contextlib.suppress(OSError):
        remove_left_over(output)  # what was about to be replaced gets its name back
    for folder in sorted(output.glob("*-state")):
        if not re.fullmatch(rf"{re.escape(name)}(-step\d{{8,}}|-\d{{6,}})?-state", folder.name) or not folder.is_dir():
            continue
        try:
            yield float(read_state_metadata(folder)["written"]), folder
        except RunError as error:
            log.warning("%s", error)


def newest_state(output: Path, names: Sequence[str]) -> Path | None:
    """The whole state of any of these names that was written last: another run's may have more steps."""
    found = [entry for name in names for entry in whole_states(output, name)]
    return max(found)[1] if found else None


def find_state(resume: str, output: Path, names: Sequence[str]) -> Path:
    """The folder that --resume means: one, or "latest". Raises OptionError if it can't be resumed."""
    if resume == "latest":
        found = newest_state(output, names)
        if found is None:
            raise OptionError(f"--resume latest: there is no whole state of {names[0]} in {output}")
        return found
    folder = Path(resume).expanduser()
    try:
        read_state_metadata(folder)
    except RunError as error:
        previous = newest_state(output, names)
        if previous == folder:  # it has its name back
            return folder
        hint = f"; the newest whole one is {previous}" if previous else ""
        raise OptionError(f"--resume {error}{hint}") from None
    return folder
