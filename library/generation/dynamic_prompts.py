"""Variants: dynamic prompts. {a|b} draws one of them, {2$$a|b|c} two, {e$$a|b} makes a prompt of each.

Source: contract, training_math.md section 10.
"""

import itertools
import random
import re

_GROUP = re.compile(r"\{([^{}]*)\}")  # an innermost one
_COUNTED = re.compile(r"(?:(e)|(\d+)(?:-(\d+))?)\$\$(?:([^|]*?)\$\$)?(.*)", re.DOTALL)
_SEPARATOR = ", "


def variants(text: str, rng: random.Random) -> tuple[list[str], bool]:
    """The prompts that a text stands for, and whether it enumerates them; one where nothing is to be enumerated.

    {a|b|c} draws one, {n$$a|b|c} n of them, {n-m$$…} from n to m, {…$$sep$$…} joined by sep instead of a comma; {e$$…}
    stands for each in turn, and several such groups for all combinations. Innermost groups come first. Raises ValueError
    for more than there are.

    >>> variants("{e$$a|b} {e$$1|2}", random.Random(0))
    (['a 1', 'a 2', 'b 1', 'b 2'], True)
    """
    found, enumerates = [text], False
    while any(_GROUP.search(one) for one in found):
        expanded = []
        for one in found:
            choices, has_each = _expand(one, rng)
            expanded += choices
            enumerates |= has_each
        found = expanded
    return found, enumerates


def _expand(text: str, rng: random.Random) -> tuple[list[str], bool]:
    """All innermost groups of a text replaced."""
    pieces: list[list[str]] = []
    end, has_each = 0, False
    for match in _GROUP.finditer(text):
        pieces.append([text[end : match.start()]])
        counted = _COUNTED.fullmatch(match[1])
        if counted and counted[1]:
            has_each = True
            pieces.append(counted[5].split("|"))
        else:
            pieces.append([_drawn(match[0], match[1], counted, rng)])
        end = match.end()
    pieces.append([text[end:]])
    return ["".join(parts) for parts in itertools.product(*pieces)], has_each


def _drawn(group: str, inside: str, counted: re.Match[str] | None, rng: random.Random) -> str:
    """Some of a group's variants, drawn without repetition."""
    if counted is None:
        return rng.choice(inside.split("|"))
    least = int(counted[2])
    most = int(counted[3]) if counted[3] else least
    choices = counted[5].split("|")
    if not least <= most <= len(choices):
        raise ValueError(f"{group}: expected from {least} to {most} of its variants, but it has {len(choices)}")
    separator = _SEPARATOR if counted[4] is None else counted[4]
    return separator.join(rng.sample(choices, rng.randint(least, most)))
