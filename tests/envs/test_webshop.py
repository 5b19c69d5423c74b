"""WebShop over our server and a small shop of 1,000 products: the buyer buys, pages repeat, servers die and leave nothing.

What ran on WebShop itself is in docs/environments_webshop.md; `tools/check_webshop.py` repeats it where it is installed.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from megatron_tcod.envs.base import EnvironmentFault
from megatron_tcod.envs.http_link import HttpLink
from megatron_tcod.envs.webshop import MAX_ACTION_CHARS, SPLITS, WebShop
from megatron_tcod.envs.webshop_buyer import BUY, Buyer, ShopPage
from megatron_tcod.envs.webshop_process import SERVER, LaunchedShop, ShopOptions, shop_of
from megatron_tcod.trajectory import Task


@pytest.fixture(scope="module")
def goals(small_shop) -> list[Task]:
    return WebShop.tasks("train", count=40, **small_shop)


@pytest.fixture
def own_shop(small_shop):
    """Options that no other test has, hence a server of the test's own, ended with it."""
    options = {**small_shop, "memory_gb": 100.0 + os.urandom(2)[0]}
    shop = shop_of(ShopOptions(**options))
    yield options, shop
    shop.stop()


def replay(task: Task, actions: list[str], options: dict) -> list[tuple[str, float]]:
    episode = WebShop.make(task, **options)
    seen = [(episode.reset(), 0.0)]
    seen += [(step.observation, step.reward) for step in map(episode.step, actions)]
    episode.close()
    return seen


def test_splits_are_the_ranges_of_the_authors_and_share_no_goal(small_shop):
    listed = {split: [task.payload["goal"] for task in WebShop.tasks(split, **small_shop)] for split in SPLITS}
    assert listed == {"test": [*range(500)], "eval": [*range(500, 1500)], "train": [*range(1500, 2000)]}
    assert [task.payload["goal"] for task in WebShop.tasks("eval", first=3, count=2, **small_shop)] == [503, 504]
    with pytest.raises(ValueError, match=r"webshop train has 500 goals of the 2000 .* \[499, 501\)"):
        WebShop.tasks("train", first=499, count=2, **small_shop)


@pytest.mark.parametrize("mistake_rate", [0.0, 0.3])
def test_buyer_earns_1_and_another_server_process_repeats_every_page(small_shop, own_shop, goals, mistake_rate):
    options, shop = own_shop
    demonstrations = [
        WebShop.expert(task, seed=seed, mistake_rate=mistake_rate, **small_shop) for seed, task in enumerate(goals)
    ]
    lengths = [len(one.turns) for one in demonstrations]
    print(f"turns of the buyer at mistake rate {mistake_rate}: mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)}")
    for one in demonstrations:
        seen = replay(one.task, [turn.action for turn in one.turns], options)
        assert [page for page, _ in seen] == [*(turn.observation for turn in one.turns), one.final_observation]
        assert [reward for _, reward in seen] == [0.0] * len(one.turns) + [1.0] and one.success
    assert shop.pid != shop_of(ShopOptions(**small_shop)).pid


def test_wrong_purchase_ends_the_episode_without_success(small_shop, goals):
    wanted = WebShop.expert(goals[0], seed=0, **small_shop)
    other = WebShop.expert(goals[1], seed=0, **small_shop)
    episode = WebShop.make(goals[0], **small_shop)
    episode.reset()
    step = [episode.step(turn.action) for turn in other.turns][-1]
    episode.close()
    assert wanted.success and step.done and step.reward < 1 and step.info["success"] is False


def test_episodes_of_one_goal_at_once_have_baskets_of_their_own_and_are_forgotten(small_shop):
    tasks = WebShop.tasks("train", **small_shop)
    demonstrations = (WebShop.expert(task, seed=0, **small_shop) for task in tasks)
    with_option = next(one for one in demonstrations if len(one.turns) >= 5)
    actions = [turn.action for turn in with_option.turns]
    first, second = (WebShop.make(with_option.task, **small_shop) for _ in range(2))
    first.reset(), second.reset()
    for action in actions[:-1]:
        first.step(action)
    for action in actions[:2]:
        second.step(action)
    bare, full = second.step(actions[-1]), first.step(actions[-1])
    assert full.reward == 1.0 and full.info["success"] and bare.done and bare.reward < 1.0
    link = shop_of(ShopOptions(**small_shop)).link()
    assert link.get("/metadata", deadline_s=10)["num_sessions"] == 2
    first.close(), second.close()
    left = link.get("/metadata", deadline_s=10)
    assert (left["num_episodes"], left["num_sessions"]) == (0, 0)


def test_server_with_other_goals_faults_instead_of_playing_them(small_shop, goals):
    command = [*ShopOptions(**small_shop).command(), "--seed", "1"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        port = json.loads(server.stdout.readline())["port"]
        attached = {"url": f"http://127.0.0.1:{port}"}
        own = WebShop.tasks("train", count=3, **attached)
        assert WebShop.expert(own[0], seed=0, **attached).success
        with pytest.raises(EnvironmentFault, match="goal 1500 of this WebShop is another one than the task's"):
            WebShop.make(goals[0], **attached).reset()
    finally:
        server.stdin.close()
        assert server.wait(10) == 0, "it ends with its standard input"
        server.stdout.close()


def test_error_of_the_shop_is_a_fault_of_that_episode_alone(small_shop, goals):
    broken, whole = (WebShop.make(goals[0], **small_shop) for _ in range(2))
    broken.reset(), whole.reset()
    with pytest.raises(EnvironmentFault, match="WebShop failed: RuntimeError: the index is gone"):
        broken.step("search[raise now]")
    with pytest.raises(EnvironmentFault, match="no episode"):
        broken.step("search[tent]")
    assert whole.step("search[tent]").info["accepted"]
    broken.close(), whole.close()


@pytest.mark.parametrize(
    "command, words", [("search[hang now]", "no answer within 1 s; ended"), ("search[crash now]", "the webshop server ended")]
)
def test_server_that_hangs_or_dies_is_replaced_and_serves_the_same_goals(own_shop, goals, command, words):
    options, shop = own_shop
    before = WebShop.expert(goals[0], seed=0, **options)
    pid = shop.pid
    episode = WebShop.make(goals[0], step_deadline_s=1.0, **options)
    episode.reset()
    with pytest.raises(EnvironmentFault, match=words):
        episode.step(command)
    episode.close()
    assert not psutil.pid_exists(pid)
    assert WebShop.expert(goals[0], seed=0, **options) == before
    assert shop.pid != pid and shop.num_launches == 2


def test_a_launched_server_has_a_memory_cap_and_one_that_needs_more_is_named(small_shop, own_shop):
    options, shop = own_shop
    shop.link()
    assert psutil.Process(shop.pid).rlimit(psutil.RLIMIT_AS) == (int(options["memory_gb"] * 2**30),) * 2
    assert ShopOptions().memory_gb > 0
    starved = LaunchedShop(ShopOptions(**{**small_shop, "memory_gb": 0.03}))
    with pytest.raises(ValueError, match="server ended; its last words: (?s:.*)(emory|new thread).*--memory-gb 0.03"):
        starved.link()


def test_sixteen_buyers_at_once_survive_kills_of_the_server(own_shop, goals):
    options, shop = own_shop
    outcomes = []

    def buy(task: Task) -> None:
        try:
            outcomes.append(WebShop.expert(task, seed=0, **options).success)
        except EnvironmentFault:
            outcomes.append("env_fault")
        if len(outcomes) % 20 == 10 and (pid := shop.pid) and psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(buy, goals * 3))
    print(f"{outcomes.count(True)} bought, {outcomes.count('env_fault')} faults, {shop.num_launches} launches")
    assert len(outcomes) == 3 * len(goals) and set(outcomes) == {True, "env_fault"}
    assert shop.num_launches > 1 and outcomes.count("env_fault") <= 16 * shop.num_launches, "16 a kill at most"
    assert WebShop.expert(goals[0], seed=0, **options).success


