"""Imports of transformers and diffusers, which fail with a torchvision that doesn't match torch.

Both ask only whether a package named torchvision exists, then import it. PyPI's torchvision with
another build of torch raises on import, and then no model of theirs can be imported. Nothing here
needs torchvision, so it is hidden from them.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_transformers() -> ModuleType:
    """Import transformers without torchvision. Takes about a second, its models two more."""
    with _torchvision_hidden():
        import transformers
        from transformers.utils import is_torchvision_available

        is_torchvision_available()  # the answer is cached, and the models' modules ask later
        logging.getLogger("transformers").setLevel(logging.ERROR)
        return transformers


def import_diffusers() -> ModuleType:
    """Import diffusers without torchvision."""
    import_transformers()
    with _torchvision_hidden():
        import diffusers

        logging.getLogger("diffusers").setLevel(logging.ERROR)
        return diffusers


@contextmanager
def _torchvision_hidden() -> Iterator[None]:
    """Context manager: torchvision can't be found."""
    if "torchvision" in sys.modules:  # someone imported it, so it works
        yield
        return
    find_spec = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> ModuleSpec | None:
        if name.split(".")[0] == "torchvision":
            return None
        return find_spec(name, package)

    importlib.util.find_spec = find_others
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec
