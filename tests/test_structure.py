"""The code stays easy to enter: short functions and files, few imports, values instead of the whole Options."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    *ROOT.glob("*.py"),
    *(
        path
        for folder in ("library", "networks", "tools")
        for path in (ROOT / folder).rglob("*.py")
    ),
]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES}

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 430
MAX_OWN_IMPORTS = 20
MAX_FUNCTIONS_WITH_OPTIONS = 20
MAX_COMPREHENSIONS = 30  # per 1,000 lines of code; the aim is 25


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def code_lines(path: Path) -> int:
    """The lines without blank lines, comments and docstrings."""
    docstring_lines: set[int] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstring_lines.update(range(node.lineno, node.end_lineno + 1))
    lines = path.read_text(encoding="utf-8").splitlines()
    count = 0
    for number, line in enumerate(lines, 1):
        text = line.strip()
        count += bool(text) and not text.startswith("#") and number not in docstring_lines
    return count


def per_thousand_lines(*kinds: type[ast.AST]) -> float:
    nodes = sum(isinstance(node, kinds) for tree in TREES.values() for node in ast.walk(tree))
    return 1000 * nodes / sum(code_lines(path) for path in FILES)


def takes_options(function: ast.FunctionDef) -> bool:
    """Whether a parameter is the whole Options of a run, and not a group of them."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    for argument in arguments:
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        if annotation.strip("'\"") == "Options":
            return True
    return False


def test_functions_and_files_are_short():
    long = []
    for path, tree in TREES.items():
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}")
        for function in functions(tree):
            if function.end_lineno - function.lineno + 1 > MAX_FUNCTION_LINES:
                long.append(f"{path.relative_to(ROOT)}: {function.name}")
    assert not long, "\n".join(long)


def test_no_module_imports_many_others():
    for path, tree in TREES.items():
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                imported |= names & MODULES
        assert len(imported) <= MAX_OWN_IMPORTS, f"{path.relative_to(ROOT)}: {sorted(imported)}"


def test_few_functions_take_the_whole_options():
    takers = []
    for path, tree in TREES.items():
        for function in functions(tree):
            if takes_options(function):
                takers.append(f"{path.relative_to(ROOT)}: {function.name}")
    assert len(takers) <= MAX_FUNCTIONS_WITH_OPTIONS, "\n".join(takers)


def test_statements_are_preferred_to_dense_expressions():
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    assert per_thousand_lines(*comprehensions) <= MAX_COMPREHENSIONS
    assert per_thousand_lines(ast.IfExp) <= 25
