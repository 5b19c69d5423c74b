"""Recorded turns as a training row: what supervised fine-tuning imitates.

    episode = demonstration_episode(demonstration, tokenizer, step=3)

The row is the conversation that `episodes.py` would have had, with the loss on the recorded answers marked
`is_trained`. It has no sampling log-probabilities: those are NaN, so that an objective that needs them shows it.
"""

from __future__ import annotations

import math

from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.trajectory import Demonstration, Episode, TokenRow, TurnWindow


def demonstration_episode(
    demonstration: Demonstration, tokenizer: TurnTokenizer, *, step: int, max_turns: int
) -> Episode:
    """One row over the first `max_turns` turns of a demonstration: an episode has no more."""
    turns = demonstration.turns[:max_turns]
    token_ids: list[int] = []
    turn_ids: list[int] = []
    loss_mask: list[int] = []
    for index, turn in enumerate(turns):
        if index == 0:
            asked = tokenizer.prompt(turn.observation)
            turn_ids += [-1] * tokenizer.num_system_tokens
            turn_ids += [0] * (len(asked) - tokenizer.num_system_tokens)
        else:
            asked = tokenizer.bridge("stop", turn.observation)
            turn_ids += [index] * len(asked)
        answer = tokenizer.recorded_answer(turn.text, turn.token_ids)
        token_ids += asked + answer
        turn_ids += [index] * len(answer)
        loss_mask += [0] * len(asked) + [int(turn.is_trained)] * len(answer)
    row = TokenRow(
        token_ids=token_ids, turn_ids=turn_ids, loss_mask=loss_mask, logprobs=[math.nan] * sum(loss_mask)
    )
    return Episode(
        task=demonstration.task,
        sample=0,
        step=step,
        weight_version=step,
        curriculum_k=len(turns),
        window=TurnWindow(0, len(turns)),
        turns=[],
        rows=[row],
        outcome="ok",
        end_reason="done",
        success=demonstration.success,
        reward=float(demonstration.success),
    )