def test_server_that_does_not_come_back_ends_the_run_at_the_third_time(small_shop, tmp_path):
    catalogue = tmp_path / "catalogue"
    shutil.copytree(small_shop["data"], catalogue)
    shop = LaunchedShop(ShopOptions(**{**small_shop, "data": str(catalogue)}))
    shop.link()
    os.kill(shop.pid, signal.SIGKILL)
    (catalogue / "items_human_ins.json").unlink()
    kinds = []
    for _ in range(3):
        with pytest.raises((EnvironmentFault, ValueError), match="ended; its last words: .*items_human_ins.json") as caught:
            while True:  # until the kill is noticed
                shop.link()
        kinds.append(caught.type)
    assert kinds == [EnvironmentFault, EnvironmentFault, ValueError]


ORPHAN = """
import json, os, sys, time
from megatron_tcod.envs.webshop import WebShop
from megatron_tcod.envs.webshop_process import ShopOptions, shop_of
options = json.loads(sys.argv[1])
episode = WebShop.make(WebShop.tasks("train", count=1, **options)[0], **options)
episode.reset()
print(shop_of(ShopOptions(**options)).pid, flush=True)
time.sleep(60 if sys.argv[2] == "killed" else 0)
"""


@pytest.mark.parametrize("end", ["killed", "returned"])
def test_server_does_not_outlive_its_parent_whatever_ends_that(small_shop, end):
    script = [sys.executable, "-c", ORPHAN, json.dumps(small_shop), end]
    parent = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    if end == "killed":
        assert os.getpgid(pid) == pid != os.getpgid(parent.pid), "a process group of its own"
        listening = [one.laddr.ip for one in psutil.Process(pid).net_connections() if one.status == psutil.CONN_LISTEN]
        assert listening == ["127.0.0.1"]
        parent.kill()
    parent.wait(30)
    parent.stdout.close()
    for _ in range(100):
        if not psutil.pid_exists(pid):
            break
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_server_answers_bad_requests_with_their_reason(small_shop, goals):
    link = shop_of(ShopOptions(**small_shop)).link()
    bad = [
        ("/reset", {"episode_id": "a", "goal": 2000}, "status 400.*no goal 2000; there are 2000"),
        ("/reset", {"episode_id": "a", "goal": "0"}, "status 400.*no goal '0'"),
        ("/reset", {"episode_id": 7, "goal": 0}, "status 400.*episode_id must be text"),
        ("/step", {"episode_id": "a"}, "status 400.*malformed request: KeyError"),
        ("/step", {"episode_id": "nosuch", "action": {"command": "x"}}, "status 404.*no episode 'nosuch'"),
        ("/step", {"episode_id": "a", "action": {"command": "x" * (1 << 20)}}, "status 413|connection lost"),
        ("/nowhere", {}, "status 404.*no such route"),
    ]
    for path, fields, words in bad:
        with pytest.raises(EnvironmentFault, match=words):
            link.post(path, fields, deadline_s=10)
    episode = WebShop.make(goals[0], **small_shop)
    episode.reset()
    for command in ("search[<r> tent]", "search[<q> tent]", "click[search]", "click[buy now]", "search"):
        step = episode.step(command)
        assert not step.info["accepted"] and not step.done
    assert not episode.step("search[" + "x" * MAX_ACTION_CHARS + "]").info["accepted"]
    episode.close()


def test_observations_show_what_can_be_done_when_asked_to_and_join_texts_in_text_mode(small_shop, goals):
    episode = WebShop.make(goals[0], show_admissible=True, **small_shop)
    assert episode.reset().endswith("\nYou can: search[<words>]")
    results = episode.step("search[tent]")
    assert "\nYou can: click[back to search], click[next >], click[b" in results.observation
    assert results.info["admissible_commands"] == episode.admissible_commands == episode.page.commands
    assert not any("[matte]" in label for label in episode.page.clickables)
    episode.close()
    options = {**small_shop, "observation_mode": "text"}
    task = WebShop.tasks("train", count=1, **options)[0]
    episode = WebShop.make(task, **options)
    assert episode.reset() and " [SEP] " in episode.step("search[tent]").observation
    episode.close()
    shop_of(ShopOptions(**options)).stop()


