"""Imports go down the floors of the architecture, never up and never sideways between packages of one floor."""

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
# Within training: the loop on top, the run that it touches under the set-up that builds it, topics below.
TRAINING_FLOORS = {
    "options": 0,
    "progress": 0,
    "objective": 1,
    "trainable": 1,
    "distributed": 1,
    "optim": 2,
    "monitoring": 3,
    "saving": 4,
    "tasks": 5,
    "forward": 6,
    "run": 6,
    "setup": 7,
    "loop": 8,
    "main": 9,
}
MAX_FILES = 20
SCRIPTS = list(ROOT.glob("*.py"))


def floor(module: str) -> tuple[str, int] | None:
    """The room that a module is in, and its floor; None for what isn't ours."""
    for room in sorted(FLOORS, key=len, reverse=True):
        if module == room or module.startswith(room + "."):
            return room, FLOORS[room]
    return None


def training_topic(module: str) -> str | None:
    """The package or module of library/training that a module belongs to."""
    name = module.removeprefix("library.training.").split(".")[0]
    return name if module.startswith("library.training.") and name in TRAINING_FLOORS else None


def imports(path: Path) -> list[str]:
    """The modules that a file imports, inside functions and for type checkers too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return modules


def test_imports_go_down_the_floors():
    wrong = []
    for folder in ("library", "networks"):
        for path in (ROOT / folder).rglob("*.py"):
            own = floor(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
            assert own is not None
            for name in imports(path):
                other = floor(name)
                if other is not None and other[0] != own[0] and other[1] >= own[1]:
                    wrong.append(
                        f"{path.relative_to(ROOT)} (floor {own[1]}) imports {name} (floor {other[1]})"
                    )
    assert not wrong, "\n".join(wrong)


def test_imports_within_training_go_down_its_floors():
    wrong = []
    for path in (ROOT / "library" / "training").rglob("*.py"):
        topic = training_topic(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."))
        if topic is None:
            continue
        for name in imports(path):
            other = training_topic(name)
            if other not in (None, topic) and TRAINING_FLOORS[other] >= TRAINING_FLOORS[topic]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    """Depth-first search over all imports of our own modules, inside functions and for type checkers too."""
    paths = [path for folder in ("library", "networks") for path in (ROOT / folder).rglob("*.py")]
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for name in imports(modules[module]):
            if name in modules:
                visit(name, (*trail, module))
        done.add(module)

    for module in modules:
        visit(module, ())


def test_no_folder_has_more_files_than_a_reader_can_survey():
    for folder in ("library", "networks", "tools"):
        for package in {path.parent for path in (ROOT / folder).rglob("*.py")}:
            files = [path for path in package.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= MAX_FILES, f"{package.relative_to(ROOT)}: {len(files)} files"


def test_accelerate_is_known_only_to_the_start_and_the_caches_before_it():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "library").rglob("*.py")
        if "accelerate" in {n.split(".")[0] for n in imports(path)}
    }
    allowed = (
        "distributed/launch",
        "setup/build_run",
        "setup/caches",
        "setup/dry_run",
        "setup/measure",
        "setup/training_state",
        "loop",
        "run",
    )
    assert users <= {f"library/training/{name}.py" for name in allowed}


def test_scripts_import_nothing_heavy_before_their_options_are_read():
    heavy = {
        "torch",
        "numpy",
        "transformers",
        "diffusers",
        "accelerate",
        "cv2",
        "PIL",
        "safetensors",
    }
    for path in [
        *SCRIPTS,
        *(ROOT / "library").rglob("options.py"),
        ROOT / "networks" / "options.py",
    ]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [
            alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        ]
        top += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not heavy & {name.split(".")[0] for name in top}, path
