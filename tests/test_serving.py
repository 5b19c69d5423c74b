"""What is found out about servers before anything starts: one message each, and keys that only their owner can read."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from megatron_tcod.config import load_config
from megatron_tcod.serving import (
    check_attached,
    check_servers,
    check_teacher_model,
    gpus_of,
    is_teacher_served,
    read_keys,
    uses_servers,
)

pytest.importorskip("aiohttp")

ATTACHED = ["--rollout-engine", "sglang", "--sglang-urls", "http://127.0.0.1:1", "http://127.0.0.1:2"]
LAUNCHED = ["--rollout-engine", "sglang", "--sglang-python", "/bin/sh"]
REMOTE = ["--rollout-engine", "sglang", "--sglang-urls", "http://10.0.0.5:1", "http://10.0.0.6:1"]
TEACHER = ["--teacher", "sglang", "--teacher-url", "http://127.0.0.1:3"]


@pytest.mark.parametrize(
    ("argv", "file", "message"),
    [
        (["--rollout-engine", "sglang"], "", "sglang.launch_server: not installed beside the trainer; set sglang_python"),
        (["--rollout-engine", "sglang", "--sglang-python", "/absent"], "", "sglang_python = /absent: no program that can be"),
        (["--rollout-engine", "sglang", "--sglang-program", "absent.py"], "", "sglang_program = absent.py: no such file"),
        (["--rollout-engine", "sglang", "--sglang-urls", "a:1"], "", "sglang_urls: 'a:1' is no server address"),
        ([*ATTACHED[:-1]], "", "sglang_urls names 1 servers for 2 data-parallel replicas"),
        (ATTACHED, "[rollout.server]\nport = 1\n", r"\[rollout.server\] must not set port"),
        (LAUNCHED, "[rollout.server]\ntp-size = '2'\n", r"\[rollout.server\] tp_size = '2' is no number of GPUs"),
        (TEACHER, "[sglang.teacher_server]\napi-key = 'x'\n", r"\[sglang.teacher_server\] must not set api-key"),
        (["--teacher", "sglang", "--teacher-url", "file:///x"], "", "teacher_url: 'file:///x' is no server address"),
        (["--teacher", "sglang", "--teacher-model", "absent"], "", "teacher_model = absent: no config.json there"),
        ([*ATTACHED, "--sglang-key-file", "absent.txt"], "", "key file absent.txt: .*No such file"),
        (["--rollout-engine", "sglang", "--sglang-python", "/"], "", "sglang_python = /: no program that can be run"),
        ([*LAUNCHED, "--sglang-program", "tools/x"], "", "sglang_program = tools/x: no such file; give a module name or"),
        ([*ATTACHED[:-2], "http://"], "", "sglang_urls: 'http://' is no server address"),
        ([*ATTACHED[:-2], "http://a:99999"], "", "sglang_urls: 'http://a:99999' is no server address"),
        ([*ATTACHED[:-1], "http://127.0.0.1:1/"], "", "sglang_urls names http://127.0.0.1:1/ twice"),
        ([*ATTACHED[:-1], "HTTP://localhost:1"], "", "sglang_urls names HTTP://localhost:1 twice"),
        ([*ATTACHED, "--teacher", "sglang", "--teacher-url", "http://localhost:2"], "", "is one of sglang_urls too"),
        ([*ATTACHED[:-1], "http://me:secret@127.0.0.1:2"], "", "sglang_urls holds a user name, .* the key by a key file"),
        ([*ATTACHED[:-1], "http://a..b:2"], "", "sglang_urls: 'http://a..b:2' is no server address"),
        (LAUNCHED, "", "sglang_python = /bin/sh has no package sglang"),
        (LAUNCHED, "[rollout.server]\nhos = '0.0.0.0'\n", r"\[rollout.server\] must not set hos"),
        (LAUNCHED, "[rollout.server]\ntp = true\n", r"\[rollout.server\] tp_size = True is no number of GPUs"),
        (ATTACHED[2:], "", r"sglang_urls = \['http://127.0.0.1:1', .* is read with --rollout-engine sglang only"),
        (["--teacher-key-file", "k", "--teacher", "x"], "", "teacher_key_file = k is read with --teacher sglang only"),
        ([*REMOTE, "--weight-sync", "tensor"], "", "weight_sync = tensor hands over memory of this host, and http://10.0.0.5"),
        ([*ATTACHED, "--teacher", "sglang", "--teacher-url", "http://127.0.0.1:2/"], "", "is one of sglang_urls too"),
        (ATTACHED, "[rollout.server]\ntp_size = 2\n", r"\[rollout.server\] is for servers that are launched here"),
        ([*ATTACHED, "--servers-per-replica", "2"], "", "servers_per_replica = 2 is for servers that are launched here"),
        ([*LAUNCHED, "--sglang-key-file", "x"], "", "sglang_key_file is for attached servers, but sglang_urls is empty"),
        (TEACHER, "[sglang.teacher_server]\ntp_size = 2\n", r"\[sglang.teacher_server\] is for servers"),
        (["--teacher-url", "http://a:1", "--teacher", "x"], "", "teacher_url = http://a:1 is read with --teacher"),
        ([*REMOTE, "--weight-sync", "distributed"], "", "weight_sync_address = 127.0.0.1 is each machine's own"),
    ],
)
def test_a_mistake_about_servers_gets_one_message(tmp_path, argv, file, message):
    path = tmp_path / "run.toml"
    path.write_text(file)
    config = load_config(["--config", str(path), *argv])
    with pytest.raises(ValueError, match=message) as caught:
        check_servers(config, dp_size=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "num_gpus"),
    [
        ({}, 1),
        ({"tp_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pp_size": 2, "dp_size": 2}, 8),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}, 8),
    ],
)
def test_the_next_server_of_a_replica_starts_behind_the_gpus_of_this_one(flags, num_gpus):
    assert gpus_of(flags) == num_gpus


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


@pytest.mark.parametrize(
    ("top_k", "found", "message"),
    [
        (98, {}, "teacher_top_k = 98 exceeds the 97 ids"),
        (8, {"max_position_embeddings": 511}, "exceeds max_position_embeddings = 511 of teacher_model"),
        (8, {"text_config": {"vocab_size": 96}}, "has vocab_size = 96, the student's tokenizer 97 ids"),
    ],
)
def test_what_does_not_suit_a_launched_teacher_is_found_in_its_config_json(tmp_path, top_k, found, message):
    """Its server would be told to serve any context, however short the model's positions are."""
    (tmp_path / "config.json").write_text(json.dumps(found))
    argv = ["--teacher", "sglang", "--teacher-model", str(tmp_path), "--teacher-top-k", str(top_k)]
    config = load_config([*argv, "--rollout-max-context-len", "512"])
    with pytest.raises(ValueError, match=message):
        check_teacher_model(config, SimpleNamespace(vocab_size=97))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512, "vocab_size": 97}))
    check_teacher_model(load_config([*argv[:-1], "97", "--rollout-max-context-len", "512"]), SimpleNamespace(vocab_size=97))


