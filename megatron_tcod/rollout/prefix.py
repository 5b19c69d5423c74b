"""Prefix reuse, planned and counted: what to compute once, in which order to ask, and what that saved.

    groups = plan_prefixes(prompts, budget=200_000, room=512, worth=32)    # prompts of the step, as token ids
    for group in groups:
        await engine.prewarm(group.prefixes)                  # right after the weight update: every cached KV is gone
        await asyncio.gather(*(ask(prompts[i]) for i in group.members))
    reuse = ledger.take()                                     # reuse.reusable_tokens == reused + recomputed

The prompts of a step form a forest over token ids: samples of a task are equal, tasks share a system prompt, and the B2F
prefixes of one demonstration nest. A server shares only what an EARLIER pass computed, so requests that arrive
together each compute what they have in common. Hence `plan_prefixes` names what several prompts share, for `warm_waves`
to compute first, each token once; every request is left with the tokens that no other has.

Order. Groups follow the forest depth first (sorted token ids are that). In this order, when the cache holds the longest
path, no token that a later prompt needs is ever the least recently used one: what the next prompt shares with those
before it, it shares with the one just asked, which touched it (arXiv 2312.07104, section 3). A group is what fits `budget` at
once, so within it requests may run in any order.

Next step. The schedule is known, so a step's prefixes are known before it begins: `step_prefixes(step + 1, ...)` builds them
from demonstrations alone, for a teacher's server to compute while the student trains.

Counting. `PrefixLedger` plays an unbounded cache beside the real one, with the same flushes: a prompt enters it when it is
submitted, with what was sampled, but for the last token, when it is answered. `reusable` are the tokens that this cache
would have served; `reused` are those of them that the real one served; `recomputed` is the difference, lost to
eviction, to requests that came together, or to a cache that was not asked. Both engines keep one.

It talks to no server and computes no KV.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from megatron_tcod.curriculum import Curriculum
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.engine import Completion, Sampling
from megatron_tcod.rollout.radix import Node, RadixTree, common_length
from megatron_tcod.rollout.transcript import Transcript
from megatron_tcod.trajectory import Demonstration, Task


@dataclass(frozen=True, kw_only=True)
class PrefixGroup:
    """Prompts that are resident together.

    Example: `PrefixGroup(members=[2, 0, 1], prefixes=[[5, 6, 7]], num_tokens=16)`
    """

    members: list[int]
    """Indices of the prompts, in the order to ask."""
    prefixes: list[list[int]]
    """What to warm before they are asked; none is a prefix of another."""
    num_tokens: int
    """Different tokens of all members, and the room that each needs beyond its prompt."""


def plan_prefixes(
    prompts: Sequence[Sequence[int] | np.ndarray], *, budget: int | None = None, room: int = 0, worth: int = 1
) -> list[PrefixGroup]:
    """Groups of at most `budget` tokens in depth-first order; a prompt that exceeds it alone is a group of its own.

    `room`: tokens that answering a prompt adds. `worth`: a prefix is warmed where that saves at least so many tokens, its
    users but one times what it adds to the prefix above it; with 1, whatever two prompts of a group share.
    """
    if worth < 1 or room < 0:
        raise ValueError(f"need worth >= 1 and room >= 0, got {worth} and {room}")
    arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (arrays[index].astype(">i8").tobytes(), index))  # as numbers sort
    groups: list[PrefixGroup] = []
    members: list[int] = []
    total = 0

    def close() -> None:
        before = arrays[groups[-1].members[-1]] if groups else arrays[0][:0]  # what it shares with these is resident
        prefixes = [p for p in _shared_prefixes([arrays[i] for i in members], worth) if common_length(p, before) < len(p)]
        groups.append(PrefixGroup(members=members, prefixes=[p.tolist() for p in prefixes], num_tokens=total))

    for index in order:
        shared = common_length(arrays[index], arrays[members[-1]]) if members else 0
        added = len(arrays[index]) - shared + room
        if members and budget is not None and total + added > budget:
            close()
            members, total, added = [], 0, len(arrays[index]) + room
        members.append(index)
        total += added
    if members:
        close()
    return groups


def warm_waves(prefixes: Sequence[Sequence[int]], *, least: int = 1) -> list[list[list[int]]]:
    """Requests to make together, wave after wave, so that each token of `prefixes` is computed once.

    A prefix of another one is left to it. The first of those that share tokens computes them and the others come a
    wave later; runs of fewer than `least` tokens are computed again instead. There are as many waves as the forest has
    branchings on one path, plus one.
    """
    ordered = sorted({tuple(prefix) for prefix in prefixes if len(prefix)})
    waves: list[list[list[int]]] = []
    path: list[tuple[int, int]] = []  # (end, wave) of the runs that make up the previous prefix
    previous: tuple[int, ...] = ()
    for index, prefix in enumerate(ordered):
        follower = ordered[index + 1] if index + 1 < len(ordered) else ()
        if follower[: len(prefix)] == prefix:
            continue
        shared = common_length(np.asarray(prefix, np.int64), np.asarray(previous, np.int64))
        wave = 0
        if shared >= least:
            held = next(position for position, (end, _) in enumerate(path) if end >= shared)
            wave = path[held][1] + 1
            path = [*path[:held], (shared, path[held][1]), (len(prefix), wave)]
        else:
            path = [(len(prefix), wave)]
        if wave == len(waves):
            waves.append([])
        waves[wave].append(list(prefix))
        previous = prefix
    return waves


def replayed_prefix(
    demonstration: Demonstration,
    start: int,
    tokenizer: TurnTokenizer,
    *,
    history_mode: str = "full",
    compact_turns: int = 2,
) -> list[int]:
    """The prompt at which the student takes over at turn `start`, when replay shows what was recorded.

    Where an observation was not recorded (action-only files) it ends before that turn, in `compact` history it is empty.
    """
    transcript = Transcript(tokenizer, history_mode=history_mode, compact_turns=compact_turns)
    recorded = [*(turn.observation for turn in demonstration.turns), demonstration.final_observation]
    for turn in range(start + 1):
        if not recorded[turn]:
            return transcript.ids if history_mode == "full" else []
        transcript.observe(turn, recorded[turn])
        if turn < start:
            answer = demonstration.turns[turn]
            transcript.answer_recorded(turn, answer.text, answer.action, answer.token_ids)
    return transcript.ids


def step_prefixes(
    step: int,
    tasks: Sequence[Task],
    *,
    curriculum: Curriculum,
    demonstrations: Mapping[str, Demonstration],
    tokenizer: TurnTokenizer,
    history_mode: str = "full",
    compact_turns: int = 2,
) -> list[list[int]]:
    """The different first prompts of a step, in the order of `tasks`, as far as demonstrations tell them."""
    prefixes: dict[tuple[int, ...], None] = {}
    for task in tasks:
        demonstration = demonstrations.get(task.task_id)
        start = curriculum.window(step, task).start
        if demonstration is not None and start <= len(demonstration.turns):
            ids = replayed_prefix(
                demonstration, start, tokenizer, history_mode=history_mode, compact_turns=compact_turns
            )
            prefixes[tuple(ids)] = None
    return [list(prefix) for prefix in prefixes if prefix]


@dataclass(frozen=True, kw_only=True)
class PrefixReuse:
    """What a cache did with the prompts of a step; the module docstring defines the counts. Warm-ups are not requests.

    Example: `PrefixReuse(requests=8, prompt_tokens=4096, reusable_tokens=4088, reused_tokens=4088, warmed_tokens=512)`
    """

    requests: int = 0
    prompt_tokens: int = 0
    reusable_tokens: int = 0
    reused_tokens: int = 0
    warmed_tokens: int = 0
    """Computed by requests that asked for neither tokens nor log-probabilities."""

    @property
    def recomputed_tokens(self) -> int:
        """Served by an unbounded cache, computed by this one."""
        return self.reusable_tokens - self.reused_tokens

    @property
    def rate(self) -> float:
        """Reused share of what was reusable; 1 where nothing was."""
        return self.reused_tokens / self.reusable_tokens if self.reusable_tokens else 1.0

    def __add__(self, other: PrefixReuse) -> PrefixReuse:
        return PrefixReuse(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Submitted:
    """A request between submission and answer. Example: `Submitted(prompt, reusable=96, is_warmup=False)`"""

    prompt: np.ndarray  # [N] int64
    reusable: int
    is_warmup: bool


class PrefixLedger:
    """An unbounded cache of the prompts and answers since the last flush, without their KV; see the module docstring.

        asked = ledger.submit(prompt, sampling)
        completion = ...
        ledger.finish(asked, completion)

    A request that fails is not finished and not counted. It holds `limit` tokens of 8 bytes at most, and then forgets those
    that were used longest ago. Counts may be taken while another thread submits and finishes.
    """

    def __init__(self, *, limit: int = 1 << 26) -> None:
        self._tree, self._limit = RadixTree(), limit
        self._counts, self._counting = PrefixReuse(), threading.Lock()

    def submit(self, prompt: Sequence[int] | np.ndarray, sampling: Sampling) -> Submitted:
        """A request may reuse all but its last token, and nothing from `logprob_start_len` on."""
        ids = np.asarray(prompt, dtype=np.int64)  # [N]
        start = sampling.logprob_start_len
        limit = len(ids) - 1 if start < 0 else min(start, len(ids) - 1)
        reusable = min(self._tree.match(ids).length, limit)
        self._enter(ids)
        return Submitted(ids, reusable, is_warmup=sampling.max_new_tokens == 0 and start < 0)

    def finish(self, asked: Submitted, completion: Completion) -> None:
        """Count an answered request."""
        if len(completion.token_ids) > 1:
            self._enter(np.concatenate([asked.prompt, np.asarray(completion.token_ids[:-1], np.int64)]))
        if asked.is_warmup:
            counts = PrefixReuse(warmed_tokens=completion.prompt_tokens - completion.cached_tokens)
        else:
            counts = PrefixReuse(
                requests=1,
                prompt_tokens=completion.prompt_tokens,
                reusable_tokens=asked.reusable,
                reused_tokens=min(completion.cached_tokens, asked.reusable),
            )
        with self._counting:
            self._counts += counts

    def flush(self) -> None:
        """The cache lost everything: new weights, or a server that was asked to. Counts stay."""
        self._tree.flush()

    def take(self) -> PrefixReuse:
        """Counts since the last call."""
        with self._counting:
            counts, self._counts = self._counts, PrefixReuse()
        return counts

    def _enter(self, ids: np.ndarray) -> None:
        self._tree.insert(ids, _no_kv)
        if self._tree.num_tokens > self._limit:
            self._tree.evict(self._tree.num_tokens - self._limit // 2)


class _NoKV:
    """The segment of a tree that holds ids alone."""

    def segment(self, start: int, stop: int) -> _NoKV:
        return self


_NO_KV = _NoKV()


def _no_kv(start: int, stop: int) -> _NoKV:
    return _NO_KV


def _shared_prefixes(prompts: Sequence[np.ndarray], worth: int) -> list[np.ndarray]:
    """The longest prefixes [n] that several of `prompts` have and that are worth a request, by token ids."""
    tree = RadixTree()
    ends = [tree.insert(prompt, _no_kv) for prompt in prompts]
    num_users: Counter[Node] = Counter(ends)
    is_above: set[Node] = {tree.root}  # has a warmed prefix below it
    leaves: list[Node] = []
    for node in reversed(list(tree.nodes())):  # children before parents
        num_users[node.parent] += num_users[node]
        is_worth = (num_users[node] - 1) * len(node.tokens) >= worth
        if node not in is_above and is_worth:
            leaves.append(node)
        if node in is_above or is_worth:
            is_above.add(node.parent)
    return sorted((_path(leaf) for leaf in leaves), key=lambda ids: ids.tolist())


def _path(node: Node) -> np.ndarray:
    """The token ids from the root to a node."""
    runs = []
    while node.parent is not None:
        runs.append(node.tokens)
        node = node.parent
    return np.concatenate(runs[::-1])
