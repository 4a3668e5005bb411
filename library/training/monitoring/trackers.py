"""Trackers: where the scalars and sample pictures of a run are sent: TensorBoard, Weights & Biases, or both.

A tracker that fails while the run goes on is told once and left out from then on: a full disk under the logs, or a
server that is gone, is no reason to lose the training. Neither package is imported unless it is named.
"""

import inspect
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.errors import OptionError
from library.log import log
from library.options import Options
from library.training.options.output import TrackerOptions

if TYPE_CHECKING:
    import numpy as np

_KNOWN = ("tensorboard", "wandb")
_SECONDS_TO_FINISH = 120.0  # that wandb may take at the end to send what it still has


class Tracker(Protocol):
    """One place that values are sent to. Whatever it raises is caught by Trackers."""

    def log(self, values: Mapping[str, float], step: int, epoch: int | None) -> None: ...

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run that still work."""

    def __init__(self, by_name: Mapping[str, Tracker], secrets: Sequence[str] = ()):
        """Args: secrets: texts that no message may show."""
        self._working = dict(by_name)
        self._secrets = secrets

    def log(self, values: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Send scalars. Args: step: the optimizer step; epoch: counted from 1, where they are of a whole epoch."""
        self._each(lambda tracker: tracker.log(values, step, epoch))

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None:
        """Send sample pictures: each its caption, and its pixels as uint8 RGB [H, W, 3]."""
        self._each(lambda tracker: tracker.images(images, step))

    def close(self) -> None:
        """Send what is still waiting; returns within a bounded time. Nothing can be sent afterwards."""
        self._each(lambda tracker: tracker.close())
        self._working = {}

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._working.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._working[name]
                text = _in_a_line(error, self._secrets)
                log.warning("%s failed; the run goes on without it: %s", name, text)


def open_trackers(options: TrackerOptions, default_name: str, config: Mapping[str, object]) -> Trackers:
    """The trackers asked for. To be called on the main process only.

    Args:
        default_name: folder within the run's folder and project at wandb, where --log_tracker_name is unset.
        config: the options to send along; empty for none.

    Raises OptionError for a missing package, a folder that can't be made, and mistakes in --log_tracker_config. wandb without a
    network or key is no error: it is told, and left out.
    """
    flag = "--logging_dir" if options.log_with is None else f"--log_with {options.log_with}"
    name = options.log_tracker_name or default_name
    tables = {} if options.log_tracker_config is None else read_tracker_config(options.log_tracker_config)
    secrets: list[str] = []
    wandb = _import_wandb(flag) if "wandb" in options.names else None
    if wandb is not None:
        arguments = _wandb_arguments(options, name, config, tables)
        secrets = [key for key in (arguments["settings"].get("api_key"), os.environ.get("WANDB_API_KEY")) if key]
        try:  # a misspelt argument is the user's mistake, and not one of the failures that are told and passed over
            inspect.signature(wandb.init).bind(**arguments)
        except TypeError as error:
            raise OptionError(f"--log_tracker_config {options.log_tracker_config}: [wandb]: {error}") from None

    trackers: dict[str, Tracker] = {}
    if "tensorboard" in options.names:
        trackers["tensorboard"] = _TensorBoard(options, flag, name, config, tables.get("tensorboard", {}))
    if wandb is not None:
        try:
            trackers["wandb"] = _Wandb(wandb, arguments, secrets)
        except Exception as error:
            log.warning("wandb can't be started and gets nothing of this run: %s", _in_a_line(error, secrets))
    return Trackers(trackers, secrets)


