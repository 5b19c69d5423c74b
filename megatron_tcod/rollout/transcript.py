"""The conversation of one episode as token ids, and the rows of it that can be trained on.

    transcript = Transcript(tokenizer, history_mode="full", compact_turns=2)
    transcript.observe(0, observation)                          # transcript.ids ends where the actor answers
    transcript.answer_recorded(0, text, action, token_ids=[])   # a teacher's turn, loss mask 0
    transcript.observe(1, observation)
    transcript.answer_sampled(1, completion, action)            # the student's turn, loss mask 1
    rows = transcript.rows()

`full`: one conversation that only grows, one `TokenRow` an episode, teacher turns included as tokens with loss mask 0.
`compact` (the released TCOD code): each student turn is a conversation of its own, with the message of
`compact_observation`, and a row of its own; there is next to nothing for prefix reuse.

Turn ids: what leads to an answer belongs to the answer's turn; the system prompt is -1.
It parses no actions and talks to no environment.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tcod.envs.base import without_commands
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.engine import Completion
from megatron_tcod.trajectory import TokenRow

HISTORY_MODES = ("full", "compact")


def compact_observation(task_text: str, past: Sequence[tuple[str, str]], observation: str, *, num_past: int) -> str:
    """The user message of a `compact` turn: task, last `num_past` observation/action pairs, current observation.

        {task text, which is the first observation}

        Observation 4: {what was seen before turn 4}
        Action 4: {the command of turn 4}
        Observation 5: {what is seen now}

    `past` holds (observation, action) of all turns so far, oldest first; numbers count turns from 1. Observation 1 is not
    repeated under the task text. On the first turn the task text is all there is. (The released code leaves the task out
    of the second prompt; this does not.) Commands that an environment shows are left where they are of use, below the
    current observation.
    """
    if not past:
        return task_text
    lines = [without_commands(task_text), ""]
    for index in range(max(len(past) - num_past, 0), len(past)):
        seen, action = past[index]
        if index > 0:
            lines.append(f"Observation {index + 1}: {without_commands(seen)}")
        lines.append(f"Action {index + 1}: {action}")
    lines.append(f"Observation {len(past) + 1}: {observation}")
    return "\n".join(lines)


class Transcript:
    """See the module docstring."""

    def __init__(self, tokenizer: TurnTokenizer, *, history_mode: str, compact_turns: int) -> None:
        assert history_mode in HISTORY_MODES, history_mode
        self.ids: list[int] = []
        """The conversation so far; before an answer it is the prompt."""
        self._tokenizer, self._compact_turns = tokenizer, compact_turns
        self._is_compact = history_mode == "compact"
        self._turn_ids: list[int] = []
        self._loss_mask: list[int] = []
        self._logprobs: list[float] = []
        self._num_answered = 0  # length of the conversation up to and with the newest sampled answer
        self._task_text = self._observation = ""
        self._past: list[tuple[str, str]] = []
        self._last_finish = ("stop", -1)  # finish reason and last id of the newest answer
        self._compact_rows: list[TokenRow] = []

    def observe(self, turn: int, observation: str) -> None:
        """Extend the conversation, or in `compact` history begin one, to where the actor of `turn` answers."""
        if turn == 0:
            self._task_text = observation
        self._observation = observation
        if self._is_compact:
            self._restart(turn, compact_observation(self._task_text, self._past, observation, num_past=self._compact_turns))
        elif turn == 0:
            self._restart(turn, observation)
        else:
            reason, last_id = self._last_finish
            self._append(self._tokenizer.bridge(reason, observation, last_id=last_id), turn, mask=0)

    def answer_recorded(self, turn: int, text: str, action: str, token_ids: list[int]) -> list[int]:
        """Enter a recorded answer; returns its ids, end of turn included."""
        ids = self._tokenizer.recorded_answer(text, token_ids)
        self._append(ids, turn, mask=0)
        self._last_finish = ("stop", ids[-1])
        self._past.append((self._observation, action))
        return ids

    def answer_sampled(self, turn: int, completion: Completion, action: str) -> None:
        """Enter what the student sampled, as it is."""
        assert completion.token_ids, "a completion holds at least one token"
        self._append(completion.token_ids, turn, mask=1)
        self._logprobs += completion.logprobs
        self._num_answered = len(self.ids)
        self._last_finish = (completion.finish_reason, completion.token_ids[-1])
        self._past.append((self._observation, action))
        if self._is_compact:
            self._compact_rows.append(self._row())

    def rows(self) -> list[TokenRow]:
        """The rows to train on; none where the student never answered."""
        if self._is_compact:
            return self._compact_rows
        return [self._row()] if self._num_answered else []

    def _row(self) -> TokenRow:
        """The conversation up to the newest sampled answer: what comes after it trains nothing."""
        end = self._num_answered
        return TokenRow(
            token_ids=self.ids[:end],
            turn_ids=self._turn_ids[:end],
            loss_mask=self._loss_mask[:end],
            logprobs=list(self._logprobs),
        )

    def _restart(self, turn: int, message: str) -> None:
        self.ids, self._turn_ids, self._loss_mask, self._logprobs = [], [], [], []
        prompt, num_system = self._tokenizer.prompt(message), self._tokenizer.num_system_tokens
        self._append(prompt[:num_system], -1, mask=0)
        self._append(prompt[num_system:], turn, mask=0)

    def _append(self, ids: list[int], turn: int, *, mask: int) -> None:
        self.ids += ids
        self._turn_ids += [turn] * len(ids)
        self._loss_mask += [mask] * len(ids)
