"""The text under which two observations of ScienceWorld count as equal: objects listed in one order.

    canonical("... In it, you see: \\n\\ta jug (containing soil, a seed)\\n\\tan axe")
    == canonical("... In it, you see: \\n\\tan axe\\n\\ta jug (containing a seed, soil)")

The simulator lists what a place or a thing holds in the order of Java's hashes. Three kinds of lists are sorted, each within
itself, innermost first; duplicates stay:

    lines           indented lines that follow each other: what is in a room
    contents        (containing soil, a seed)
    sentences       On the table is: a jug, a cup.       On the apple tree you see: a flower, a flower.

Nothing moves from one list to another, an attribute stays with its object (`a switch, which is off`), and other text keeps
its words and their order, numbered choices included. White space is collapsed within a line.
"""

from __future__ import annotations

import re

ATTRIBUTE = re.compile(r"(?:which|currently) ")
"""What may stand behind a comma without being the next object."""

CONTENTS = "(containing "


def canonical(observation: str) -> str:
    """The observation with its lists sorted. A text without indented lines becomes one line."""
    if "\n\t" not in observation:
        return _Reader(" ".join(observation.split())).text()
    lines: list[str] = []
    listed: list[str] = []
    for line in observation.splitlines():
        text = _Reader(" ".join(line.split())).text()
        if line.startswith("\t"):
            listed.append(f"\t{text}")
        elif text:
            lines += [*sorted(listed), text]
            listed = []
    return "\n".join([*lines, *sorted(listed)])


class _Reader:
    """Reads one line from left to right."""

    def __init__(self, line: str) -> None:
        self._line, self._at = line, 0

    def text(self) -> str:
        """The whole line, lists in it sorted."""
        return ", ".join(self._items(closers=""))

    def _items(self, *, closers: str) -> list[str]:
        """What stands between commas, up to a closing sign or the end."""
        items, start = [""], self._at
        while self._at < len(self._line) and not self._closes(closers):
            line, at = self._line, self._at
            if line[at] == "(":
                items[-1] += self._bracket()
            elif line.startswith(": ", at):
                self._at += 2
                items[-1] += f": {', '.join(sorted(self._items(closers=f'.{closers}')))}"
            elif line.startswith(", ", at) and at > start and not ATTRIBUTE.match(line, at + 2):
                self._at += 2
                items.append("")
            else:
                items[-1] += line[at]
                self._at += 1
        return [item.strip() for item in items]

    def _bracket(self) -> str:
        is_contents = self._line.startswith(CONTENTS, self._at)
        opening = CONTENTS if is_contents else "("
        self._at += len(opening)
        items = self._items(closers=")")
        closing = self._line[self._at : self._at + 1]
        self._at += len(closing)
        return opening + ", ".join(sorted(items) if is_contents else items) + closing

    def _closes(self, closers: str) -> bool:
        sign = self._line[self._at]
        if sign == "." and "." in closers:
            return self._line[self._at + 1 : self._at + 2] in ("", " ", ")", ",")
        return sign != "." and sign in closers