def read_tracker_config(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of --log_tracker_config: arguments of wandb.init and SummaryWriter, by tracker. Raises OptionError."""
    where = f"--log_tracker_config {path}"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise OptionError(f"{where}: it is not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{where}: can't be read as TOML: {error}") from None
    except OSError as error:
        raise OptionError(f"{where}: can't be read: {error.strerror}") from None
    for name, table in tables.items():
        if name not in _KNOWN:
            raise OptionError(f"{where}: {name!r} is no tracker; expected the tables [tensorboard] and [wandb]")
        if not isinstance(table, dict):
            raise OptionError(
                f"{where}: {name} is a single value; expected a table, [{name}], with a line for each argument"
            )
    return tables


def logged_config(options: Options) -> dict[str, object]:
    """What --log_config sends: every option that is set, without keys and paths; lists as text."""
    sent: dict[str, object] = {}
    for spec, value in options.specs():
        if value is None or spec.is_private:
            continue
        if isinstance(value, tuple):
            value = ", ".join(map(str, value))
        sent[spec.name] = value if isinstance(value, bool | int | float | str) else str(value)
    return sent


# ---------------------------------------------------------------------------------------------------------- TensorBoard


class _TensorBoard:
    """An event file in a folder of the run's own: LOGGING_DIR/PREFIXYYYYmmddHHMMSS/NAME."""

    def __init__(
        self,
        options: TrackerOptions,
        flag: str,
        name: str,
        config: Mapping[str, object],
        arguments: Mapping[str, Any],
    ):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError(
                f"{flag}: TensorBoard can't be imported ({_in_a_line(error)}); pip install tensorboard"
            ) from None
        assert options.logging_dir is not None, "the options' own check"
        folder = _new_run_folder(options.logging_dir, options.log_prefix or "") / name
        try:
            self._writer = SummaryWriter(str(folder), **arguments)
        except OSError as error:
            raise OptionError(f"--logging_dir {folder}: can't be written in: {error.strerror}") from None
        except (TypeError, ValueError) as error:
            if not arguments:
                raise
            raise OptionError(f"--log_tracker_config {options.log_tracker_config}: [tensorboard]: {error}") from None
        log.info("TensorBoard: %s (tensorboard --logdir %s)", folder, options.logging_dir)
        if config:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```")

    def log(self, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step if epoch is None else epoch)

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None:
        for index, (_, pixels) in enumerate(images):
            self._writer.add_image(f"sample/{index}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def _new_run_folder(parent: Path, prefix: str) -> Path:
    """A folder that no other run has: two may start in one second, and clocks go back. Raises OptionError."""
    first = parent / f"{prefix}{time.strftime('%Y%m%d%H%M%S')}"
    _make_folder(first.parent)
    folder, number = first, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise OptionError(f"--logging_dir {parent}: can't be written in: {error.strerror}") from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--logging_dir {folder}: can't be made: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------- Weights & Biases

# That nothing is printed between our lines, and that the end of the program is not held up by a server that is gone.
_WANDB_SETTINGS = {
    "silent": True,
    "console": "off",
    "finish_timeout": _SECONDS_TO_FINISH,
    "finish_timeout_raises": True,
    "x_disable_meta": True,  # it would send the words of the command line, keys and paths among them
}


class _Wandb:
    """A run at Weights & Biases, or, with WANDB_MODE=offline, its files."""

    def __init__(self, wandb: Any, arguments: Mapping[str, Any], secrets: Sequence[str]):
        # Silent from the first call on; with that, a missing key is an error and not a question that nobody answers.
        wandb.setup(wandb.Settings(silent=True))
        self._wandb = wandb
        self._run = wandb.init(**arguments)
        self._last_step = 0
        if self._run.disabled:
            log.info("wandb: nothing is kept, as WANDB_MODE says")
        else:
            log.info("wandb: %s", _without(secrets, self._run.url or f"{self._folder} (wandb sync sends it)"))

    @property
    def _folder(self) -> Path:
        return Path(self._run.dir).parent  # the run's own is the folder of its extra files

    def log(self, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        self._send(values, step)

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None:
        wandb_images = [self._wandb.Image(pixels, caption=caption) for caption, pixels in images]
        if len({pixels.shape for _, pixels in images}) > 1:  # in a list, wandb shows all in the size of the first
            self._send({f"sample/{index}": image for index, image in enumerate(wandb_images)}, step)
        elif wandb_images:
            self._send({"sample": wandb_images}, step)

    def close(self) -> None:
        try:
            self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)  # 1 shows a run that broke off as failed
        except TimeoutError:
            raise TimeoutError(
                f"not everything was sent in time; the rest is kept, and sent by wandb sync {self._folder}"
            ) from None

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        # wandb drops what comes with a step before the last one, so a late value is sent as of the last step.
        self._last_step = max(self._last_step, step)
        self._run.log(dict(values), step=self._last_step)


def _import_wandb(flag: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise OptionError(f"{flag}: wandb can't be imported ({_in_a_line(error)}); pip install wandb") from None
    return wandb


def _wandb_arguments(
    options: TrackerOptions, name: str, config: Mapping[str, object], tables: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The arguments of wandb.init: ours, under those of the [wandb] table; tables within it are added to ours."""
    arguments: dict[str, Any] = {"project": name, "config": dict(config), "settings": dict(_WANDB_SETTINGS)}
    if options.wandb_api_key is not None:
        # Differs from sd-scripts: wandb.login would also write the key to ~/.netrc, which on a rented machine stays behind.
        arguments["settings"]["api_key"] = options.wandb_api_key
    if options.logging_dir is not None:
        _make_folder(options.logging_dir)  # some versions take a temporary folder in place of one that doesn't exist
        arguments["dir"] = str(options.logging_dir)
    if "wandb" not in tables and options.wandb_run_name is not None:
        arguments["name"] = options.wandb_run_name
    for key, value in tables.get("wandb", {}).items():
        merges = isinstance(value, dict) and isinstance(arguments.get(key), dict)
        arguments[key] = {**arguments[key], **value} if merges else value
    if not isinstance(arguments["settings"], dict):
        raise OptionError(
            f"--log_tracker_config {options.log_tracker_config}: settings must be a table, [wandb.settings]"
        )
    return arguments


# -------------------------------------------------------------------------------------------------------------- messages


def _in_a_line(error: Exception, secrets: Sequence[str] = ()) -> str:
    """The error's type and the first line of its text, with no secret in it."""
    first = str(error).strip().partition("\n")[0]
    return _without(secrets, f"{type(error).__name__}: {first}" if first else type(error).__name__)


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
