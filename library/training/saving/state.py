"""State: all that a run needs to go on to the bit, in a folder that is whole or not there.

    NAME-step00000100-state/
        weights.safetensors      the parts' tensors by name
        optimizer.safetensors    the optimizer's tensors
        ema.safetensors          the moving average, with --ema_decay
        state.json               everything else, and the other files' sha256; written last

Nothing in it executes when it is loaded. Random draws need no state: they are functions of the place (library/rng.py).
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
from library.training.saving.state_folder import DAMAGE, FILES, FORMAT, STATE_JSON, VERSION, read_state_metadata

_CHUNK = 1 << 24


@dataclass
class State:
    """What a folder holds.

    Attributes:
        facts: numbers and text: step, epoch, samples, options, learning-rate schedule …; anything that JSON takes.
        weights: by name, as they are trained.
        optimizer: a tree of dicts, lists, numbers and tensors.
        ema: by name; empty without.
    """

    facts: dict[str, Any]
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    ema: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        tensors: dict[str, Tensor] = {}
        _take_apart(self.optimizer, tensors, "")
        return sum(t.nbytes for some in (self.weights, tensors, self.ema) for t in some.values())


def write_state(folder: Path, state: State) -> None:
    """Write the folder; what was there before goes only when the new one is whole. Raises RunError."""
    temporary = temporary_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with this one's number
    try:
        temporary.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        facts = {
            **state.facts,
            "format": FORMAT,
            "version": VERSION,
            "written": time.time(),
            "optimizer": _take_apart(state.optimizer, tensors, ""),
        }
        facts["files"] = {}
        for name, content in (("weights", state.weights), ("optimizer", tensors), ("ema", state.ema)):
            if content or name != "ema":
                path = temporary / f"{name}.safetensors"
                write_safetensors(path, content, {"format": "pt"})
                facts["files"][path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
        with open(temporary / STATE_JSON, "w", encoding="utf-8") as file:
            file.write(json.dumps(facts))  # json.dump would encode in Python, which takes ten times as long
            file.flush()
            os.fsync(file.fileno())
        replace_folder(temporary, folder)
    except OSError as error:
        raise RunError(f"{folder}: the state can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_state(folder: Path) -> State:
    """The whole state, its files checked by their sha256. Raises RunError."""
    facts = read_state_metadata(folder)
    parts: dict[str, dict[str, Tensor]] = {"ema": {}}
    for name, entry in facts["files"].items():
        if _sha256(folder / name) != entry["sha256"]:
            raise RunError(f"{folder / name}: damaged: its sha256 isn't the one that {STATE_JSON} has")
        file = TensorFile(folder / name, mapped=False)
        parts[FILES[name]] = {key: file[key] for key in file.shapes}
    for name, tensor in (parts["weights"] | parts["ema"]).items():
        if not tensor.isfinite().all():
            raise RunError(f"{folder}: {name[:200]} holds numbers that aren't finite")
    try:
        optimizer = _put_together(facts["optimizer"], parts["optimizer"])
    except DAMAGE as error:
        raise RunError(f"{folder / STATE_JSON}: damaged: {type(error).__name__}: {error}") from None
    return State(facts, parts["weights"], optimizer, parts["ema"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------- optimizers as JSON + tensors


def _take_apart(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The value as JSON; tensors in it go to `tensors` under their path. Raises RunError for what neither can hold."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _take_apart(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_take_apart(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise RunError(
        f"the optimizer's {path} is a {type(value).__name__}, which a state can't hold; train without --save_state"
    )


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content}
    if kind == "dtype":
        dtype = getattr(torch, content)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{content!r} is no dtype")
        return dtype
    items = [_put_together(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
