"""Dynamic prompts: {a|b} picks one variant, {2$$a|b|c} picks two, {e$$a|b} makes a prompt of each.

Source: contract, training_math.md section 10.
"""

import itertools
import random
import re

_GROUP = re.compile(r"\{([^{}]*)\}")  # an innermost group
_COUNTED = re.compile(r"(?:(e)|(\d+)(?:-(\d+))?)\$\$(?:([^|]*?)\$\$)?(.*)", re.DOTALL)
_SEPARATOR = ", "


def variants(text: str, rng: random.Random) -> tuple[list[str], bool]:
    """Return the prompts that a text expands to, and whether it enumerates its variants.

    {a|b|c} picks one variant, {n$$a|b|c} picks n, {n-m$$…} picks n to m, and {…$$sep$$…} joins
    them with sep instead of a comma. {e$$…} enumerates: it gives a prompt for each variant, and
    several such groups give all combinations. Innermost groups are expanded first. A text that
    doesn't enumerate expands to one prompt.

    Raises:
        ValueError: if a group has fewer variants than are to be picked.

    >>> variants("{e$$a|b} {e$$1|2}", random.Random(0))
    (['a 1', 'a 2', 'b 1', 'b 2'], True)
    """
    prompts = [text]
    enumerates = False
    while any(_GROUP.search(prompt) for prompt in prompts):
        expanded = []
        for prompt in prompts:
            choices, has_each = _expand_innermost(prompt, rng)
            expanded += choices
            enumerates |= has_each
        prompts = expanded
    return prompts, enumerates


def _expand_innermost(text: str, rng: random.Random) -> tuple[list[str], bool]:
    """Replace all innermost groups of a text."""
    pieces: list[list[str]] = []
    end = 0
    has_each = False
    for match in _GROUP.finditer(text):
        pieces.append([text[end : match.start()]])
        counted = _COUNTED.fullmatch(match[1])
        if counted and counted[1]:
            has_each = True
            pieces.append(counted[5].split("|"))
        else:
            pieces.append([_pick(match[0], match[1], counted, rng)])
        end = match.end()
    pieces.append([text[end:]])
    return ["".join(combination) for combination in itertools.product(*pieces)], has_each


def _pick(group: str, inside: str, counted: re.Match[str] | None, rng: random.Random) -> str:
    """Pick variants of a group at random, without repetition."""
    if counted is None:
        return rng.choice(inside.split("|"))
    least = int(counted[2])
    most = int(counted[3]) if counted[3] else least
    choices = counted[5].split("|")
    if not least <= most <= len(choices):
        raise ValueError(
            f"{group}: {least} to {most} variants can't be picked; it has {len(choices)}"
        )
    separator = _SEPARATOR if counted[4] is None else counted[4]
    return separator.join(rng.sample(choices, rng.randint(least, most)))
