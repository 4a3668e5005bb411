"""Fixtures: the golden model, small images, and a clean slate for what trains in this process."""

import logging
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

GOLDEN = Path(__file__).parent / "golden"
log = logging.getLogger("library")


def pytest_collection_modifyitems(items):
    """A golden test is a numeric one by its name."""
    for item in items:
        if item.name.startswith("test_golden_"):
            item.add_marker(pytest.mark.numeric)


@pytest.fixture(autouse=True)
def one_thread_and_fresh_processes():
    """Numbers that don't depend on the machine's cores; no accelerate state and no console of the test before, which is closed.

    `make test-long` sets TEST_THREADS to run the numeric tests with more threads than one.
    """
    import torch

    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
    yield
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path_factory, monkeypatch):
    """The index of known files lies in a folder of the test's own."""
    folder = str(tmp_path_factory.mktemp("user_cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", folder)
    monkeypatch.setenv("LOCALAPPDATA", folder)


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory) -> Path:
    """The tiny SDXL that the golden numbers were recorded with, as a single file."""
    from golden_model import write_golden_checkpoint

    return write_golden_checkpoint(tmp_path_factory.mktemp("golden") / "tiny_sdxl.safetensors")


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Makes the tiny twin of a name, once: "base", "ssd-1b", ..., "-v" behind it for velocity."""
    from library.safetensors_io import write_safetensors
    from tools.tiny_models import tiny_checkpoint

    folder = tmp_path_factory.mktemp("twins")

    def twin(name):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            family, is_v = name.removesuffix("-v"), name.endswith("-v")
            write_safetensors(
                path, tiny_checkpoint(3, twin=family, v_prediction=is_v), {"format": "pt"}
            )
        return path

    return twin


@pytest.fixture(scope="session")
def golden_models(golden_model):
    """The same, open: shared, so nothing may be changed in it."""
    return open_models(golden_model)


@pytest.fixture
def own_models(golden_model):
    """The same, for a test that attaches a network or changes weights."""
    return open_models(golden_model)


def open_models(path: Path, **settings):
    import torch

    from library.device import Precision
    from library.models.checkpoint.reader import open_checkpoint
    from library.models.sdxl import SdxlModels

    precision = Precision.decide("no", None, no_half_vae=True)
    return SdxlModels(open_checkpoint(str(path)), precision, torch.device("cpu"), **settings)


@pytest.fixture
def images(tmp_path) -> Path:
    """A train_data_dir with four small captioned images of four sizes, shown twice an epoch each."""
    from tools.make_tiny_dataset import make_images

    make_images(tmp_path / "images" / "2_shapes", 4)
    return tmp_path / "images"


@pytest.fixture
def golden_data(tmp_path) -> Path:
    """A copy of the golden training images and their dataset files."""
    import shutil

    source = GOLDEN / "10_training"
    shutil.copytree(source / "dataset", tmp_path, dirs_exist_ok=True)
    for file in source.glob("*.toml"):
        shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def generate(golden_model, tmp_path):
    """Runs sdxl_gen_img.py in this process; returns the new files in the order in which they were written."""
    from generating import SMALL

    import sdxl_gen_img

    def run(*words, outdir=None, small=SMALL):
        folder = outdir or tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        before = set(folder.iterdir()) if folder.exists() else set()
        arguments = ("--ckpt", golden_model, "--outdir", folder, *small, *words)
        sdxl_gen_img.main([str(word) for word in arguments])
        new = set(folder.iterdir()) - before if folder.exists() else set()
        return sorted(new, key=lambda path: path.stat().st_mtime_ns)

    return run
