"""Observations of ScienceWorld told anew: lists in another order, which is the same, and wrong ones, which are not.

`shuffled` and `wrong_versions` work on the text with expressions of their own and share nothing with the code under test.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

ROOM = """This room is called the workshop. In it, you see: 
\tthe agent
\ta substance called air
\ta adult bee
\ta adult bee
\ta table. On the table is: a battery, a black wire, a green light bulb, which is off, a switch, which is on.
\ta ultra low temperature freezer. The ultra low temperature freezer door is closed. 
\ta cupboard. The cupboard door is open. In the cupboard is: a cup (containing red paint), a tin cup (containing nothing).
\ta flower pot 1 (containing a pea plant in the adult stage. On the pea plant you see: a flower, a bud. , soil, a seed)
\ta glass jar (containing a round green pea seed, a wrinkly green pea seed)
\ta thermometer, currently reading a temperature of 10 degrees celsius
You also see:
\tA door to the hallway (that is open)
\tA door to the kitchen (that is closed)"""

LISTS = (
    "In your inventory, you see:\n\ta thermometer, currently reading 3\n\tan orange\n\ta jug (containing soil, a seed)",
    "On the counter is: a bowl (containing a red apple, a banana, an orange), a drawer, a lamp, which is off.",
    "a jug (containing soil, a substance called water)",
)  # fmt: skip


def shuffled(text: str, seed: int) -> str:
    """The same observation with the objects of each list in another order."""
    rng = random.Random(seed)
    text = re.sub(r"(?<=\(containing )[^():]+(?=\))", lambda list: _shuffled_items(list.group(), rng), text)
    for head in (r"(?<=\w is: )", r"(?<=plant you see: )"):
        text = re.sub(rf"{head}(?:[^().,]|\([^()]*\)|,)+(?=\.)", lambda list: _shuffled_items(list.group(), rng), text)
    lines, block = [], []
    for line in [*text.split("\n"), ""]:
        if line.startswith("\t"):
            block.append(line)
            continue
        rng.shuffle(block)
        lines += [*block, line]
        block = []
    return "\n".join(lines[:-1])


def _shuffled_items(text: str, rng: random.Random) -> str:
    items = re.split(r", (?!which )(?![^()]*\))", text)
    rng.shuffle(items)
    return ", ".join(items)


def wrong_versions(text: str, seed: int) -> Iterator[tuple[str, str]]:
    """(what is wrong, the observation with that), as many kinds as the text allows."""
    rng = random.Random(seed)
    lines = text.split("\n")
    listed = [index for index, line in enumerate(lines) if line.startswith("\t")]
    if listed:
        at = rng.choice(listed)
        yield "object gone", "\n".join(lines[:at] + lines[at + 1 :])
        yield "object twice", "\n".join(lines[: at + 1] + lines[at:])
    for kind, pattern, replace in (
        ("state flipped", r"\b(?:open|closed|on|off|activated|deactivated)\b(?=[.)\n]|, |$)", _flip),
        ("number changed", r"\b\d+\b", lambda number: str(int(number) + 1)),
        ("renamed", r"\b(?:cup|jug|jar|wire|plant|table|door|agent|air|kitchen|water)\b", lambda word: word + "let"),
        ("emptied", r"\(containing (?!nothing)[^():]+\)", lambda contents: "(containing nothing)"),
    ):  # fmt: skip
        found = list(re.finditer(pattern, text))
        if found:
            one = rng.choice(found)
            yield kind, text[: one.start()] + replace(one.group()) + text[one.end() :]
    contents = list(re.finditer(r"\(containing [^():]+\)", text))
    pairs = [(a, b) for a in contents for b in contents if a.end() <= b.start() and a.group() != b.group()]
    if pairs:
        a, b = rng.choice(pairs)
        yield "contents swapped", text[: a.start()] + b.group() + text[a.end() : b.start()] + a.group() + text[b.end() :]
    yield "cut off", text[: len(text) // 2]
    yield "another action", "No known action matches that input."


def _flip(word: str) -> str:
    pairs = {"open": "closed", "on": "off", "activated": "deactivated"}
    return (pairs | {b: a for a, b in pairs.items()})[word]
