import base64
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from megatron_tcod.journal import Journal, read_journal
from megatron_tcod.metrics import JsonlWriter, StepMetrics, scores_by_turn, trajectory_record
from megatron_tcod.report import build_report
from megatron_tcod.report.__main__ import main
from megatron_tcod.report.comparison import pairs
from megatron_tcod.report.episodes import MAX_TEXT, clip, sample_episodes
from megatron_tcod.report.run import read_run
from megatron_tcod.significance import mcnemar_exact, wilson_interval
from megatron_tcod.trajectory import Episode, Microbatch, Task, TokenRow, Turn, TurnWindow

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]><svg/onload=alert(1)>",
    "'\"><a href=https://evil.example/x>click</a>",
    "\u2028\u2029 \u202eevil\u202c 🧪 日本語 \0 ${title} {{7*7}} &lt;b&gt; &#60;",
    "javascript:alert(1) http://evil.example/?q=<style>@import'//evil.example'</style>",
)
FAMILIES = ("clean", "cool", "heat", "light", "pick", "pick two")
MAX_TURNS = 20


def make_run(directory, *, kind="f2b", num_steps=60, seed=0, final_success=0.6, hostile=False, num_tasks=60):
    """A run directory as training and evaluation leave it, with figures from a plausible curve."""
    rng = random.Random(seed)
    name = HOSTILE[seed % len(HOSTILE)] if hostile else kind
    with Journal(directory / "metrics.jsonl") as metrics, Journal(directory / "trajectories.jsonl") as trajectories:
        for step in range(1, num_steps + 1):
            metrics.append(make_metrics(step, num_steps, kind, rng, final_success))
            if step in (1, num_steps // 2, num_steps):
                for sample in range(6):
                    success_rate = final_success * step / num_steps
                    episode = make_episode(step, sample, kind, rng, success_rate, name if hostile else "")
                    trajectories.append(make_trajectory(episode, rng))
    (directory / "evaluation").mkdir()
    for step in range(0, num_steps + 1, max(1, num_steps // 5)):
        evaluation = make_evaluation(step, rng, final_success * (0.3 + 0.7 * step / num_steps), num_tasks, hostile)
        (directory / "evaluation" / f"step_{step:07d}.json").write_text(json.dumps(evaluation))
    (directory / "config.toml").write_text(
        f'[curriculum]\ncurriculum = {json.dumps(kind)}\neta = 2\n[training]\nlr = 1e-4\nseed = {seed}\n'
        f'[rollout]\nmax_turns = {MAX_TURNS}\nserver_key = "do not show"\nnote = {json.dumps(name)}\n'
    )
    return directory


def window_of(step, kind):
    k = MAX_TURNS if kind == "full" else min(1 + step // 2, MAX_TURNS)
    return k, {"f2b": (0, k), "b2f": (max(0, 13 - k), 13)}.get(kind, (0, MAX_TURNS))


def make_metrics(step, num_steps, kind, rng, final_success):
    k, (start, stop) = window_of(step, kind)
    progress = step / num_steps
    record = {"step": step, "curriculum/k": k, "curriculum/window_start": start, "curriculum/window_stop": stop}
    for turn in range(start, min(stop, MAX_TURNS - 2)):
        record[f"kl/turn_{turn:02d}"] = (0.3 + 0.12 * turn) * math.exp(-2 * progress) * rng.uniform(0.6, 1.4)
        record[f"kl_token/turn_{turn:02d}"] = record[f"kl/turn_{turn:02d}"] / 6
    width = stop - start
    trajectory_kl = sum(value for key, value in record.items() if key.startswith("kl/turn"))
    seconds = {"rollout": 0.12 * width * rng.uniform(0.8, 1.2), "teacher": 0.02 * width, "train": 0.08 * width}
    return record | {
        "rollout/episodes": 32,
        "rollout/ok": 30,
        "rollout/success": min(1, max(0, final_success * progress + rng.gauss(0, 0.07))),
        "rollout/outcome/ok": 30,
        "rollout/outcome/diverged": 2 if kind == "b2f" else 0,
        "rollout/end/done": 20,
        "rollout/end/window": 12,
        "turns/student": width * 0.8,
        "tokens/generated": 32 * width * 6,
        "tokens/trained": 30 * width * 6,
        "tokens/packed": 30 * width * 40,
        "tokens/prompt": 32 * width * 220,
        "tokens/cached": 32 * width * 180,
        "kl/trajectory": trajectory_kl,
        "kl/token": trajectory_kl / max(1, 6 * width),
        "entropy/student": 0.4 + 0.5 * math.exp(-3 * progress) + rng.gauss(0, 0.02),
        "train/loss": trajectory_kl / max(1, width),
        "train/grad_norm": 0.5 + rng.random(),
        "logprob/rollout_gap": 1e-6 * rng.random(),
        "weights/lag": 0,
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "seconds/step": sum(seconds.values()) + 0.15,
        "seconds/cpu": 2 * sum(seconds.values()),
    }


def make_episode(step, sample, kind, rng, success_rate, hostile=""):
    k, (start, stop) = window_of(step, kind)
    turns, ids, turn_ids, mask = [], [0], [-1], [0]
    for index in range(min(stop, rng.randrange(6, 15))):
        is_student = index >= start
        place = rng.choice(["desk 1", "shelf 2", "fridge 1", "cabinet 4"])
        thing = rng.choice(["mug 1", "book 2", "apple 3"])
        action = rng.choice([f"go to {place}", f"take {thing} from {place}", f"open {place}", "look"])
        answer = [1 + rng.randrange(200) for _ in range(len(action.split()) + 1)]
        ids += [0] * 5 + answer
        turn_ids += [index] * (5 + len(answer))
        mask += [0] * 5 + [int(is_student)] * len(answer)
        task_text = "You are in a room. Looking around you, you see a desk 1, a fridge 1, a cabinet 4.\n\n"
        turns.append(
            Turn(
                index=index,
                actor="student" if is_student else "teacher",
                observation=hostile or (task_text + "Your task is to: put a cool apple in the cabinet.") * (index == 0)
                or f"You arrive at {place}. On the {place}, you see a {thing}, a lamp 1 and a pencil 2.",
                text=action + hostile,
                action=action,
                token_ids=answer,
                done=False,
                prompt_tokens=220,
                cached_tokens=180,
            )
        )
    is_wrong = kind == "b2f" and sample == 4
    return Episode(
        task=Task(
            env="household",
            task_id=f"{FAMILIES[sample]}/{17 + sample}{hostile}",
            split="train",
            family=FAMILIES[sample],
        ),
        sample=0,
        step=step - 1,
        weight_version=step - 1,
        curriculum_k=k,
        window=TurnWindow(start, stop),
        turns=turns,
        rows=[TokenRow(token_ids=ids, turn_ids=turn_ids, loss_mask=mask, logprobs=[-1.0] * sum(mask))],
        outcome="diverged" if is_wrong else "ok",
        end_reason="window",
        success=not is_wrong and (rng.random() < success_rate or sample == 0),
        reward=0.0,
        detail=f"expected: You open the fridge 1. seen: The fridge 1 is closed. {hostile}" if is_wrong else "",
    )


def make_trajectory(episode, rng):
    scores = {}
    for turn in episode.turns:
        if turn.actor == "student" and episode.outcome == "ok":
            kl = [rng.expovariate(1) * (0.05 if rng.random() < 0.7 else 1.2) for _ in turn.token_ids]
            student = [-rng.expovariate(2) for _ in turn.token_ids]
            teacher = [logprob - value for logprob, value in zip(student, kl, strict=True)]
            scores[turn.index] = {"reverse_kl": kl, "student_logprob": student, "teacher_logprob": teacher}
    words = {id(turn.token_ids): [*re.findall(r"\S+\s?", turn.text), "<|im_end|>"] for turn in episode.turns}
    record = trajectory_record(episode, scores, lambda ids: "")
    for index, turn in enumerate(episode.turns):
        if turn.actor == "student":
            record["token_texts"][index] = (words[id(turn.token_ids)] * 9)[: len(turn.token_ids)]
    return record


def make_evaluation(step, rng, success_rate, num_tasks, hostile):
    tasks = []
    for number in range(num_tasks):
        family = FAMILIES[number % len(FAMILIES)] + (HOSTILE[number % len(HOSTILE)] if hostile else "")
        is_solved = rng.random() < success_rate
        turns = rng.randrange(7, 15) if is_solved else MAX_TURNS
        kl = [(0.2 + 0.05 * turn) * rng.uniform(0.5, 1.5) for turn in range(turns)]
        task = {"task_id": f"t{number}", "family": family, "success": is_solved, "turns": turns, "kl_by_turn": kl}
        tasks.append(task)
    return {"step": step, "split": "test", "tasks": tasks}


class Page(HTMLParser):
    """What a browser would build: elements with attributes, and the contents of scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.raw, self.inside = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style", "title"):
            self.inside = (tag, len(self.elements))
            self.raw[self.inside] = ""

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[0]:
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.raw[self.inside] += data

    def contents(self, tag):
        return [text for (of, _), text in self.raw.items() if of == tag]

    @property
    def data(self):
        return json.loads(self.contents("script")[0])


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    kinds = {"full": 0.35, "f2b": 0.7, "b2f": 0.6}
    for seed, (kind, success) in enumerate(kinds.items()):
        (root / kind).mkdir()
        make_run(root / kind, kind=kind, seed=seed, final_success=success)
    return [root / kind for kind in kinds]


def test_the_headline_is_the_last_evaluation_with_its_wilson_interval(three_runs):
    shown = Page(build_report(three_runs)).data["runs"]
    for run, directory in zip(shown, three_runs, strict=True):
        tasks = json.loads((directory / "evaluation" / "step_0000060.json").read_text())["tasks"]
        solved = sum(task["success"] for task in tasks)
        held_out = run["headline"]["held_out"]
        assert (held_out["solved"], held_out["tasks"], held_out["step"]) == (solved, 60, 60)
        assert held_out["interval"] == pytest.approx(wilson_interval(solved, 60))
        assert held_out["turns"] == pytest.approx(sum(task["turns"] for task in tasks) / 60, rel=1e-4)
        assert held_out["kl"] == pytest.approx(sum(sum(task["kl_by_turn"]) for task in tasks) / 60, rel=1e-4)
        assert sum(played for _, played in run["families"].values()) == 60
        assert sum(solved for solved, _ in run["families"].values()) == solved


def test_pairs_are_compared_task_by_task(three_runs):
    pairs = Page(build_report(three_runs)).data["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [(0, 1), (0, 2), (1, 2)]
    outcomes = [
        [task["success"] for task in json.loads((run / "evaluation" / "step_0000060.json").read_text())["tasks"]]
        for run in three_runs
    ]
    for pair in pairs:
        counts = {(True, False): 0, (False, True): 0, (True, True): 0, (False, False): 0}
        for both in zip(outcomes[pair["a"]], outcomes[pair["b"]], strict=True):
            counts[both] += 1
        assert [pair[key] for key in ("only_a", "only_b", "both", "neither")] == list(counts.values())
        assert pair["p"] == mcnemar_exact(counts[True, False], counts[False, True])


def test_pairs_use_only_tasks_that_both_played_and_the_page_says_so(tmp_path, three_runs):
    partial = make_run(tmp_path, num_tasks=40)
    data = Page(build_report([three_runs[0], partial])).data
    assert data["pairs"][0]["tasks"] == 40
    assert any("evaluated on different tasks" in note["text"] for note in data["notes"])


def test_curves_heatmap_and_costs_hold_the_recorded_figures(three_runs):
    records = read_journal(three_runs[2] / "metrics.jsonl").records
    run = Page(build_report(three_runs)).data["runs"][2]
    assert run["curves"]["step"] == list(range(1, 61))
    assert run["curves"]["values"]["kl/trajectory"] == pytest.approx([r["kl/trajectory"] for r in records], rel=1e-4)
    assert run["curves"]["wall"][-1] == pytest.approx(sum(r["seconds/step"] for r in records), abs=1e-3)
    for column, record in enumerate(records):
        assert run["heatmap"]["columns"][column] == [record["step"]] * 2
        assert run["heatmap"]["start"][column] == record["curriculum/window_start"]
        for turn, row in enumerate(run["heatmap"]["sum"]):
            recorded = record.get(f"kl/turn_{turn:02d}")
            assert row[column] == (recorded and pytest.approx(recorded, rel=1e-4))
    phases = run["costs"]["phases"]
    assert sum(phases.values()) == pytest.approx(sum(r["seconds/step"] for r in records), rel=1e-3)
    assert phases["other"] == pytest.approx(60 * 0.15, rel=1e-3)
    assert run["outcomes"]["outcome/diverged"] == 120


def test_a_long_run_is_thinned_without_losing_its_mean(tmp_path):
    with Journal(tmp_path / "metrics.jsonl") as journal:
        for step in range(1, 5001):
            journal.append({"step": step, "kl/trajectory": step / 7, "kl/turn_00": 2.0 * step, "curriculum/k": 1})
    run = Page(build_report([tmp_path])).data["runs"][0]
    values = run["curves"]["values"]["kl/trajectory"]
    assert len(values) <= 600 and run["curves"]["bin"] == 9
    assert values[0] == pytest.approx(5 / 7, rel=1e-4)
    assert len(run["heatmap"]["columns"]) <= 300
    assert [run["heatmap"]["columns"][0][0], run["heatmap"]["columns"][-1][1]] == [1, 5000]
    assert run["heatmap"]["sum"][0][0] == pytest.approx(18.0)


def test_what_metrics_and_trajectories_write_is_what_the_report_shows(tmp_path):
    """The two ends of the key names: StepMetrics and trajectory_record in, figures of the page out."""
    rng = random.Random(1)
    episode = make_episode(1, 1, "full", rng, 0.0)
    row = episode.rows[0]
    places = [place - 1 for place, is_sampled in enumerate(row.loss_mask) if is_sampled]
    microbatch = Microbatch(
        token_ids=torch.tensor(row.token_ids),
        cu_seqlens=torch.tensor([0, len(row.token_ids)], dtype=torch.int32),
        positions=torch.tensor(places),
        target_ids=torch.tensor(row.token_ids)[torch.tensor(places) + 1],
        loss_weight=torch.ones(len(places)),
        old_logprobs=torch.tensor(row.logprobs),
        turn_ids=torch.tensor([row.turn_ids[place + 1] for place in places]),
        episode_ids=torch.zeros(len(places), dtype=torch.int64),
    )
    kl = torch.rand(len(places), generator=torch.Generator().manual_seed(0))
    per_token = [{"reverse_kl": kl, "student_logprob": -kl, "teacher_logprob": -2 * kl, "student_entropy": kl}]
    metrics = StepMetrics(max_turns=MAX_TURNS)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    seconds = {"rollout": 1.0, "teacher": 0.25, "train": 0.5, "step": 2.0}
    sums = metrics.local_sums([episode], [microbatch], per_token)
    writer.write(metrics.finish(sums, step=1, seconds=seconds, loss=0.5, grad_norm=1.0))
    writer.close()
    scores = scores_by_turn([microbatch], per_token)[0]
    with Journal(tmp_path / "trajectories.jsonl") as journal:
        journal.append(trajectory_record(episode, scores, lambda ids: "".join(f"[{i}]" for i in ids)))
    run = Page(build_report([tmp_path])).data["runs"][0]
    expected = {"rollout/success", "kl/trajectory", "kl/token", "entropy/student", "tokens/generated", "turns/student"}
    assert expected | {"train/loss", "train/grad_norm", "logprob/rollout_gap"} <= run["curves"]["values"].keys()
    assert run["curves"]["values"]["kl/trajectory"][0] == pytest.approx(float(kl.sum()), rel=1e-4)
    assert run["costs"]["phases"] == {"rollout": 1.0, "teacher": 0.25, "train": 0.5, "other": 0.25}
    shown = run["episodes"][0]
    assert shown["kl"] == pytest.approx(float(kl.sum()), rel=1e-4)
    assert [token for turn in shown["turns"] for token in turn["tokens"]] == [
        f"[{i}]" for turn in episode.turns for i in turn.token_ids
    ]
    assert [v for turn in shown["turns"] for v in turn["teacher"]] == pytest.approx((-2 * kl).tolist(), rel=1e-3)
    assert run["heatmap"]["sum"][0][0] == pytest.approx(float(kl[microbatch.turn_ids == 0].sum()), rel=1e-4)


def test_hostile_text_stays_text(tmp_path):
    directories = []
    for seed in range(len(HOSTILE)):
        directory = tmp_path / f"run{seed}<script>alert(1)<"
        directory.mkdir()
        directories.append(make_run(directory, kind="b2f", seed=seed, hostile=True, num_steps=6))
    text = build_report(directories, title="</title><script>alert(1)</script><img src=x onerror=alert(1)>")
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and tags.count("style") == 1 and tags.count("title") == 1
    assert not {"img", "iframe", "object", "embed", "a", "base", "form", "svg", "video", "audio"} & set(tags)
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "action", "srcset", "data"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert page.contents("title") == ["</title><script>alert(1)</script><img src=x onerror=alert(1)>"]
    block = text[text.index('id="data">') + len('id="data">') : text.rindex("<script>")]
    assert block.count("<") == 1 and block.endswith("</script>\n")
    data = json.dumps(page.data, ensure_ascii=False)
    for hostile in HOSTILE:
        assert json.dumps(hostile, ensure_ascii=False)[1:-1] in data, "the text itself is kept, unchanged"


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed; it draws the page here")
@pytest.mark.parametrize("hostile", [False, True])
def test_a_browser_draws_every_part_and_hostile_text_makes_no_element(tmp_path, hostile):
    directories = []
    for seed in (1, 2):
        directory = tmp_path / f"run{seed}"
        directory.mkdir()
        directories.append(make_run(directory, kind="b2f", seed=seed, hostile=hostile, num_steps=8))
    (tmp_path / "page.html").write_text(build_report(directories, title="Two runs"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = ["chromium", *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    address = (tmp_path / "page.html").as_uri()
    result = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    page = Page(result.stdout)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and not {"img", "iframe", "a", "object"} & set(tags)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert tags.count("canvas") == 3, "one heatmap a run and the colour scale"
    assert tags.count("table") == 5 and tags.count("svg") >= 14 and tags.count("option") == 2
    classes = [attributes.get("class") for _, attributes in page.elements]
    assert classes.count("turn teacher") > 0 and classes.count("heat") == 2
    assert "TypeError" not in result.stderr and "ReferenceError" not in result.stderr


def test_the_scripts_never_parse_a_string_as_markup_or_code_and_ask_for_nothing(three_runs):
    script = Page(build_report(three_runs)).contents("script")[1]
    for forbidden in (
        r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc",
        r"\beval\b|new Function|setTimeout\(\s*[\"'`]|import\s*\(",
        r"\bfetch\b|XMLHttpRequest|WebSocket|EventSource|sendBeacon|new Worker|new Image",
        r"https?://(?!www\.w3\.org/2000/svg)",
        r"localStorage|document\.cookie",
    ):
        assert not re.search(forbidden, script), forbidden


def test_the_policy_allows_exactly_the_style_and_the_script_of_the_page(three_runs):
    page = Page(build_report(three_runs))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'" and rules["form-action"] == "'none'"

    def digest(text):
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert rules["script-src"] == digest(page.contents("script")[1])
    assert rules["style-src"] == digest(page.contents("style")[0])
    assert not [a for _, a in page.elements if "style" in a], "inline styles would be refused by the policy"


def test_the_page_refers_to_no_address_outside_itself(three_runs):
    text = build_report(three_runs)
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'<]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert "@import" not in text and "url(" not in text


def test_a_huge_observation_is_clipped_with_a_visible_mark(tmp_path):
    make_run(tmp_path, num_steps=3)
    rng = random.Random(0)
    episode = make_episode(3, 0, "f2b", rng, 1.0)
    huge = replace(episode.turns[0], observation="x" * 1_000_000 + "the end", text="y" * 500_000)
    with Journal(tmp_path / "trajectories.jsonl") as journal:
        journal.append(make_trajectory(replace(episode, step=99, turns=[huge, *episode.turns[1:]]), rng))
    text = build_report([tmp_path])
    assert len(text) < 500_000
    shown = [e for e in Page(text).data["runs"][0]["episodes"] if e["step"] == 99][0]["turns"][0]["observation"]
    head, num_left_out, tail = shown
    assert len(head) + num_left_out + len(tail) == 1_000_007
    assert tail.endswith("the end")


def test_clip_keeps_beginning_and_end():
    assert clip("a" * MAX_TEXT) == "a" * MAX_TEXT
    head, num_left_out, tail = clip("abcdefghij" * 1000)
    assert head + "?" * num_left_out + tail == head.ljust(10_000 - len(tail), "?") + tail
    assert ("abcdefghij" * 1000).startswith(head) and ("abcdefghij" * 1000).endswith(tail)


def test_the_sample_shows_successes_failures_and_what_went_wrong_and_is_the_same_every_time(three_runs):
    episodes, problems = sample_episodes(three_runs[2], max_bytes=10**6)
    assert not problems
    assert [episode["step"] for episode in episodes] == [0] * 4 + [29] * 4 + [59] * 4
    first_step = episodes[:4]
    assert {episode["outcome"] for episode in first_step} == {"ok", "diverged"}
    assert {episode["success"] for episode in first_step if episode["outcome"] == "ok"} == {True, False}
    assert sample_episodes(three_runs[2], max_bytes=10**6)[0] == episodes
    teacher_turns = [turn for episode in episodes for turn in episode["turns"] if turn["actor"] == "teacher"]
    assert teacher_turns and all("tokens" not in turn for turn in teacher_turns)


def test_episodes_that_do_not_fit_are_counted(three_runs):
    episodes, problems = sample_episodes(three_runs[0], max_bytes=20_000)
    assert len(json.dumps(episodes).encode()) <= 20_000
    assert len(episodes) < 12 and any(f"{12 - len(episodes)} sampled episode" in problem for problem in problems)


def test_a_report_of_two_hundred_rollouts_takes_under_three_seconds_and_stays_small(tmp_path):
    make_run(tmp_path, num_steps=60)
    rng = random.Random(5)
    with Journal(tmp_path / "trajectories.jsonl") as journal:
        for number in range(200):
            journal.append(make_trajectory(make_episode(1 + number % 60, number % 6, "f2b", rng, 0.5), rng))
    started = time.perf_counter()
    text = build_report([tmp_path])
    assert time.perf_counter() - started < 3
    assert len(text.encode()) < 1_000_000


def notes_of(directory):
    return [note["text"] for note in Page(build_report([directory])).data["notes"]]


def write_metrics(directory, records):
    with Journal(directory / "metrics.jsonl") as journal:
        for record in records:
            journal.append(record)


def write_evaluation(directory, step, solved, played=20):
    (directory / "evaluation").mkdir(exist_ok=True)
    tasks = [{"task_id": f"t{i}", "family": "", "success": i < solved, "turns": 9} for i in range(played)]
    (directory / "evaluation" / f"step_{step:07d}.json").write_text(json.dumps({"step": step, "tasks": tasks}))


def test_kl_that_falls_while_held_out_success_collapses_is_noted(tmp_path):
    write_metrics(tmp_path, [{"step": s, "kl/trajectory": 20.0 - s} for s in range(1, 16)])
    write_evaluation(tmp_path, 0, 8)
    write_evaluation(tmp_path, 15, 2)
    assert any(note.startswith("KL falls while success collapses") for note in notes_of(tmp_path))
    write_evaluation(tmp_path, 15, 8)
    assert not any("collapses" in note for note in notes_of(tmp_path))


def test_rollout_success_that_falls_because_the_prefix_shrinks_is_no_collapse(tmp_path):
    records = [{"step": s, "kl/trajectory": 20.0 - s, "rollout/success": 1.0 - s / 16} for s in range(1, 16)]
    write_metrics(tmp_path, records)
    (tmp_path / "config.toml").write_text('[curriculum]\ncurriculum = "b2f"\n')
    assert not any("collapses" in note for note in notes_of(tmp_path))
    (tmp_path / "config.toml").write_text('[curriculum]\ncurriculum = "full"\n')
    assert any("collapses" in note for note in notes_of(tmp_path))


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([{"step": 1, "rollout/success": 0.0}], "Not one rollout succeeded"),
        ([{"step": 1, "rollout/outcome/ok": 6, "rollout/outcome/env_fault": 2}], "2 of 8 episodes (25.0%) were not"),
        ([{"step": 1, "rollout/end/done": 9, "rollout/end/context_length": 1}], "10.0% of episodes ended because"),
        ([{"step": 4, "train/loss": math.nan}], "train/loss was not a finite number in 1 step(s), first in step 4"),
        ([{"step": 1, "weights/lag": 2.0}], "up to 2 steps behind"),
        ([{"step": 1, "logprob/rollout_gap": 0.3}], "Engine and trainer disagree"),
        ([{"step": 1, "tokens/trained": 0}], "1 step(s) had nothing to train on"),
        ([{"step": 1, "tokens/generated": 0}], "Nothing was sampled in training"),
        ([{"step": 1}, {"step": 4}], "with 2 missing"),
        ([{"step": 1}, {"step": 1}], "appear more than once"),
        ([{"step": 1}, {"no": "step"}], "without a step number"),
        ([{"step": 1}], "no evaluation"),
        ([{"step": 1}], "no trajectories"),
        ([{"step": 1}], "no readable config"),
    ],
)
def test_oddities_are_noted(tmp_path, records, expected):
    write_metrics(tmp_path, records)
    assert [note for note in notes_of(tmp_path) if expected in note]


def test_a_healthy_run_has_no_warnings(tmp_path):
    make_run(tmp_path)
    assert not [note for note in Page(build_report([tmp_path])).data["notes"] if note["level"] == "warning"]


@pytest.mark.parametrize(("solved", "expected"), [(0, "No held-out task solved"), (20, "Every held-out task solved")])
def test_an_evaluation_at_the_edge_is_noted(tmp_path, solved, expected):
    write_metrics(tmp_path, [{"step": 1}])
    write_evaluation(tmp_path, 1, solved)
    assert [note for note in notes_of(tmp_path) if expected in note]


def test_damage_is_counted_and_the_rest_is_shown(tmp_path):
    make_run(tmp_path, num_steps=10)
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step":3,"crc32":"00000000"}\nnonsense\n{"torn')
    with Journal(tmp_path / "trajectories.jsonl") as journal:
        journal.append({"step": 77, "outcome": "ok", "turns": "not a list"})
    (tmp_path / "evaluation" / "step_0000004.json").write_text('{"step": 4')
    (tmp_path / "evaluation" / "step_0000006.json").write_text('{"step": 6, "tasks": []}')
    (tmp_path / "evaluation" / "step_0000008.json").write_text("[" * 100_000)
    (tmp_path / "config.toml").write_text("not toml")
    data = Page(build_report([tmp_path])).data
    notes = "\n".join(note["text"] for note in data["notes"])
    assert "metrics.jsonl: 3 unreadable line(s) skipped" in notes
    assert "trajectories.jsonl: 2 unreadable line(s) skipped" in notes  # the torn third was cut on opening
    for name in ("step_0000004", "step_0000006", "step_0000008", "config.toml", "not in the expected form"):
        assert name in notes
    assert len(data["runs"][0]["curves"]["step"]) == 10


def test_secrets_are_not_in_the_page(three_runs):
    text = build_report(three_runs)
    assert "do not show" not in text and "rollout.server_key" in text


def test_settings_that_differ_are_listed(three_runs):
    differences = {row["key"]: row["values"] for row in Page(build_report(three_runs)).data["differences"]}
    assert differences["curriculum.curriculum"] == ["full", "f2b", "b2f"]
    assert differences["training.seed"] == ["0", "1", "2"]
    assert "training.lr" not in differences


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        write_metrics(tmp_path / parent / "run", [{"step": 1}])
    data = Page(build_report([tmp_path / "a" / "run", tmp_path / "b" / "run"])).data
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="given twice"):
        build_report([tmp_path / "a" / "run", tmp_path / "a" / "." / "run"])


def test_several_samples_of_a_task_are_paired_in_order(tmp_path):
    write_metrics(tmp_path, [{"step": 1}])
    (tmp_path / "evaluation").mkdir()
    tasks = [{"task_id": "t", "success": solved, "turns": 3} for solved in (True, False, True)]
    (tmp_path / "evaluation" / "step_0000001.json").write_text(json.dumps({"step": 1, "tasks": tasks}))
    final = read_run(tmp_path, "run").final_evaluation
    assert final.outcomes() == {("t", 0): True, ("t", 1): False, ("t", 2): True}
    assert any("3 episodes of 1 tasks" in note for note in notes_of(tmp_path))
    low, high = final.interval
    assert low < wilson_interval(2, 3)[0] and high > wilson_interval(2, 3)[1], "three episodes are not three tasks"


def test_runs_with_several_samples_are_compared_by_task(tmp_path):
    """Eight tasks of four samples: 32 to 0 episodes would say p < 1e-9, 8 tasks say 2 in 2^8."""
    for name, solved in (("a", True), ("b", False)):
        (tmp_path / name / "evaluation").mkdir(parents=True)
        write_metrics(tmp_path / name, [{"step": 1}])
        tasks = [{"task_id": f"t{task}", "success": solved, "turns": 3} for task in range(8) for _ in range(4)]
        (tmp_path / name / "evaluation" / "step_0000001.json").write_text(json.dumps({"step": 1, "tasks": tasks}))
    (pair,) = pairs([read_run(tmp_path / name, name) for name in "ab"])
    assert pair["only_a"] == 32 and pair["p"] == pytest.approx(2 / 2**8)


def test_the_command_writes_one_file_and_names_it(tmp_path, three_runs, capsys):
    output = tmp_path / "deep" / "report.html"
    assert main([*map(str, three_runs), "--output", str(output), "--title", "Three curricula"]) == 0
    assert str(output) in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    assert "<title>Three curricula</title>" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda path: None, "is not a directory"),
        (lambda path: path.mkdir(), "has no metrics.jsonl"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text("nonsense\n")), "holds no readable step"),
    ],
)
def test_a_directory_without_metrics_is_one_error_line_and_exit_2(tmp_path, prepare, expected):
    prepare(tmp_path / "run")
    command = [sys.executable, "-m", "megatron_tcod.report", str(tmp_path / "run")]
    command += ["--output", str(tmp_path / "r.html")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert expected in result.stderr and str(tmp_path / "run") in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()
