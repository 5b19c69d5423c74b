"""Playing ahead: which steps run when, how old their weights may be, and what happens at the end."""

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest

from megatron_tcod.rollout.ahead import CollectAhead

STOP = 12


class Plays:
    """Steps that end when they are told to; notes the version at which each began."""

    def __init__(self) -> None:
        self.version = 0
        self.began_at: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.may_end = threading.Event()

    def __call__(self, step: int):
        self.began_at[step] = self.version
        return self._play(step)

    async def _play(self, step: int) -> tuple[int, int]:
        try:
            while not self.may_end.is_set():
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled.append(step)
            raise
        return step, self.began_at[step]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_every_step_is_played_once_and_begins_exactly_the_allowed_number_of_versions_behind(max_staleness):
    plays = Plays()
    plays.may_end.set()
    ahead = CollectAhead(plays, max_staleness=max_staleness, stop=STOP)
    for step in range(STOP):
        plays.version = step
        taken, began_at = ahead.take(step)
        assert taken == step and began_at == max(step - max_staleness, 0)
        assert max(plays.began_at) <= step + max_staleness
    ahead.close()
    assert sorted(plays.began_at) == list(range(STOP))


def test_steps_play_while_others_train_and_a_slow_one_makes_the_trainer_wait():
    plays = Plays()
    ahead = CollectAhead(plays, max_staleness=2, stop=STOP)
    taker = threading.Thread(target=ahead.take, args=(0,))
    taker.start()
    taker.join(0.1)
    assert taker.is_alive() and sorted(plays.began_at) == [0, 1, 2]  # all at once, and nothing beyond the bound
    plays.may_end.set()
    taker.join(10)
    assert not taker.is_alive()
    ahead.close()


def test_who_waits_for_a_step_goes_when_the_run_is_to_stop():
    plays, told = Plays(), threading.Event()
    ahead = CollectAhead(plays, max_staleness=1, stop=STOP)
    threading.Timer(0.3, told.set).start()
    assert ahead.take(0, is_stopping=told.is_set) is None and told.is_set()
    ahead.close()
    assert sorted(plays.cancelled) == [0, 1]


def test_an_error_reaches_the_step_that_it_belongs_to():
    async def play(step):
        if step == 2:
            raise ValueError("step two")
        return step

    ahead = CollectAhead(play, max_staleness=2, stop=STOP)
    assert (ahead.take(0), ahead.take(1)) == (0, 1)
    with pytest.raises(ValueError, match="step two"):
        ahead.take(2)
    assert ahead.take(3) == 3
    ahead.close()


def test_closing_cancels_what_is_under_way_and_may_be_repeated():
    plays = Plays()
    ahead = CollectAhead(plays, max_staleness=1, stop=STOP)
    errors = []

    def take():
        try:
            ahead.take(0)
        except CancelledError as error:
            errors.append(error)

    taker = threading.Thread(target=take)
    taker.start()
    while len(plays.began_at) < 2:
        taker.join(0.01)
    ahead.close()
    ahead.close()
    taker.join(10)
    assert sorted(plays.cancelled) == [0, 1] and len(errors) == 1
