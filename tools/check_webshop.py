"""Check a WebShop installation: the buyer plays goals, and another server process repeats what it saw.

    python tools/check_webshop.py --webshop /data/WebShop --python /data/webshop-env/bin/python
    python tools/check_webshop.py --webshop ... --python ... --data catalogue        # of make_webshop_catalogue.py

For each split it prints how many goals the buyer bought with a reward of 1, its turns, and the time of a step; then how
many of the episodes repeat to the letter in a second server, and what 16 episodes at a time get through. It exits with 1
where a replay differs, or where the buyer earned less than `--least-reward` on the mean.

On real data the buyer does not always earn 1: the attributes of a goal need not be in the texts of its own product.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from megatron_tcod.envs.webshop import SPLITS, WebShop
from megatron_tcod.envs.webshop_process import ShopOptions, launched_shop, shop_of
from megatron_tcod.trajectory import Demonstration, Task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("webshop", "python", "data"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--num-products", type=int, default=1000)
    parser.add_argument("--goals", type=int, default=50, help="of each split")
    parser.add_argument("--mistake-rate", type=float, default=0.0)
    parser.add_argument("--least-reward", type=float, default=1.0)
    parser.add_argument("--concurrent", type=int, default=16)
    settings = parser.parse_args()
    options = {name: getattr(settings, name) for name in ("webshop", "python", "data", "num_products")}
    is_good = True
    recorded: list[Demonstration] = []
    for split in SPLITS:
        tasks = WebShop.tasks(split, count=settings.goals, **options)
        start = time.monotonic()
        played = [
            WebShop.expert(task, seed=number, mistake_rate=settings.mistake_rate, **options)
            for number, task in enumerate(tasks)
        ]
        num_steps = sum(len(one.turns) for one in played)
        rewards = [replay(one, options)[1] for one in played]
        step_ms = 1000 * (time.monotonic() - start) / (2 * num_steps)
        print(
            f"{split}: buyer's reward 1 in {sum(one.success for one in played)} of {len(played)} goals, "
            f"mean {statistics.mean(rewards):.3f}; turns mean {num_steps / len(played):.1f}, "
            f"max {max(len(one.turns) for one in played)}; {step_ms:.0f} ms a step"
        )
        is_good &= statistics.mean(rewards) >= settings.least_reward
        recorded += played
    shop = shop_of(ShopOptions(**options))
    first_pid = shop.pid
    launched_shop.cache_clear()
    equal = sum(replay(one, options)[0] for one in recorded)
    second = shop_of(ShopOptions(**options))
    print(f"another server process (pid {first_pid}, then {second.pid}): {equal} of {len(recorded)} episodes repeat")
    start = time.monotonic()
    with ThreadPoolExecutor(settings.concurrent) as threads:
        together = list(threads.map(lambda one: replay(one, options)[0], recorded))
    speed = sum(len(one.turns) for one in recorded) / (time.monotonic() - start)
    print(f"{settings.concurrent} at a time: {sum(together)} of {len(recorded)} episodes repeat, {speed:.0f} steps a second")
    shop.stop()
    second.stop()
    return 0 if is_good and equal == len(recorded) == sum(together) else 1


def replay(one: Demonstration, options: dict[str, object]) -> tuple[bool, float]:
    """Whether an episode repeats to the letter, and its reward."""
    episode = WebShop.make(Task(**vars(one.task)), **options)
    seen, reward = [episode.reset()], 0.0
    for turn in one.turns:
        step = episode.step(turn.action)
        seen.append(step.observation)
        reward = step.reward
    episode.close()
    return seen == [*(turn.observation for turn in one.turns), one.final_observation], reward


if __name__ == "__main__":
    sys.exit(main())
