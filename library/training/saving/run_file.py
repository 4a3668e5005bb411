"""The run file: NAME-run.toml in the output folder, a config file that repeats the run."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path

from library.errors import RunError
from library.files import write_atomically
from library.log import log
from library.option_types import as_toml
from library.options import ConfigOptions

_NEVER_WRITTEN = tuple(field.name for field in dataclasses.fields(ConfigOptions))
_PACKAGES = ("torch", "diffusers", "transformers")


def write_run_file(path: Path, options: Mapping[str, object]) -> None:
    """Write the options to a config file that repeats the run. A failure is only logged.

    Args:
        path: the file.
        options: the options that aren't at their defaults, without secrets, and the seed.
    """
    started = time.strftime("%Y-%m-%d at %H:%M:%S")
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    lines = [
        f"# The options of a run that began on {started}. To repeat it: --config_file {path.name}",
        f"# {versions}",
    ]
    for name, value in options.items():
        if name not in _NEVER_WRITTEN:
            lines.append(f"{name} = {as_toml(value)}")
    text = "".join(f"{line}\n" for line in lines)
    try:
        write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))
    except RunError as error:
        log.warning("%s", error)


def _version(package: str) -> str:
    """Return the installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
