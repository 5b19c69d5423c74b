"""How much may go wrong in the episodes of a step before the run is stopped.

    check_outcomes(episodes, max_diverged=0.2, max_env_faults=0.5)

Every episode has one outcome, and all are counted in the metrics; an episode that is not `ok` trains nothing. That is
meant for single ones: a demonstration file made with other games, or an environment that never comes up, would let a run
train on what little is left. Both limits are shares of a step; 1 lets everything pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_tcod.trajectory import ENV_FAULTS, Episode


def check_outcomes(episodes: Sequence[Episode], *, max_diverged: float, max_env_faults: float) -> None:
    """ValueError when too large a share of the replays diverged or was refused, or of the environments broke; it tells
    the first of them."""
    replays = [episode for episode in episodes if episode.window.start and episode.outcome != "no_demonstration"]
    _limit(replays, ("diverged", "rejected_action"), max_diverged, "max_diverged", "replays differ from what was recorded")
    _limit(episodes, ENV_FAULTS, max_env_faults, "max_env_faults", "environments broke")


def _limit(episodes: Sequence[Episode], outcomes: Sequence[str], share: float, name: str, what: str) -> None:
    counted = [episode for episode in episodes if episode.outcome in outcomes]
    if not counted or len(counted) <= share * len(episodes):
        return
    first, counts = counted[0], dict(Counter(episode.outcome for episode in counted))
    raise ValueError(
        f"step {first.step}: {len(counted)} of {len(episodes)} {what} {counts}, more than {name} {share} allows; the first, "
        f"{first.task.task_id}: {first.detail[:2000]}; mend the environment or its demonstrations, or raise {name}"
    )
