"""Training states: everything that a run needs to resume bit for bit, in a folder that is complete or absent.

    NAME-step00000100-state/
        weights.safetensors      the trained tensors by name
        optimizer.safetensors    the optimizer's tensors
        ema.safetensors          the moving average, with --ema_decay
        state.json               everything else, and the sha256 of the other files; written last

Loading a state executes nothing that it contains. No random state is stored: random numbers are functions of the
position in the run (library/rng.py).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import OptionError, RunError
from library.files import remove_left_over, replace_folder, temporary_name
from library.log import log
from library.safetensors_io import TensorFile, write_safetensors

FORMAT, VERSION = "sdxl-training-state", 1
_JSON = "state.json"
_FILES = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors")
_FOREIGN_FILES = ("optimizer.bin", "train_state.json", "random_states_0.pkl", "scheduler.bin")
_DAMAGE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError)


@dataclass(frozen=True)
class StateMetadata:
    """What state.json records of a run, apart from the structure of the optimizer's state.

    Attributes:
        step: optimizer steps done.
        epoch: epochs finished.
        samples: images seen, repeats counted, over all processes.
        splits: number of slices in which each micro-batch is computed, after the GPU ran out of memory.
        finished: the run has made its final save.
        total_steps: optimizer steps of the complete run.
        session_id: written into the run's saved files.
        signature: what must not change when the run is resumed (resume.run_signature); "run" in the file.
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
        """Read the keys of state.json. Raises ValueError if one is missing or has the wrong type."""
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
        """Return the keys and values of state.json. They are a file format, and keep their names."""
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


@dataclass
class State:
    """The content of a state folder.

    Attributes:
        weights: the trained tensors by name, in the dtype in which they are trained.
        optimizer: a tree of dicts, lists, numbers and tensors.
        ema: the moving average by name; empty without --ema_decay.
    """

    metadata: StateMetadata
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    ema: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        tensors: dict[str, Tensor] = {}
        _split_tensors(self.optimizer, tensors, "")
        return sum(t.nbytes for group in (self.weights, tensors, self.ema) for t in group.values())


def write_state(folder: Path, state: State) -> None:
    """Write a state. A folder that exists is removed only once the new one is complete. Raises RunError."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process that had the same PID
    try:
        temporary.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        content = {
            **state.metadata.to_json(),
            "format": FORMAT,
            "version": VERSION,
            "written": time.time(),
            "optimizer": _split_tensors(state.optimizer, tensors, ""),
            "files": {},
        }
        for name, group in zip(_FILES, (state.weights, tensors, state.ema), strict=True):
            if group or name != "ema.safetensors":
                path = temporary / name
                write_safetensors(path, group, {"format": "pt"})
                content["files"][name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        with open(temporary / _JSON, "w", encoding="utf-8") as file:
            file.write(json.dumps(content))  # json.dump would encode in Python, which takes ten times as long
            file.flush()
            os.fsync(file.fileno())
        replace_folder(temporary, folder)
    except OSError as error:
        raise RunError(f"{folder}: the state can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_metadata(folder: Path) -> StateMetadata:
    """Read what a state records of its run. Raises RunError that says what is wrong with the folder."""
    content = _read_json(folder)
    with damaged_state_errors(folder):
        return StateMetadata.from_json(content)


def _read_json(folder: Path) -> dict[str, Any]:
    """Read state.json and compare it with the sizes of the other files. Raises RunError."""
    path = folder / _JSON
    if not folder.is_dir():
        raise RunError(f"{folder}: no such state folder")
    if not path.is_file():
        if any((folder / name).exists() for name in _FOREIGN_FILES):
            raise RunError(
                f"{folder}: this is a state of sd-scripts or accelerate, which can't be resumed here; "
                "continue from its saved model with --network_weights"
            )
        raise RunError(f"{folder}: incomplete state: it has no {_JSON}, which is written last")
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
        if not set(_FILES) >= sizes.keys() >= set(_FILES) - {"ema.safetensors"}:
            raise ValueError(f"its files are {', '.join(sizes)[:200]}")
        int(content["step"])
        float(content["written"])
    except _DAMAGE_ERRORS as error:
        raise RunError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise RunError(f"{folder}: incomplete state: {name} is missing or its size is not {size:,} bytes")
    assert isinstance(content, dict)
    return content


def read_state(folder: Path) -> State:
    """Read a complete state, and check the sha256 of its files. Raises RunError."""
    content = _read_json(folder)
    groups: dict[str, dict[str, Tensor]] = {"ema.safetensors": {}}
    for name, entry in content["files"].items():
        if _sha256(folder / name) != entry["sha256"]:
            raise RunError(f"{folder / name}: damaged: its sha256 differs from the one in {_JSON}")
        file = TensorFile(folder / name, mapped=False)
        groups[name] = {key: file[key] for key in file.shapes}
    weights, tensors, ema = (groups[name] for name in _FILES)
    for name, tensor in (weights | ema).items():
        if not tensor.isfinite().all():
            raise RunError(f"{folder}: {name[:200]} contains NaN or Inf")
    with damaged_state_errors(folder):
        return State(StateMetadata.from_json(content), weights, _join_tensors(content["optimizer"], tensors), ema)


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
    """Yield (time of writing, folder) of every complete state of this output name. Incomplete ones are logged."""
    with contextlib.suppress(OSError):
        remove_left_over(output)  # a folder whose replacement was interrupted gets its name back
    for folder in sorted(output.glob("*-state")):
        if not re.fullmatch(rf"{re.escape(name)}(-step\d{{8,}}|-\d{{6,}})?-state", folder.name) or not folder.is_dir():
            continue
        try:
            yield float(_read_json(folder)["written"]), folder
        except RunError as error:
            log.warning("%s", error)


def newest_state(output: Path, names: Sequence[str]) -> Path | None:
    """Return the complete state of any of these names that was written last. Another run's state may have more steps."""
    states = [entry for name in names for entry in complete_states(output, name)]
    if not states:
        return None
    _, folder = max(states)
    return folder


def find_state(resume: str, output: Path, names: Sequence[str]) -> Path:
    """Return the folder that --resume names, or the newest one for "latest". Raises OptionError if it can't be resumed."""
    if resume == "latest":
        newest = newest_state(output, names)
        if newest is None:
            raise OptionError(f"--resume latest: {output} has no complete state of {names[0]}")
        return newest
    folder = Path(resume).expanduser()
    try:
        _read_json(folder)
    except RunError as error:
        newest = newest_state(output, names)
        if newest == folder:  # newest_state has given the folder its name back
            return folder
        hint = f"; the newest complete state is {newest}" if newest else ""
        raise OptionError(f"--resume {error}{hint}") from None
    return folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------- optimizers as JSON + tensors


def _split_tensors(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Return the value as JSON, and put its tensors into `tensors` under their paths.

    Raises RunError for a value of a type that neither can hold.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _split_tensors(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split_tensors(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise RunError(
        f"the optimizer's {path} is a {type(value).__name__}, which a state can't hold; train without --save_state"
    )


def _join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _join_tensors(item, tensors) for key, item in content}
    if kind == "dtype":
        dtype = getattr(torch, content)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{content!r} is not a dtype")
        return dtype
    items = [_join_tensors(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
