"""State folders: which ones exist, and what their state.json says.

Torch-free, so that a wrong one is reported early.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import OptionError, RunError
from library.files import remove_left_over
from library.log import log

FORMAT, VERSION = "sdxl-training-state", 1
STATE_JSON = "state.json"
STATE_FILES = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors")
_FOREIGN_FILES = ("optimizer.bin", "train_state.json", "random_states_0.pkl", "scheduler.bin")
_DAMAGE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    OSError,
)


@dataclass(frozen=True)
class StateMetadata:
    """What state.json records of a run, apart from the structure of the optimizer's state.

    Attributes:
        step: optimizer steps done.
        epoch: epochs finished.
        samples: images seen, repeats counted, over all processes.
        splits: number of slices in which each micro-batch is computed, after the GPU ran out of
            memory.
        finished: the run has made its final save.
        total_steps: optimizer steps of the complete run.
        session_id: written into the run's saved files.
        signature: what must not change when the run is resumed (resume.run_signature); "run" in the
            file.
        metrics: what MetricsLogger keeps; "report" in the file.
        best: what Best keeps.
        saved: paths of the run's saved files that still exist, by stem.
    """

    step: int
    epoch: int
    samples: int
    splits: int
    finished: bool
    total_steps: int
    session_id: str
    signature: Mapping[str, str]
    metrics: Mapping[str, Any]
    best: Mapping[str, Any]
    saved: Mapping[str, list[str]]

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.signature["seed"])

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StateMetadata":
        """Read the keys of state.json.

        Raises ValueError if one is missing or has the wrong type.
        """
        signature: dict[str, str] = _checked(values, "run", dict)
        has_seed = str(signature.get("seed", "")).isdigit()
        if not has_seed or not all(isinstance(value, str) for value in signature.values()):
            raise ValueError("run must hold text only, with the digits of a seed")
        return cls(
            step=_checked_count(values, "step", at_least=0),
            epoch=_checked_count(values, "epoch", at_least=0),
            samples=_checked_count(values, "samples", at_least=0),
            splits=_checked_count(values, "splits", at_least=1),
            finished=_checked(values, "finished", bool),
            total_steps=_checked_count(values, "total_steps", at_least=1),
            session_id=_checked(values, "session_id", str),
            signature=signature,
            metrics=_checked(values, "report", dict),
            best=_checked(values, "best", dict),
            saved=_checked(values, "saved", dict),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the keys and values of state.json.

        They are a file format, and keep their names.
        """
        return {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "splits": self.splits,
            "finished": self.finished,
            "total_steps": self.total_steps,
            "session_id": self.session_id,
            "run": dict(self.signature),
            "report": dict(self.metrics),
            "best": dict(self.best),
            "saved": dict(self.saved),
        }


def _checked(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name} is {str(value)[:50]}")
    return value


def _checked_count(values: Mapping[str, Any], name: str, *, at_least: int) -> int:
    count: int = _checked(values, name, int)
    if count < at_least:
        raise ValueError(f"{name} is {count}")
    return count


def read_metadata(folder: Path) -> StateMetadata:
    """Read what a state records of its run.

    Raises RunError that says what is wrong with the folder.
    """
    content = read_state_json(folder)
    with damaged_state_errors(folder):
        return StateMetadata.from_json(content)


def read_state_json(folder: Path) -> dict[str, Any]:
    """Read state.json and compare it with the sizes of the other files. Raises RunError."""
    path = folder / STATE_JSON
    if not folder.is_dir():
        raise RunError(f"{folder}: no such state folder")
    if not path.is_file():
        if any((folder / name).exists() for name in _FOREIGN_FILES):
            raise RunError(
                f"{folder}: this is a state of sd-scripts or accelerate, which can't be resumed; "
                "continue from its saved model with --network_weights"
            )
        raise RunError(f"{folder}: incomplete state: it has no {STATE_JSON}, which is written last")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] > VERSION:
            raise RunError(
                f"{folder}: this state was written by another program or a newer version "
                f"({content['format']} {content['version']})"
            )
        sizes = {}
        for name, entry in content["files"].items():
            sizes[str(name)], _ = int(entry["bytes"]), str(entry["sha256"])
        if not set(STATE_FILES) >= sizes.keys() >= set(STATE_FILES) - {"ema.safetensors"}:
            raise ValueError(f"its files are {', '.join(sizes)[:200]}")
        int(content["step"])
        float(content["written"])
    except _DAMAGE_ERRORS as error:
        raise RunError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise RunError(
                f"{folder}: incomplete state: {name} is missing or its size is not {size:,} bytes"
            )
    assert isinstance(content, dict)
    return content


@contextlib.contextmanager
def damaged_state_errors(folder: Path) -> Iterator[None]:
    """Turn what Python and PyTorch raise for a state that was tampered with into a RunError."""
    try:
        yield
    except (OptionError, RunError):
        raise
    except _DAMAGE_ERRORS as error:
        raise RunError(f"{folder}: damaged state: {type(error).__name__}: {error}") from None


def complete_states(output: Path, name: str) -> Iterator[tuple[float, Path]]:
    """Yield (time of writing, folder) of every complete state of this output name.

    Incomplete ones are logged.
    """
    with contextlib.suppress(OSError):
        remove_left_over(output)  # a folder whose replacement was interrupted gets its name back
    for folder in sorted(output.glob("*-state")):
        if (
            not re.fullmatch(rf"{re.escape(name)}(-step\d{{8,}}|-\d{{6,}})?-state", folder.name)
            or not folder.is_dir()
        ):
            continue
        try:
            yield float(read_state_json(folder)["written"]), folder
        except RunError as error:
            log.warning("%s", error)


def newest_state(output: Path, names: Sequence[str]) -> Path | None:
    """Return the complete state of any of these names that was written last.

    Another run's state may have more steps.
    """
    states = [entry for name in names for entry in complete_states(output, name)]
    if not states:
        return None
    _, folder = max(states)
    return folder


def find_state(resume: str, output: Path, names: Sequence[str]) -> Path:
    """Return the folder that --resume names, or the newest one for "latest".

    Raises OptionError if it can't be resumed.
    """
    if resume == "latest":
        newest = newest_state(output, names)
        if newest is None:
            raise OptionError(f"--resume latest: {output} has no complete state of {names[0]}")
        return newest
    folder = Path(resume).expanduser()
    try:
        read_state_json(folder)
    except RunError as error:
        newest = newest_state(output, names)
        if newest == folder:  # newest_state has given the folder its name back
            return folder
        hint = f"; the newest complete state is {newest}" if newest else ""
        raise OptionError(f"--resume {error}{hint}") from None
    return folder
