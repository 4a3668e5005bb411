"""The run file: NAME-run.toml beside the output, with which the same run can be started again."""

import importlib.metadata
import time

from library.errors import RunError
from library.files import write_atomically
from library.log import log
from library.option_types import as_toml
from library.options import ConfigOptions, Options
from library.training.options.output import SavingOptions

_PACKAGES = ("torch", "diffusers", "transformers")


def write_run_file(options: Options, seed: int) -> None:
    """Write every option that isn't at its default, keys and tokens apart, and the seed, drawn or given. A failure is told."""
    saving = options[SavingOptions]
    assert saving.output_dir is not None
    path = saving.output_dir / f"{saving.name}-run.toml"
    values = {**options.changed(), "seed": seed}
    lines = [
        f"# The options of a run that began on {time.strftime('%Y-%m-%d at %H:%M:%S')}. To repeat it: --config_file {path.name}",
        f"# {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}",
        *(f"{name} = {as_toml(value)}" for name, value in values.items() if name not in vars(options[ConfigOptions])),
    ]
    text = "".join(f"{line}\n" for line in lines)
    try:
        write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))
    except RunError as error:
        log.warning("%s", error)


def _version(package: str) -> str:
    """What is installed, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
