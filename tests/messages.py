"""What a message must carry, however it is worded: the option or file, what was found, what is expected, and the remedy.

Tests name these as tokens, and never pin a sentence.
"""

import re
from collections.abc import Iterable


def mentioning(*tokens: object) -> str:
    """Return a pattern, for `match=` too, that finds a line with all the tokens, in any order.

    A token is literal text; `a|b` accepts either. Tokens in lower case match capitals too. A letter at a token's
    start is at the start of a word (a lower-case word is no piece of a name), digits at its ends are a
    complete number, and an option name is complete.
    """
    return "(?m)^" + "".join(f"(?=.*{_pattern(str(token))})" for token in tokens)


def mentions(text: str | Iterable[str], *tokens: object) -> bool:
    """Return whether one line of the text (or of the lines) has all the tokens."""
    return bool(lines_mentioning(text, *tokens))


def lines_mentioning(text: str | Iterable[str], *tokens: object) -> list[str]:
    """Return the lines of the text (or of the lines) that have all the tokens."""
    lines = text.splitlines() if isinstance(text, str) else text
    return [line for line in lines if re.search(mentioning(*tokens), line)]


def _pattern(token: str) -> str:
    choices = "|".join(_choice(choice) for choice in token.split("|"))
    return f"(?:{choices})"


def _choice(text: str) -> str:
    pattern = re.escape(text)
    if re.fullmatch(r"[a-z ]+", text):
        pattern = rf"(?<![\w.-]){pattern}"
    elif text[0].isalpha():
        pattern = rf"(?<![A-Za-z]){pattern}"
    if text[0].isdigit():
        pattern = rf"(?<!\d)(?<!\d[.,]){pattern}"
    if text[-1].isdigit():
        pattern += r"(?!\d|[.,]\d)"
    if text.startswith("--"):
        pattern += r"(?!\w)"
    return f"(?i:{pattern})" if text.islower() else pattern


def shows_caching(log: str) -> bool:
    """Return whether the console shows that latents or text encoders' outputs were looked for, or computed.

    A run that is refused early mustn't get there.
    """
    told = [line for line in log.splitlines() if not line.startswith("error")]
    return any(re.search(r"(?i)(?<![\w-])(latents|text[- ]encoder)", line) for line in told)
