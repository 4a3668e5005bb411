"""Training states: everything that a run needs to resume bit for bit, in one folder.

    NAME-step00000100-state/
        weights.safetensors      the trained tensors by name
        optimizer.safetensors    the optimizer's tensors
        ema.safetensors          the moving average, with --ema_decay
        state.json               everything else, and the sha256 of the other files; written last

Loading a state executes nothing that it contains. No random state is stored: random numbers are
functions of the position in the run (library/rng.py).
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import RunError
from library.files import replace_folder, temporary_name
from library.safetensors_io import TensorFile, write_safetensors
from library.training.saving.state_folder import (
    FORMAT,
    STATE_FILES,
    STATE_JSON,
    VERSION,
    StateMetadata,
    damaged_state_errors,
    read_state_json,
)


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
    """Write a state.

    A folder that exists is removed only once the new one is complete. Raises RunError.
    """
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
        for name, group in zip(STATE_FILES, (state.weights, tensors, state.ema), strict=True):
            if group or name != "ema.safetensors":
                path = temporary / name
                write_safetensors(path, group, {"format": "pt"})
                content["files"][name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        with open(temporary / STATE_JSON, "w", encoding="utf-8") as file:
            # json.dump would encode in Python, which takes ten times as long.
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
        replace_folder(temporary, folder)
    except OSError as error:
        raise RunError(
            f"{folder}: the state can't be written: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_state(folder: Path) -> State:
    """Read a complete state, and check the sha256 of its files. Raises RunError."""
    content = read_state_json(folder)
    groups: dict[str, dict[str, Tensor]] = {"ema.safetensors": {}}
    for name, entry in content["files"].items():
        if _sha256(folder / name) != entry["sha256"]:
            raise RunError(
                f"{folder / name}: damaged: its sha256 differs from the one in {STATE_JSON}"
            )
        file = TensorFile(folder / name, mapped=False)
        groups[name] = {key: file[key] for key in file.shapes}
    weights, tensors, ema = (groups[name] for name in STATE_FILES)
    for name, tensor in (weights | ema).items():
        if not tensor.isfinite().all():
            raise RunError(f"{folder}: {name[:200]} contains NaN or Inf")
    with damaged_state_errors(folder):
        return State(
            StateMetadata.from_json(content),
            weights,
            _join_tensors(content["optimizer"], tensors),
            ema,
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Optimizers as JSON and tensors


def _split_tensors(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Return the value as JSON, and put its tensors into `tensors` under their paths.

    Raises RunError for a value of a type that neither can hold.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [key, _split_tensors(item, tensors, f"{path}/{key}")] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_split_tensors(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise RunError(
        f"the optimizer's {path} is a {type(value).__name__}, which a state can't hold; train "
        "without --save_state"
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
