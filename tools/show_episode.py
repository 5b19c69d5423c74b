"""Print one episode of a run or of a demonstration file, the tokens that are trained in colour.

    python tools/show_episode.py runs/f2b                                  # the last episode that was written
    python tools/show_episode.py runs/f2b --step 12 --task heat --sample 1
    python tools/show_episode.py runs/f2b --outcome diverged --list
    python tools/show_episode.py demos.jsonl --number 3

Of a run it reads trajectories*.jsonl, of which a token is trained where the row's loss mask says so; neighbouring tokens have
two shades of green. Of a demonstration file it shows the turns that SFT imitates in green. Tokens that a student sampled and
nobody trains on are yellow, a teacher's replayed ones and observations dim. Without a terminal, or with NO_COLOR set, there
are no colours and what is trained stands between « and ».

Characters that could move the cursor, change the terminal or turn the direction of the text are shown as escapes. Texts are
cut after `--clip` characters. Lines that cannot be read are counted on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_tcod.envs.demonstrations import EndLine, RecordedLine, parse_line
from megatron_tcod.journal import scan_journal

GREENS, YELLOW, DIM, BOLD, RED = ("32", "92"), "33", "2", "1", "31"
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories without a glyph of their own: controls, formats and directions, surrogates, unknown ones, separators."""


class ShownTask(msgspec.Struct):
    task_id: str
    family: str = ""


class ShownWindow(msgspec.Struct):
    start: int
    stop: int


class ShownTurn(msgspec.Struct):
    observation: str
    text: str
    action: str
    actor: str = "teacher"
    index: int = 0
    token_ids: list[int] = []
    finish_reason: str = "stop"
    reward: float | None = 0.0
    done: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    is_accepted: bool | None = None
    is_trained: bool = False
    """Of a demonstration's turn."""


class ShownRow(msgspec.Struct):
    token_ids: list[int]
    turn_ids: list[int]
    loss_mask: list[int]


class ShownEpisode(msgspec.Struct):
    """What is read of a record of trajectories.jsonl, or of a demonstration."""

    task: ShownTask
    turns: list[ShownTurn]
    success: bool = False
    outcome: str = "ok"
    end_reason: str = ""
    detail: str = ""
    step: int | None = None
    sample: int | None = None
    curriculum_k: int | None = None
    window: ShownWindow | None = None
    reward: float | None = None
    rows: list[ShownRow] = []
    token_texts: list[list[str]] = []
    tokens_kl: list[list[float | None]] = []
    source: str = ""
    final_observation: str = ""


@dataclass(frozen=True)
class Ink:
    """Colours, or none."""

    is_on: bool

    def paint(self, text: str, code: str) -> str:
        """One colour for a text that holds no escape of its own; each line is closed for itself."""
        if not self.is_on or not text:
            return text
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def trained(self, tokens: Sequence[str]) -> str:
        """Tokens that are trained, told apart by shade, or as one text between « and »."""
        if not self.is_on:
            return f"«{''.join(tokens)}»" if tokens else ""
        return "".join(self.paint(token, GREENS[index % 2]) for index, token in enumerate(tokens))


def visible(text: str) -> str:
    """The text with every character that has no glyph, but the line feed, as an escape."""
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in HIDDEN else escape(character)
        for character in text
    )


def escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more characters)"


def indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def read_episodes(path: Path) -> Iterator[ShownEpisode | None]:
    """Episodes in file order, None for a line that cannot be read. ValueError where there is nothing of the kind."""
    paths = sorted(path.glob("trajectories*.jsonl")) if path.is_dir() else [path]
    if not paths or not all(one.is_file() for one in paths):
        raise ValueError(f"{path}: no trajectories*.jsonl and no file; give a run directory or a demonstration file")
    for one in paths:
        if path.is_dir() or is_journal(one):
            yield from (record for _, record in scan_journal(one, ShownEpisode))
        else:
            yield from read_demonstrated(one)


def is_journal(path: Path) -> bool:
    """Whether a file is a journal of ours, by the end of its first line."""
    with open(path, "rb") as file:
        return b'"crc32":"' in file.readline(1 << 26)[-40:]


