"""What several test files share: small model directories with random weights, made once a session."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def household_models(tmp_path_factory) -> Path:
    """`student/`, `teacher/`: the quickstart's shapes and tokenizer, weights written by transformers; a deeper teacher."""
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("models")
    prepare = ROOT / "examples" / "quickstart" / "prepare.py"
    subprocess.run([sys.executable, str(prepare), "--output", str(directory)], check=True, capture_output=True)
    for seed, name in enumerate(("student", "teacher")):
        path = directory / name
        config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 2 + seed}
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config | {"initializer_range": 0.2}))
        model.save_pretrained(path)
        (path / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def run_flags(household_models, tmp_path) -> list[str]:
    """Flags of a tiny run over the household, in `tmp_path / "run"`."""
    return [
        "--student", str(household_models / "student"),
        "--teacher", str(household_models / "teacher"),
        "--save", str(tmp_path / "run"),
        "--train-iters", "2",
        "--lr", "1e-3",
        "--rollout-batch-size", "3",
        "--rollout-max-response-len", "6",
        "--rollout-max-context-len", "512",
        "--max-turns", "5",
        "--train-tasks", "12",
        "--eval-tasks", "3",
    ]  # fmt: skip


@pytest.fixture
def sglang_flags(run_flags, tmp_path) -> list[str]:
    """Those of a tiny run whose rollouts, and whose teacher where it is `sglang`, are real servers' on this CPU."""
    from sglang_cpu import CPU_FLAGS, LAUNCHER, PYTHON, require_server_environment

    from megatron_tcod.config import toml_value

    require_server_environment()
    served = CPU_FLAGS | {"max_total_tokens": 32768}
    teacher = {key: value for key, value in served.items() if key != "skip_tokenizer_init"}
    path = tmp_path / "cpu.toml"
    path.write_text(
        f'[rollout]\nrollout_engine = "sglang"\nserver = {toml_value(served)}\n[sglang]\nserver_start_timeout = 300\n'
        f"weight_probe_tolerance = 1e-4\nsglang_python = {toml_value(str(PYTHON))}\n"
        f"sglang_program = {toml_value(str(LAUNCHER))}\nteacher_server = {toml_value(teacher)}\n"
    )
    return ["--config", str(path), *run_flags]


@pytest.fixture
def single_process(monkeypatch):
    """Entry points called in this process form a world of one and leave it again."""
    from megatron_tcod.model import parallel

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "RANK" not in os.environ
    yield
    parallel.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for devices that this machine lacks are skipped by name, also where markers select them."""
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for marker, needed in (("gpu", 1), ("multigpu", 2)):
        if num_devices < needed:
            skip = pytest.mark.skip(reason=f"needs {needed} CUDA device{'s' * (needed > 1)}, found {num_devices}")
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(skip)
