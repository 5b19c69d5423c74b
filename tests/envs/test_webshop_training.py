"""B2F over the WebShop server: recorded purchases are replayed page by page, then the student shops."""

from megatron_tcod.envs.demonstrations import write_demonstrations
from megatron_tcod.envs.webshop import WebShop
from megatron_tcod.journal import read_journal
from megatron_tcod.train import main


def test_b2f_replays_purchases_and_the_student_takes_over(single_process, run_flags, small_shop, tmp_path):
    tasks = WebShop.tasks("train", count=3, **small_shop)
    experts = {task.task_id: WebShop.expert(task, seed=0, **small_shop) for task in tasks}
    write_demonstrations(tmp_path / "demonstrations.jsonl", experts.values())
    flags = [
        *run_flags,
        "--train-tasks", "3",
        "--env", "webshop",
        "--env-options", *[word for pair in small_shop.items() for word in pair],
        "--curriculum", "b2f",
        "--k-start", "2",
        "--max-turns", "15",
        "--demonstrations", str(tmp_path / "demonstrations.jsonl"),
        "--rollout-max-context-len", "2048",
        "--history-mode", "compact",
        "--eval-split", "test",
        "--eval-tasks", "1",
        "--train-iters", "1",
        "--b2f-stop", "demonstration",
    ]  # fmt: skip
    assert main(flags) == 0
    episodes = list(read_journal(tmp_path / "run" / "trajectories.jsonl").records)
    assert [episode["outcome"] for episode in episodes] == ["ok"] * 3
    for episode in episodes:
        recorded = experts[episode["task"]["task_id"]].turns
        replayed = [turn for turn in episode["turns"] if turn["actor"] == "teacher"]
        assert [turn["action"] for turn in replayed] == [turn.action for turn in recorded[:-2]]
        assert [turn["observation"] for turn in replayed] == [turn.observation for turn in recorded[:-2]]
        assert 1 <= sum(turn["actor"] == "student" for turn in episode["turns"]) <= 2
