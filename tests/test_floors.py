"""Imports go down the floors of the house, never up and never sideways between packages of one floor."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "library.models": 1,
    "library.data": 2,
    "library.generation": 2,
    "networks": 2,
    "library.training": 3,
    "library": 0,
    "tools": 4,
}
SCRIPTS = list(ROOT.glob("*.py"))


def floor(module: str) -> tuple[str, int] | None:
    """The room that a module is in, and its floor; None for what isn't ours."""
    for room in sorted(FLOORS, key=len, reverse=True):
        if module == room or module.startswith(room + "."):
            return room, FLOORS[room]
    return None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_imports_go_down_the_floors():
    wrong = []
    for folder in ("library", "networks"):
        for path in (ROOT / folder).rglob("*.py"):
            own = floor(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
            assert own is not None
            for name in imports(path):
                other = floor(name)
                if other is not None and other[0] != own[0] and other[1] >= own[1]:
                    wrong.append(f"{path.relative_to(ROOT)} (floor {own[1]}) imports {name} (floor {other[1]})")
    assert not wrong, "\n".join(wrong)


def test_accelerate_is_known_only_to_the_start_and_the_caches_before_it():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "library").rglob("*.py")
        if "accelerate" in {n.split(".")[0] for n in imports(path)}
    }
    assert users <= {f"library/training/{name}.py" for name in ("processes", "start", "prepare", "loop", "run")}


def test_scripts_import_nothing_heavy_before_their_options_are_read():
    heavy = {"torch", "numpy", "transformers", "diffusers", "accelerate", "cv2", "PIL", "safetensors"}
    for path in [*SCRIPTS, *(ROOT / "library").rglob("options.py"), ROOT / "networks" / "options.py"]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        top += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not heavy & {name.split(".")[0] for name in top}, path