def test_an_attached_server_that_does_not_answer_is_named_before_anything_starts(tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("right\n")
    key_file.chmod(0o600)
    with Answering() as port:
        url = f"http://127.0.0.1:{port}"
        rollouts = ["--rollout-engine", "sglang", "--sglang-urls", url]
        check_attached(load_config([*rollouts, "--sglang-key-file", str(key_file)]))
        with pytest.raises(ValueError, match="sglang_urls: .* refuses a request without a key .sglang_key_file is empty"):
            check_attached(load_config(rollouts))
        with pytest.raises(ValueError, match="teacher_url: .*/proxy answers /model_info with status 404; expected an SGLang"):
            check_attached(load_config(["--teacher", "sglang", "--teacher-url", f"{url}/proxy"]))
        key_file.write_text("wrong")
        with pytest.raises(ValueError, match="teacher_url: .* refuses the key in teacher_key_file = "):
            check_attached(load_config(["--teacher", "sglang", "--teacher-url", url, "--teacher-key-file", str(key_file)]))
    with pytest.raises(ValueError, match=f"teacher_url: no HTTP server answers at {url} within 10 s; start the server first"):
        check_attached(load_config(["--teacher", "sglang", "--teacher-url", url]))


class Answering:
    """A server that tells /model_info to whoever has the key `right`; within the block, at the port it returns."""

    def __enter__(self):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                is_known = self.headers["Authorization"] == "Bearer right"
                self.send_response(404 if self.path != "/model_info" else 200 if is_known else 401)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_port

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


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
    for text in ("a\nb\nc", "one key", "ключ"):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected the API key and, below it, the admin key if any, of printable ASCII"):
            read_keys(str(path))
    assert read_keys("") == ("", "")