def read_demonstrated(path: Path) -> Iterator[ShownEpisode]:
    """A demonstration file line by line. ValueError names the line that is broken."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            read = parse_line(line, where=f"{path}:{number}")
            if isinstance(read, RecordedLine):
                shown = msgspec.convert(msgspec.to_builtins(read.demonstration), ShownEpisode)
                for index, turn in enumerate(shown.turns):
                    turn.index = index
                yield shown
            elif not isinstance(read, EndLine):
                turns = [
                    ShownTurn("", action, action, index=index, is_trained=True) for index, action in enumerate(read.actions)
                ]
                name = getattr(read, "task_id", "") or read.game_file
                yield ShownEpisode(ShownTask(name), turns, source="actions alone; demonstrate --import records what is seen")


def choose(episodes: Iterator[ShownEpisode | None], arguments: argparse.Namespace) -> tuple[Sequence[ShownEpisode], int]:
    """The episodes that were asked for, and how many lines could not be read. Where the last one is wanted, no other is
    kept."""
    is_last_alone = arguments.number == -1 and not arguments.list
    chosen: deque[ShownEpisode] = deque(maxlen=1 if is_last_alone else None)
    num_bad = 0
    for episode in episodes:
        if episode is None:
            num_bad += 1
        elif (
            arguments.task in episode.task.task_id
            and arguments.step in (None, episode.step)
            and arguments.sample in (None, episode.sample)
            and arguments.outcome in (None, episode.outcome)
        ):
            chosen.append(episode)
    return chosen, num_bad


def trained_flags(episode: ShownEpisode, turn: ShownTurn) -> list[bool]:
    """For each token of a turn whether a row trains it."""
    if turn.is_trained:
        return [True] * max(len(turn.token_ids), 1)
    left = [
        token
        for row in episode.rows
        for token, owner, mask in zip(row.token_ids, row.turn_ids, row.loss_mask, strict=False)
        if mask and owner == turn.index
    ]
    if not turn.token_ids:
        return [bool(left)]
    flags = []
    for token in turn.token_ids:
        flags.append(bool(left) and left[0] == token)
        left = left[1:] if flags[-1] else left
    return flags


def answer_text(turn: ShownTurn, flags: list[bool], texts: list[str], ink: Ink, most: int) -> str:
    """An answer with what is trained in colour, token by token where their texts are known."""
    pieces = texts if len(texts) == len(turn.token_ids) and texts else [turn.text]
    if len(pieces) != len(flags):
        flags = [any(flags)] * len(pieces)
    shown, length = "", 0
    start = 0
    while start < len(pieces):
        end = start
        while end < len(pieces) and flags[end] == flags[start]:
            end += 1
        run = [visible(clipped(piece, most)) for piece in pieces[start:end]]
        color = DIM if turn.actor == "teacher" else YELLOW
        shown += ink.trained(run) if flags[start] else ink.paint("".join(run), color)
        length += sum(map(len, run))
        start = end
        if length > most and start < len(pieces):
            return f"{shown} ... ({len(pieces) - start} more tokens)"
    return shown


def headline(episode: ShownEpisode) -> str:
    """One line about an episode."""
    parts = [visible(clipped(episode.task.task_id, 200))]
    for name, value in (("sample", episode.sample), ("step", episode.step), ("k", episode.curriculum_k)):
        if value is not None:
            parts.append(f"{name} {value}")
    if episode.window:
        parts.append(f"window [{episode.window.start}, {episode.window.stop})")
    parts += [visible(clipped(text, 200)) for text in (episode.outcome, episode.end_reason, episode.source) if text]
    parts += ["solved" if episode.success else "not solved", f"{len(episode.turns)} turns"]
    return " | ".join(parts)


def episode_lines(episode: ShownEpisode, ink: Ink, most: int) -> Iterator[str]:
    """A whole episode as text."""
    yield ink.paint(headline(episode), BOLD)
    if episode.detail:
        yield ink.paint(indented(visible(clipped(episode.detail, most))), RED)
    for place, turn in enumerate(episode.turns):
        flags = trained_flags(episode, turn)
        num_trained = sum(flags) if turn.token_ids else 0
        told = [f"turn {turn.index}", visible(clipped(turn.actor, 20))]
        told += [f"{num_trained} of {len(turn.token_ids)} tokens trained"] if turn.token_ids else []
        kl = episode.tokens_kl[place] if place < len(episode.tokens_kl) else []
        known = [value for value in kl if value is not None]
        told += [f"KL {sum(known):.3f}"] if known else []
        told += [f"prompt {turn.prompt_tokens}, {turn.cached_tokens} cached"] if turn.prompt_tokens else []
        told += [visible(clipped(turn.finish_reason, 40))] if turn.finish_reason != "stop" else []
        yield ""
        yield ink.paint(" | ".join(told), BOLD)
        yield "    " + ink.paint(indented(visible(clipped(turn.observation, most))), DIM)
        texts = episode.token_texts[place] if place < len(episode.token_texts) else []
        yield "  > " + indented(answer_text(turn, flags, texts, ink, most))
        if turn.action != turn.text.strip():
            yield "  = " + indented(visible(clipped(turn.action, most)))
        notes = ["refused by the environment"] if turn.is_accepted is False else []
        notes += [f"reward {turn.reward:g}"] if turn.reward else []
        if notes:
            yield "    " + ink.paint(", ".join(notes), RED if turn.is_accepted is False else BOLD)
    if episode.final_observation:
        yield "\n    " + ink.paint(indented(visible(clipped(episode.final_observation, most))), DIM)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="run directory, trajectories.jsonl or demonstration file")
    parser.add_argument("--task", default="", help="part of the task id")
    parser.add_argument("--step", type=int)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--outcome")
    parser.add_argument("--number", type=int, default=-1, help="of the matching episodes, from 1; -1 is the last")
    parser.add_argument("--list", action="store_true", help="a line for each matching episode")
    parser.add_argument("--clip", type=int, default=4000, help="characters shown of each text")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    chosen, num_bad = choose(read_episodes(arguments.path), arguments)
    if num_bad:
        print(f"{num_bad} line(s) could not be read", file=sys.stderr)
    if not chosen:
        raise ValueError(f"{arguments.path}: no episode fits; leave out some of --task, --step, --sample, --outcome")
    if arguments.list:
        print("\n".join(f"{number:5d}  {headline(one)}" for number, one in enumerate(chosen, start=1)))
        return 0
    number = arguments.number if arguments.number < 0 else arguments.number - 1
    if not -len(chosen) <= number < len(chosen) or arguments.number == 0:
        raise ValueError(f"--number {arguments.number}: {len(chosen)} episodes fit; give 1 to {len(chosen)}")
    ink = Ink(is_on=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    for line in episode_lines(chosen[number], ink, max(arguments.clip, 1)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        raise SystemExit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
