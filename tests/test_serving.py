"""What is found out about servers before anything starts: one message each, and keys that only their owner can read."""

import pytest

from megatron_tcod.config import load_config
from megatron_tcod.serving import check_servers, is_teacher_served, read_keys, uses_servers

pytest.importorskip("aiohttp")

ATTACHED = ["--rollout-engine", "sglang", "--sglang-urls", "http://127.0.0.1:1", "http://127.0.0.1:2"]
TEACHER = ["--teacher", "sglang", "--teacher-url", "http://127.0.0.1:3"]


@pytest.mark.parametrize(
    ("argv", "file", "message"),
    [
        (["--rollout-engine", "sglang"], "", "sglang.launch_server: not installed beside the trainer; set sglang_python"),
        (["--rollout-engine", "sglang", "--sglang-python", "/absent"], "", "sglang_python = /absent: no such interpreter"),
        (["--rollout-engine", "sglang", "--sglang-program", "absent.py"], "", "sglang_program = absent.py: no such file"),
        (["--rollout-engine", "sglang", "--sglang-urls", "a:1"], "", "sglang_urls: 'a:1' is no server address"),
        ([*ATTACHED[:-1]], "", "sglang_urls names 1 servers for 2 data-parallel replicas"),
        (ATTACHED, "[rollout.server]\nport = 1\n", r"\[rollout.server\] must not set port"),
        (TEACHER, "[sglang.teacher_server]\napi-key = 'x'\n", r"\[sglang.teacher_server\] must not set api-key"),
        (["--teacher", "sglang", "--teacher-url", "file:///x"], "", "teacher_url: 'file:///x' is no server address"),
        (["--teacher", "sglang", "--teacher-model", "absent"], "", "teacher_model = absent: no config.json there"),
        ([*ATTACHED, "--sglang-key-file", "absent.txt"], "", "key file absent.txt: .*No such file"),
    ],
)
def test_a_mistake_about_servers_gets_one_message(tmp_path, argv, file, message):
    path = tmp_path / "run.toml"
    path.write_text(file)
    config = load_config(["--config", str(path), *argv])
    with pytest.raises(ValueError, match=message) as caught:
        check_servers(config, dp_size=2)
    assert "\n" not in str(caught.value)


def test_sound_settings_are_told_in_a_line_each():
    lines = check_servers(load_config([*ATTACHED, *TEACHER, "--max-staleness", "1"]), dp_size=2)
    assert len(lines) == 2 and "http://127.0.0.1:2, staleness at most 1" in lines[0] and "top 64" in lines[1]


def test_a_launched_teacher_serves_one_host(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    config = load_config(["--teacher", "sglang", "--teacher-model", str(tmp_path), "--sglang-python", "/bin/sh"])
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="start the teacher by hand and give its teacher_url"):
        check_servers(config, dp_size=None)


def test_runs_without_servers_ask_nothing():
    config = load_config(["--teacher", "sglang", "--objective", "sft", "--demonstrations", "expert"])
    assert not is_teacher_served(config) and not uses_servers(config) and check_servers(config, dp_size=1) == []


def test_keys_come_from_a_private_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("first\nsecond\n")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="can be read by others; chmod 600"):
        read_keys(str(path))
    path.chmod(0o600)
    assert read_keys(str(path)) == ("first", "second")
    path.write_text("only\n")
    assert read_keys(str(path)) == ("only", "only")
    path.write_text("a b c")
    with pytest.raises(ValueError, match="has 3 words"):
        read_keys(str(path))
    assert read_keys("") == ("", "")
