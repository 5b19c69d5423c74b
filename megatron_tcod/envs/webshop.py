"""The family `webshop`: the web shop of Yao et al. (arXiv 2207.01206), played in your own installation of it.

    env_options = {webshop = "/data/WebShop", python = "/data/webshop-env/bin/python"}     # launches a server
    env_options = {url = "http://127.0.0.1:8970"}                                          # attaches to one

    tasks = WebShop.tasks("test", count=10, url="http://127.0.0.1:8970")
    episode = WebShop.make(tasks[0], url="http://127.0.0.1:8970")
    print(episode.reset(), episode.admissible_commands)

Actions are WebShop's: `search[words]` and `click[label]`, among them an option's value and `click[buy now]`, which ends the
episode with a reward in [0, 1]; success is a reward of 1. Observations are WebShop's own texts, which state the
instruction on every page. A task is the number of a goal with a digest of its instruction: a server whose goals are others
faults instead of playing something else. Splits are those of WebShop's authors.

`webshop_server.py` is the server, `webshop_process.py` launches it, `webshop_buyer.py` is the expert; `docs/
environments_webshop.md` says what was run. It contains nothing of WebShop and does not download or index catalogues.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from uuid import uuid4

from megatron_tcod.envs.base import EnvironmentFault, Step
from megatron_tcod.envs.http_link import HttpLink
from megatron_tcod.envs.mistakes import Mistakes
from megatron_tcod.envs.webshop_buyer import BUY, Buyer, ShopPage
from megatron_tcod.envs.webshop_process import Shop, ShopOptions, shop_of
from megatron_tcod.trajectory import Demonstration, DemonstrationTurn, Task

SPLITS = {"test": (0, 500), "eval": (500, 1500), "train": (1500, None)}
"""Ranges of goals, as in the baselines of WebShop's authors."""

GOALS_A_PAGE = 5000
LIST_DEADLINE_S = 120.0
CLOSE_DEADLINE_S = 5.0
FULL_REWARD = 1.0 - 1e-9
"""A reward is a quotient of small integers, so 1 is exact but for rounding."""

MAX_ACTION_CHARS = 1000
"""Longer actions are refused unsent."""

MAX_EXPERT_TURNS = 60


class WebShop:
    """WebShop's text environment, over HTTP."""

    blocking = True

    @classmethod
    def require(cls) -> None:
        """Nothing here: WebShop lives in a Python of its own, and `tasks` says where it is not found."""

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        count: int | None = None,
        first: int = 0,
        url: str = ShopOptions.url,
        webshop: str = ShopOptions.webshop,
        python: str = ShopOptions.python,
        data: str = ShopOptions.data,
        num_products: int = ShopOptions.num_products,
        human_goals: bool = ShopOptions.human_goals,
        observation_mode: str = ShopOptions.observation_mode,
        memory_gb: float = ShopOptions.memory_gb,
        start_deadline_s: float = ShopOptions.start_deadline_s,
        reset_deadline_s: float = ShopOptions.reset_deadline_s,
        step_deadline_s: float = ShopOptions.step_deadline_s,
        show_admissible: bool = ShopOptions.show_admissible,
    ) -> list[Task]:
        """Goals `[first, first + count)` of a split, or all. `ShopOptions` explains the options.

        ValueError: an unknown split, more goals than the split has, no WebShop, or a server that does not answer.
        """
        if split not in SPLITS:
            raise ValueError(f"webshop has no split {split!r}; use one of {', '.join(SPLITS)}")
        options = ShopOptions(
            url=url,
            webshop=webshop,
            python=python,
            data=data,
            num_products=num_products,
            human_goals=human_goals,
            observation_mode=observation_mode,
            memory_gb=memory_gb,
            start_deadline_s=start_deadline_s,
            reset_deadline_s=reset_deadline_s,
            step_deadline_s=step_deadline_s,
            show_admissible=show_admissible,
        )
        return list_goals(shop_of(options).link(), split, first=first, count=count)

    @classmethod
    def make(cls, task: Task, **options: Any) -> WebShopEpisode:
        """A fresh episode; the server hears of it with `reset`. ValueError for a task of another environment."""
        goal, digest = task.payload.get("goal"), task.payload.get("digest")
        if task.env != "webshop" or type(goal) is not int or not isinstance(digest, str):
            raise ValueError(
                f"not a webshop task: env {task.env!r}, payload {task.payload!r}; expected 'goal' and 'digest'"
            )
        return WebShopEpisode(goal, digest, ShopOptions(**options))

    @staticmethod
    def normalise(observation: str) -> str:
        """White space collapsed. Pages repeat to the letter."""
        return " ".join(observation.split())

    @classmethod
    def expert(
        cls,
        task: Task,
        *,
        seed: int,
        mistake_rate: float = 0.0,
        max_turns: int = MAX_EXPERT_TURNS,
        **options: Any,
    ) -> Demonstration:
        """The buyer's demonstration (`webshop_buyer.py`); its mistakes are clicks on anything but Buy Now, or searches
        for a single word."""
        mistakes = Mistakes(seed=seed, rate=mistake_rate)
        episode = cls.make(task, **options)
        turns: list[DemonstrationTurn] = []
        try:
            step = Step(episode.reset())
            buyer = Buyer(**episode.oracle())
            while not step.done and len(turns) < max_turns:
                page = episode.page
                is_mistake = mistakes.strikes()
                action = wrong_action(page, mistakes, step.observation) if is_mistake else buyer.act(page)
                turns.append(
                    DemonstrationTurn(
                        observation=step.observation, action=action, text=action, is_trained=not is_mistake
                    )
                )
                step = episode.step(action)
                buyer.observe(page, action, accepted=step.info["accepted"])
        finally:
            episode.close()
        return Demonstration(
            task=task,
            turns=turns,
            success=bool(step.info.get("success")),
            source="expert",
            final_observation=step.observation,
        )


