"""The imports of transformers and diffusers, which take seconds and trip over a torchvision that doesn't fit torch.

Both ask only whether a package named torchvision exists, then import it. PyPI's torchvision beside
another build of torch raises on import, and then no model of theirs can be imported. Nothing here
needs torchvision, so it is hidden from them.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def import_transformers() -> ModuleType:
    """transformers, imported so that a broken torchvision does no harm. Takes about a second, its models two more."""
    with _torchvision_hidden():
        import transformers
        from transformers.utils import is_torchvision_available

        is_torchvision_available()  # the answer is remembered, and the models' modules ask later
        logging.getLogger("transformers").setLevel(logging.ERROR)
        return transformers


def import_diffusers() -> ModuleType:
    """diffusers, imported the same way."""
    import_transformers()
    with _torchvision_hidden():
        import diffusers

        logging.getLogger("diffusers").setLevel(logging.ERROR)
        return diffusers


@contextmanager
def _torchvision_hidden() -> Iterator[None]:
    if "torchvision" in sys.modules:  # someone imported it, so it works
        yield
        return
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name.split(".")[0] == "torchvision" else find_spec(name, package)
    )
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec
