"""Trackers: TensorBoard and Weights & Biases, which get the scalars and sample images of a run.

A tracker that fails during the run is reported once and left out from then on: a full disk or a
server that is down must not end the training. A package is imported only if its tracker is chosen.
accelerate's trackers do not serve here: they flush a file at every step, have no exit status for a
run that failed, and store hyperparameters in another format.
"""

import inspect
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from library.errors import OptionError
from library.log import log
from library.option_types import Spec
from library.training.options.output import TrackerOptions

if TYPE_CHECKING:
    import numpy as np

_KNOWN = ("tensorboard", "wandb")

# Nothing of wandb is printed between our lines, and a server that is down does not keep the program
# from ending.
_WANDB_SETTINGS = {
    "silent": True,
    "console": "off",
    "finish_timeout": 120.0,  # seconds for what is not sent yet
    "finish_timeout_raises": True,
    "x_disable_meta": True,  # it would send the command line with its keys and paths
}


class Tracker(Protocol):
    """A place that values are sent to. Trackers catches whatever its methods raise."""

    def log(self, values: Mapping[str, float], step: int, epoch: int | None) -> None: ...

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run that still work.

    Args:
        secrets: texts that must not be in any message.
    """

    def __init__(self, by_name: Mapping[str, Tracker], secrets: Sequence[str] = ()):
        self._working = dict(by_name)
        self._secrets = secrets

    def log(self, values: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Send scalars.

        Args:
            step: the optimizer step.
            epoch: counted from 1, if the values are those of a complete epoch.
        """
        self._each(lambda tracker: tracker.log(values, step, epoch))

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None:
        """Send sample images, each with its caption. The pixels are uint8 RGB, [H, W, 3]."""
        self._each(lambda tracker: tracker.images(images, step))

    def close(self) -> None:
        """Send what is not sent yet.

        This returns within a limited time; later values are dropped.
        """
        self._each(lambda tracker: tracker.close())
        self._working = {}

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._working.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._working[name]
                text = _in_a_line(error, self._secrets)
                log.warning("%s failed; the run continues without it: %s", name, text)


def open_trackers(
    options: TrackerOptions, default_name: str, config: Mapping[str, object]
) -> Trackers:
    """Open the chosen trackers. Only the main process calls this.

    Args:
        default_name: the folder in the run's folder, and the project at wandb, without
            --log_tracker_name.
        config: the options to send; empty for none.

    Raises:
        OptionError: A package is missing, a folder can't be made, or --log_tracker_config has a
            mistake. wandb without a network or a key raises nothing: a warning says so, and wandb
            is left out.
    """
    flag = "--logging_dir" if options.log_with is None else f"--log_with {options.log_with}"
    name = options.log_tracker_name or default_name
    tables: dict[str, dict[str, Any]] = {}
    if options.log_tracker_config is not None:
        tables = read_tracker_config(options.log_tracker_config)
    secrets: list[str] = []
    wandb = None
    if "wandb" in options.names:
        wandb = _import_wandb(flag)
        arguments = _wandb_arguments(options, name, config, tables.get("wandb"))
        secrets = [
            key
            for key in (arguments["settings"].get("api_key"), os.environ.get("WANDB_API_KEY"))
            if key
        ]
        try:  # a misspelled argument is an error; wandb.init's own failures are only logged
            inspect.signature(wandb.init).bind(**arguments)
        except TypeError as error:
            raise OptionError(
                f"--log_tracker_config {options.log_tracker_config}: [wandb]: {error}"
            ) from None

    trackers: dict[str, Tracker] = {}
    if "tensorboard" in options.names:
        trackers["tensorboard"] = _TensorBoard(
            options, flag, name, config, tables.get("tensorboard", {})
        )
    if wandb is not None:
        try:
            trackers["wandb"] = _Wandb(wandb, arguments, secrets)
        except Exception as error:
            log.warning(
                "wandb can't be started; the run continues without it: %s",
                _in_a_line(error, secrets),
            )
    return Trackers(trackers, secrets)


def read_tracker_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read --log_tracker_config: the arguments of wandb.init and SummaryWriter, by tracker.

    Raises OptionError.
    """
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
            raise OptionError(
                f"{where}: {name!r} is not a tracker; expected the tables [tensorboard] and [wandb]"
            )
        if not isinstance(table, dict):
            raise OptionError(
                f"{where}: {name} is a single value; expected a table, [{name}], with one argument per "
                "line"
            )
    return tables


def logged_config(options: Iterable[tuple[Spec, object]]) -> dict[str, object]:
    """Return what --log_config sends: every option that is set, except keys and paths.

    Lists become text.
    """
    sent: dict[str, object] = {}
    for spec, value in options:
        if value is None or spec.is_private:
            continue
        if isinstance(value, tuple):
            value = ", ".join(map(str, value))
        sent[spec.name] = value if isinstance(value, bool | int | float | str) else str(value)
    return sent


class _TensorBoard:
    """An event file in a new folder for each run: LOGGING_DIR/PREFIXYYYYmmddHHMMSS/NAME."""

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
            reason = _in_a_line(error)
            raise OptionError(
                f"{flag}: TensorBoard can't be imported ({reason}); pip install tensorboard"
            ) from None
        assert options.logging_dir is not None, "the options check this"
        folder = _new_run_folder(options.logging_dir, options.log_prefix or "") / name
        try:
            self._writer = SummaryWriter(str(folder), **arguments)
        except OSError as error:
            raise OptionError(
                f"--logging_dir {folder}: can't be written to: {error.strerror}"
            ) from None
        except (TypeError, ValueError) as error:
            if not arguments:
                raise
            raise OptionError(
                f"--log_tracker_config {options.log_tracker_config}: [tensorboard]: {error}"
            ) from None
        log.info("TensorBoard: %s (tensorboard --logdir %s)", folder, options.logging_dir)
        if config:
            self._writer.add_text(
                "config", f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```"
            )

    def log(self, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step if epoch is None else epoch)

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None:
        for i, (_, pixels) in enumerate(images):
            self._writer.add_image(f"sample/{i}", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def _new_run_folder(parent: Path, prefix: str) -> Path:
    """Create a folder that no other run has, even one that started in the same second."""
    first = parent / f"{prefix}{time.strftime('%Y%m%d%H%M%S')}"
    _make_folder(first.parent)
    folder, i = first, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            i += 1
            folder = first.with_name(f"{first.name}-{i}")
        except OSError as error:
            raise OptionError(
                f"--logging_dir {parent}: can't be written to: {error.strerror}"
            ) from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--logging_dir {folder}: can't be made: {error.strerror}") from None


class _Wandb:
    """A run at Weights & Biases or, with WANDB_MODE=offline, its files."""

    def __init__(self, wandb: Any, arguments: Mapping[str, Any], secrets: Sequence[str]):
        # Silent from the first call on: then a missing key is an error, not a question that nobody
        # answers.
        wandb.setup(wandb.Settings(silent=True))
        self._wandb = wandb
        self._run = wandb.init(**arguments)
        self._last_step = 0
        if self._run.disabled:
            log.info("wandb: WANDB_MODE is disabled, so nothing is stored")
        else:
            log.info(
                "wandb: %s",
                _without(secrets, self._run.url or f"{self._folder} (`wandb sync` sends it)"),
            )

    @property
    def _folder(self) -> Path:
        # run.dir is the folder for additional files, within the run's folder.
        return Path(self._run.dir).parent

    def log(self, values: Mapping[str, float], step: int, epoch: int | None) -> None:
        self._send(values, step)

    def images(self, images: "Sequence[tuple[str, np.ndarray]]", step: int) -> None:
        wandb_images = [self._wandb.Image(pixels, caption=caption) for caption, pixels in images]
        sizes = {pixels.shape for _, pixels in images}
        if len(sizes) > 1:  # wandb shows all images of a list in the size of the first
            self._send({f"sample/{i}": image for i, image in enumerate(wandb_images)}, step)
        elif wandb_images:
            self._send({"sample": wandb_images}, step)

    def close(self) -> None:
        has_failed = sys.exc_info()[0] is not None
        try:
            self._run.finish(exit_code=1 if has_failed else 0)
        except TimeoutError:
            raise TimeoutError(
                f"not all was sent in time; `wandb sync {self._folder}` sends the rest"
            ) from None

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        # wandb drops values with a step before the last one, so late values are sent with the last
        # step.
        self._last_step = max(self._last_step, step)
        self._run.log(dict(values), step=self._last_step)


def _import_wandb(flag: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise OptionError(
            f"{flag}: wandb can't be imported ({_in_a_line(error)}); pip install wandb"
        ) from None
    return wandb


def _wandb_arguments(
    options: TrackerOptions,
    name: str,
    config: Mapping[str, object],
    table: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the arguments of wandb.init.

    The [wandb] table overrides ours; tables in it are merged with ours.
    """
    arguments: dict[str, Any] = {
        "project": name,
        "config": dict(config),
        "settings": dict(_WANDB_SETTINGS),
    }
    if options.wandb_api_key is not None:
        # Differs from sd-scripts: wandb.login would also store the key in ~/.netrc, where it stays
        # on a rented machine.
        arguments["settings"]["api_key"] = options.wandb_api_key
    if options.logging_dir is not None:
        # Some versions use a temporary folder if this one does not exist.
        _make_folder(options.logging_dir)
        arguments["dir"] = str(options.logging_dir)
    if table is None and options.wandb_run_name is not None:
        arguments["name"] = options.wandb_run_name
    for key, value in (table or {}).items():
        if isinstance(value, dict) and isinstance(arguments.get(key), dict):
            arguments[key] |= value
        else:
            arguments[key] = value
    if not isinstance(arguments["settings"], dict):
        where = f"--log_tracker_config {options.log_tracker_config}"
        raise OptionError(f"{where}: settings must be a table, [wandb.settings]")
    return arguments


def _in_a_line(error: Exception, secrets: Sequence[str] = ()) -> str:
    """Return the error's type and the first line of its message, without the secrets."""
    first = str(error).strip().partition("\n")[0]
    return _without(secrets, f"{type(error).__name__}: {first}" if first else type(error).__name__)


def _without(secrets: Sequence[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