class WebShopEpisode:
    """One purchase. `page` is what can be done now, `admissible_commands` the same as text."""

    def __init__(self, goal: int, digest: str, options: ShopOptions) -> None:
        self.page = ShopPage()
        self._goal, self._digest, self._options = goal, digest, options
        self._episode = {"episode_id": uuid4().hex}
        self._shop: Shop | None = None
        self._link: HttpLink | None = None
        self._has_started = self._is_done = False
        self._observation = ""

    @property
    def admissible_commands(self) -> list[str]:
        return self.page.commands

    def reset(self) -> str:
        assert not self._has_started, "an episode is used once: make a new one"
        self._has_started = True
        self._shop = shop_of(self._options)
        self._link = self._shop.link()
        answer = self._post("/reset", {"goal": self._goal}, self._options.reset_deadline_s)
        self._check_goal(answer)
        return self._read(answer).observation

    def step(self, action: str) -> Step:
        assert self._link is not None and not self._is_done, "step needs reset() first and ends with done or close()"
        if len(action) > MAX_ACTION_CHARS:
            return Step(self._observation, info=self._info(accepted=False, success=False))
        command = action.encode(errors="replace").decode()  # half of a surrogate pair is no text for a search
        answer = self._post("/step", {"action": {"command": command}}, self._options.step_deadline_s)
        return self._read(answer)

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            with suppress(EnvironmentFault):  # a server that is gone holds nothing
                link.post("/close", self._episode, deadline_s=CLOSE_DEADLINE_S)

    def oracle(self) -> dict[str, Any]:
        """The product that the goal was written for: what `Buyer` takes."""
        answer = self._call(lambda: self._link.get(f"/oracle?goal={self._goal}", deadline_s=LIST_DEADLINE_S))
        return {name: answer[name] for name in ("asin", "name", "options")}

    def _post(self, path: str, fields: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        return self._call(lambda: self._link.post(path, {**self._episode, **fields}, deadline_s=deadline_s))

    def _call(self, exchange: Any) -> dict[str, Any]:
        try:
            return exchange()
        except EnvironmentFault as fault:
            raise self._shop.explain(fault, self._link) from fault

    def _check_goal(self, answer: dict[str, Any]) -> None:
        seen = answer.get("observation", {}).get("digest")
        if seen != self._digest:
            raise EnvironmentFault(
                f"goal {self._goal} of this WebShop is another one than the task's (digest {seen}, expected "
                f"{self._digest}): its catalogue, kind of goals or seed changed since the tasks were listed"
            )

    def _read(self, answer: dict[str, Any]) -> Step:
        """The step that the server's answer stands for; `EnvironmentFault` where it stands for none."""
        try:
            seen, reward, self._is_done = answer["observation"], float(answer["reward"]), answer["done"] is True
            self.page = ShopPage(bool(seen["has_search_bar"]), tuple(seen["clickables"]))
            self._observation, accepted = seen["text"].strip(), bool(seen["accepted"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EnvironmentFault(f"a malformed answer of the webshop server: {error!r} in {answer!r:.500}") from error
        if self._options.show_admissible and not self._is_done:
            self._observation += f"\nYou can: {', '.join(self.admissible_commands)}"
        success = self._is_done and reward >= FULL_REWARD
        return Step(self._observation, reward=reward, done=self._is_done, info=self._info(accepted, success))

    def _info(self, accepted: bool, success: bool) -> dict[str, Any]:
        return {"accepted": accepted, "success": success, "admissible_commands": self.admissible_commands}


def list_goals(link: HttpLink, split: str, *, first: int, count: int | None) -> list[Task]:
    """The tasks of a split, from the goals that the server has."""
    try:
        num_goals = link.get("/metadata", deadline_s=LIST_DEADLINE_S)["num_goals"]
        start, stop = SPLITS[split]
        num_tasks = max(0, min(stop or num_goals, num_goals) - start)
        if num_tasks == 0 or first < 0 or (count is not None and first + count > num_tasks):
            raise ValueError(
                f"webshop {split} has {num_tasks} goals of the {num_goals} that this catalogue has, "
                f"[{first}, {first + (count or 1)}) were asked for; ask for fewer, or serve more products"
            )
        wanted = range(start + first, start + (num_tasks if count is None else first + count))
        goals: list[dict[str, str]] = []
        for page in range(wanted.start, wanted.stop, GOALS_A_PAGE):
            path = f"/goals?start={page}&stop={min(page + GOALS_A_PAGE, wanted.stop)}"
            goals += link.get(path, deadline_s=LIST_DEADLINE_S)["goals"]
    except (EnvironmentFault, KeyError) as error:
        raise ValueError(
            f"no webshop server at {link.url}: {error}; start megatron_tcod/envs/webshop_server.py there"
        ) from error
    return [
        Task(
            env="webshop",
            task_id=f"goal/{index}",
            split=split,
            family=goal["category"] or "webshop",
            payload={"goal": index, "digest": goal["digest"]},
        )
        for index, goal in zip(wanted, goals, strict=True)
    ]


def wrong_action(page: ShopPage, mistakes: Mistakes, observation: str) -> str:
    """A random click that can be taken back, or where nothing can be clicked a search for one word of the page."""
    labels = [label for label in page.clickables if label != BUY]
    if labels:
        return f"click[{mistakes.choose(labels)}]"
    words = [word for word in observation.split() if word.isalpha()]
    return f"search[{mistakes.choose(words)}]"
