"""The torchvision trap (trust.md 3.1): a torchvision that doesn't fit torch must do no harm, and none is needed."""

import textwrap

import pytest
from running import ROOT, script


def test_fault_74_a_broken_torchvision_does_no_harm(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    meta = tmp_path / "torchvision-0.28.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    program = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from library.imports import import_diffusers, import_transformers
        import_transformers().CLIPTextModel, import_transformers().CLIPTokenizer
        import_diffusers().AutoencoderKL, import_diffusers().EulerDiscreteScheduler
        import peft, accelerate
        assert "torchvision" not in sys.modules
        print("fine")
    """
    done = script("-c", textwrap.dedent(program))
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_the_name_is_hidden_only_while_the_libraries_ask(monkeypatch):
    import importlib.util

    from library.imports import import_transformers

    before = importlib.util.find_spec
    import_transformers()
    assert importlib.util.find_spec is before


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*.py")))
def test_help_is_printed_without_numpy_and_torch(name):
    """Half a second is all that a mistake may take: numpy alone is a third of that."""
    program = (
        f"import sys, {name}; print(*sorted({{'numpy', 'torch', 'PIL'}} & sys.modules.keys()))"
    )
    assert script("-c", program).stdout.strip() == ""
