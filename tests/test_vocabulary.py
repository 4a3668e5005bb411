"""The code, its messages and the docs use the field's words (docs/architecture.md: Words), so that they can be searched."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = [
    *ROOT.glob("*.py"),
    *(
        path
        for folder in ("library", "networks", "tools", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ),
]
DATA = {
    "tools/clean_captions_and_tags.py",  # its patterns find "a picture of" in captions
    "library/training/tasks/token_captions.py",  # caption templates, which results depend on
    "tools/make_tiny_dataset.py",  # captions of the tiny dataset, which results depend on
}
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]

# pattern -> the word to use
BANNED = {
    r"pictures?": "image",
    r"(is|are|was|were|be|being|been) told|tells?|telling": "logs, prints, raises, reports",
    r"(it|that|which|what|they|files?|tensors?|weights|latents|captions?|states?|images?|folders?) (lie|lies|lay|stand|stands)": "is stored in, is located in",
    r"beside": "next to, in addition to",
    r"behind": "after",
    r"anew": "again, from scratch",
    r"meanwhile": "while",
    r"mend(s|ed|ing)?": "fix",
    r"so many": "N at a time, up to N",
    r"(the|a|one|this|that|each|your|no|another|of|consumer) cards?": "GPU",
    r"(?<!there )(?<!There )is no (?!longer|more|less|reason|way|such)": "is not a",
    r"go(es)? on with": "resume, continue with",
    r"whole (file|folder|run|state|save|model|image|tensor|epoch|line|table)s?": "complete, full",
    r"draws? (an? |the |all |some |more )?(image|sample|preview)s?": "generate",
    r"numbers of (the |a )?(weights|tensors?|model|file)": "parameters, values",
    r"quantis\w+|colours?|normalis\w+": "PyTorch's spelling",
}
BANNED_PARTS = {"picture", "pictures", "told", "tells", "beside", "behind", "anew", "meanwhile", "mend", "colour", "lodging", "lane", "studio", "painter", "stepper", "descent"}  # fmt: skip
PATTERNS = {re.compile(rf"\b(?:{pattern})\b"): word for pattern, word in BANNED.items()}


def problems_of(text: str, where: str) -> list[str]:
    """One line for each banned phrase in the text."""
    problems = []
    for pattern, word in PATTERNS.items():
        for match in pattern.finditer(text):
            problems.append(f"{where}: {match.group()!r}: write {word}")
    return problems


def words_of(identifier: str) -> list[str]:
    """The words of snake_case and CamelCase names, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)]


def is_prose(text: str) -> bool:
    return " " in text.strip()


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_uses_the_words_of_the_field(path):
    text = path.read_text(encoding="utf-8")
    problems = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        where = f"{path.name}:{token.start[0]}"
        if token.type == tokenize.COMMENT:
            problems += problems_of(token.string, where)
        elif token.type == tokenize.NAME:
            banned = BANNED_PARTS.intersection(words_of(token.string))
            problems += [f"{where}: {token.string}: contains {word!r}" for word in banned]
    if path.relative_to(ROOT).as_posix() in DATA:
        text = ""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_prose(node.value):
            problems += problems_of(" ".join(node.value.split()), f"{path.name}:{node.lineno}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_use_the_words_of_the_field(path):
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    assert not problems_of(" ".join(prose.split()), path.name)