def test_missing_installation_is_named_with_what_to_do(small_shop, tmp_path, monkeypatch):
    monkeypatch.delenv("WEBSHOP_ROOT", raising=False)
    with pytest.raises(ValueError, match="needs the folder of your WebShop: install it as its README says"):
        WebShop.tasks("train")
    with pytest.raises(ValueError, match="holds no web_agent_site/envs"):
        WebShop.tasks("train", webshop=str(tmp_path))
    with pytest.raises(ValueError, match="python '/no/such/python' cannot be run"):
        WebShop.tasks("train", **{**small_shop, "python": "/no/such/python"})
    with pytest.raises(ValueError, match="the webshop server ended; its last words: .*items_shuffle_1000.json is not there"):
        WebShop.tasks("train", **{**small_shop, "data": str(tmp_path)})
    with pytest.raises(ValueError, match="was not ready within 0 s"):
        WebShop.tasks("train", **small_shop, start_deadline_s=0.0)
    with pytest.raises(ValueError, match="no webshop server at http://127.0.0.1:9: .*no connection"):
        WebShop.tasks("train", url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="url 'ftp://x' is not one of a server"):
        WebShop.tasks("train", url="ftp://x")
    with pytest.raises(ValueError, match="webshop has no observation_mode 'html'"):
        WebShop.tasks("train", observation_mode="html", **small_shop)


def test_server_is_python_3_8_and_needs_nothing_but_webshop():
    tree = ast.parse(SERVER.read_text(), feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"web_agent_site"}


def test_buyer_opens_turns_back_and_chooses_again_after_a_mistake():
    buyer = Buyer(asin="B000000001", name="Tarrow [new] lantern", options=["Olive/Green"])
    search, results = ShopPage(True, ()), ShopPage(False, ("back to search", "next >", "b000000001", "b000000002"))
    product = ShopPage(False, ("back to search", "< prev", "features", BUY, "olive | green", "navy"))
    text = ShopPage(False, ("back to search", "< prev"))

    def after(page: ShopPage, action: str) -> None:
        buyer.observe(page, action, accepted=True)

    assert buyer.act(search) == "search[Tarrow new lantern]"
    after(search, "search[Tarrow new lantern]")
    after(results, "click[b000000002]")
    assert buyer.act(product) == "click[< prev]", "not the product that was asked for"
    after(product, "click[< prev]")
    assert buyer.act(results) == "click[b000000001]"
    after(results, "click[b000000001]")
    after(product, "click[olive | green]")
    after(product, "click[navy]")
    assert buyer.act(product) == "click[olive | green]", "the mistake replaced it"
    after(product, "click[olive | green]")
    after(product, "click[features]")
    assert buyer.act(text) == "click[< prev]"
    after(text, "click[< prev]")
    assert buyer.act(product) == f"click[{BUY}]"


def test_buyer_searches_for_less_only_when_all_pages_of_the_name_are_exhausted():
    buyer = Buyer(asin="B000000001", name="Tarrow handy lantern blue", options=[])
    search, results = ShopPage(True, ()), ShopPage(False, ("back to search", "next >", "b000000002"))
    seen, page = [], search
    for _ in range(2):
        for _ in range(6):
            seen.append(buyer.act(page))
            buyer.observe(page, seen[-1], accepted=True)
            page = search if seen[-1] == "click[back to search]" else results
    assert seen[:6] == ["search[Tarrow handy lantern blue]", *["click[next >]"] * 4, "click[back to search]"]
    assert seen[6:] == ["search[Tarrow handy]", *["click[next >]"] * 4, "click[back to search]"]


def test_launched_shop_may_be_stopped_twice_and_before_it_started(small_shop):
    shop = LaunchedShop(ShopOptions(**small_shop))
    shop.stop()
    assert isinstance(shop.link(), HttpLink)
    shop.stop()
    shop.stop()
    assert shop.pid is None
