"""Which servers a run talks to: launched here or attached, for the rollouts and for a teacher behind a server.

    players = player_ranks(config)                                # who talks to them; with the embedded engine everybody
    servers = rollout_servers(config)                             # this rank's, before the models take their memory
    engine = served_engine(config, servers, vocab_size=..., head_rows=..., probe=...)
    teacher = served_teacher(config, vocab_size=...); check_teacher_server(...)

The first rank of each replica launches or attaches its servers, plays all episodes of the replica and gives the servers
their weights; the other ranks hold an `IdleEngine`. A launched teacher is rank 0's and serves all replicas of its host.

SGLang itself is spoken to in `rollout/`, and needs the extra `sglang` here and an environment of its own.
"""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from megatron_tcod.config import SGLANG, Config, SGLangConfig
from megatron_tcod.model import parallel
from megatron_tcod.model.weight_files import read_json
from megatron_tcod.objective import make_objective
from megatron_tcod.packing import WeightedRow, build_microbatch
from megatron_tcod.rollout.chat import TurnTokenizer
from megatron_tcod.rollout.engine import RolloutEngine
from megatron_tcod.rollout.idle_engine import IdleEngine
from megatron_tcod.tcod import Student
from megatron_tcod.trajectory import TokenRow, decode, encode

if TYPE_CHECKING:
    from megatron_tcod.rollout.sglang_engine import Probe
    from megatron_tcod.rollout.sglang_server import Server
    from megatron_tcod.rollout.teacher_server import ServerTeacher
    from megatron_tcod.rollout.weight_sync import WeightSync

PROBE_TOKENS = 64
CONTEXT_MARGIN = 64
"""SGLang takes prompts some tokens shorter than its context."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def is_teacher_served(config: Config) -> bool:
    return config.model.teacher == SGLANG and config.objective.objective != "sft"


def uses_servers(config: Config) -> bool:
    return config.rollout.rollout_engine == SGLANG or is_teacher_served(config)


def is_player(config: Config) -> bool:
    """Whether this rank plays episodes."""
    return config.rollout.rollout_engine != SGLANG or parallel.is_first_in_replica()


def player_ranks(config: Config) -> list[int]:
    """Ranks that play, ascending. Collective."""
    answers = parallel.all_gather_bytes(b"yes" if is_player(config) else b"no")
    return [rank for rank, answer in enumerate(answers) if answer == b"yes"]


def rollout_servers(config: Config) -> list[Server]:
    """The servers of this rank's replica, healthy; none on ranks that do not play."""
    if config.rollout.rollout_engine != SGLANG or not is_player(config):
        return []
    from megatron_tcod.rollout.sglang_server import attach

    sglang = config.sglang
    if sglang.sglang_urls:
        api_key, admin_key = read_keys(sglang.sglang_key_file)
        mine = sglang.sglang_urls[parallel.dp_rank() :: parallel.dp_size()]
        return [attach(url, api_key=api_key, admin_key=admin_key) for url in mine]

    def start(number: int) -> Server:
        own, theirs = {"load_format": "dummy"}, underscored(config.rollout.server)  # the trainer's weights come first
        if torch.cuda.is_available():
            own["base_gpu_id"] = parallel.device().index + number * gpus_of(theirs)
        flags = own | theirs
        return launch_server(config, config.model.student, flags, f"rollout-{parallel.dp_rank()}-{number}")

    with ThreadPoolExecutor(sglang.servers_per_replica) as threads:
        return list(threads.map(start, range(sglang.servers_per_replica)))


def gpus_of(flags: Mapping[str, Any], table: str = "rollout.server") -> int:
    """GPUs that a server with these flags takes. ValueError for a size that is none; `table` is where it stands."""
    num_gpus, is_shared = 1, bool(flags.get("enable_dp_attention"))  # its dp lies within its tp
    for short, long in (("tp", "tensor"), ("pp", "pipeline"), *(() if is_shared else (("dp", "data"),))):
        spellings = (f"{short}_size", f"{long}_parallel_size", short)  # SGLang takes the last as a beginning of the first
        size = next((flags[name] for name in spellings if name in flags), 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"[{table}] {short}_size = {size!r} is no number of GPUs; give an integer from 1 up")
        num_gpus *= size
    return num_gpus


def launch_server(config: Config, model_path: str, flags: Mapping[str, Any], name: str) -> Server:
    """A server of this machine whose log is in the run directory."""
    from megatron_tcod.rollout.sglang_server import launch

    return launch(
        model_path,
        run_directory=servers_directory(config),
        flags={"context_length": config.rollout.rollout_max_context_len + CONTEXT_MARGIN} | underscored(flags),
        # The margin may exceed the model's positions; no request does.
        environment={"HF_HUB_OFFLINE": "1", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
        name=f"{name}.{os.getpid()}",  # evaluations may share the directory
        python=config.sglang.sglang_python or sys.executable,
        program=config.sglang.sglang_program,
        start_timeout_s=config.sglang.server_start_timeout,
    )


def underscored(flags: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang's flags under one spelling, so that a user's replaces ours."""
    return {name.replace("-", "_"): value for name, value in flags.items()}


def servers_directory(config: Config) -> Path:
    return Path(config.training.save) / "servers"


def served_engine(
    config: Config,
    servers: list[Server],
    *,
    vocab_size: int,
    head_rows: int,
    probe: Callable[[], Probe] | None,
) -> RolloutEngine:
    """The engine over this replica's servers, idle on ranks that do not play."""
    if not is_player(config):
        return IdleEngine(probe=probe)
    from megatron_tcod.rollout.sglang_engine import SGLangEngine

    return SGLangEngine(
        servers,
        weight_sync(config),
        vocab_size=vocab_size,
        head_rows=head_rows,
        max_context=config.rollout.rollout_max_context_len,
        max_concurrent=config.rollout.max_running_requests,
        deadline_s=config.sglang.request_timeout,
        update_deadline_s=config.sglang.request_timeout,
        max_staleness=config.rollout.max_staleness,
        probe=probe,
    )


def weight_sync(config: Config) -> WeightSync:
    from megatron_tcod.rollout.weight_sync import FromDisk, FromDistributed, FromTensor

    chosen = config.sglang.weight_sync
    if chosen == "auto":
        chosen = "disk" if config.sglang.sglang_urls else "tensor"
    if chosen == "disk":
        return FromDisk(servers_directory(config) / f"weights-{parallel.dp_rank()}", config.model.student)
    if chosen == "tensor":
        return FromTensor()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    return FromDistributed(address=config.sglang.weight_sync_address, backend=backend)


def make_probe(
    student: Student, *, vocab_size: int, head_rows: int, max_context: int, tolerance: float
) -> Callable[[], Probe] | None:
    """What the trainer's own forward says about a fixed sequence of random ids. The call is collective in the replica."""
    if not tolerance:
        return None
    from megatron_tcod.rollout.sglang_engine import Probe

    ids = random.Random(0).choices(range(vocab_size), k=min(PROBE_TOKENS, max_context - 1))
    scored = len(ids) - 1
    row = TokenRow(token_ids=ids, turn_ids=[0] * len(ids), loss_mask=[0] + [1] * scored, logprobs=[0.0] * scored)
    objective = make_objective("sft", vocab_size=head_rows)  # as the servers, over all rows of the head

    def probe() -> Probe:
        microbatch = build_microbatch([WeightedRow(row, [0.0] * scored, 0)], device=parallel.device())
        (figures,) = student.measure([microbatch], [None], objective)
        return Probe(token_ids=ids, logprobs=figures["student_logprob"].tolist(), tolerance=tolerance)

    return probe


def teacher_address(config: Config) -> tuple[str, str, Server | None]:
    """URL and key of the teacher's server, and the server where this rank has launched it. Collective."""
    sglang = config.sglang
    if sglang.teacher_url:
        return sglang.teacher_url, read_keys(sglang.teacher_key_file)[0], None
    server = None
    if parallel.rank() == 0:
        server = launch_server(config, sglang.teacher_model, sglang.teacher_server, "teacher")
    told = encode([server.url, server.api_key] if server else [])
    url, key = decode(parallel.all_gather_bytes(told)[0], list[str])
    return url, key, server


def served_teacher(config: Config, url: str, key: str, *, vocab_size: int) -> ServerTeacher:
    """The teacher behind the server at `url`. Collective in the tensor-parallel group."""
    from megatron_tcod.rollout.sglang_client import SGLangClient
    from megatron_tcod.rollout.teacher_server import ServerTeacher

    sglang = config.sglang
    return ServerTeacher(
        lambda: SGLangClient(url, api_key=key, deadline_s=sglang.request_timeout),
        vocab_size=vocab_size,
        top_k=sglang.teacher_top_k,
        max_inflight_tokens=max(1, sglang.teacher_max_inflight_tokens // parallel.dp_size()),
        tp_group=parallel.tp_group(),
        is_last_stage=parallel.is_last_stage(),
    )


def engine_over(config: Config, url: str, key: str, tokenizer: TurnTokenizer) -> RolloutEngine:
    """An engine over a server whose weights never change: a teacher's, or an endpoint. Collective."""
    from megatron_tcod.rollout.sglang_engine import SGLangEngine
    from megatron_tcod.rollout.sglang_server import attach

    max_context = config.rollout.rollout_max_context_len
    with closing(served_teacher(config, url, key, vocab_size=tokenizer.vocab_size)) as teacher:
        teacher.check(tokenizer, max_context=max_context)
    return SGLangEngine(
        [attach(url, api_key=key)],
        None,
        vocab_size=tokenizer.vocab_size,
        max_context=max_context,
        max_concurrent=config.rollout.max_running_requests,
        deadline_s=config.sglang.request_timeout,
    )


def read_keys(path: str) -> tuple[str, str]:
    """The API key and the admin key of a key file; both empty without one. ValueError where others could read it."""
    if not path:
        return "", ""
    try:
        mode, text = os.stat(path).st_mode, Path(path).read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"key file {path}: {error}; give a text file with the key in its first line") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"key file {path} can be read by others; chmod 600 {path}")
    if not 1 <= len(lines) <= 2 or not all(line.isascii() and line.isprintable() and " " not in line for line in lines):
        raise ValueError(
            f"key file {path} has {len(lines)} lines; expected the API key and, below it, the admin key if any, of printable "
            f"ASCII without spaces"
        )
    return lines[0], lines[-1]


def check_servers(config: Config, *, dp_size: int | None) -> list[str]:
    """What can be known of a run's servers before anything starts, a line each. Raises ValueError."""
    check_unused(config)
    if not uses_servers(config):
        return []
    if importlib.util.find_spec("aiohttp") is None:
        raise ValueError("servers are spoken to with aiohttp, which is not installed; pip install '.[sglang]'")
    from megatron_tcod.rollout.sglang_server import check_flags

    sglang, lines = config.sglang, []
    is_launching = False
    if config.rollout.rollout_engine == SGLANG:
        is_launching = not sglang.sglang_urls
        check_flags("rollout.server", config.rollout.server)
        gpus_of(underscored(config.rollout.server), "rollout.server")
        check_urls("sglang_urls", sglang.sglang_urls)
        check_unread(
            "sglang_urls",
            bool(sglang.sglang_urls),
            launched={
                "[rollout.server]": bool(config.rollout.server),
                f"servers_per_replica = {sglang.servers_per_replica}": sglang.servers_per_replica > 1,
            },
            attached={"sglang_key_file": bool(sglang.sglang_key_file)},
        )
        check_sync_address(sglang)
        if dp_size is not None and 0 < len(sglang.sglang_urls) < dp_size:
            raise ValueError(
                f"sglang_urls names {len(sglang.sglang_urls)} servers for {dp_size} data-parallel replicas; give each "
                f"replica at least one, because each updates its own"
            )
        read_keys(sglang.sglang_key_file)
        where = f"{sglang.servers_per_replica} launched per replica" if is_launching else ", ".join(sglang.sglang_urls)
        lines.append(f"rollouts: SGLang, {where}, staleness at most {config.rollout.max_staleness}")
    if is_teacher_served(config):
        is_launching = is_launching or not sglang.teacher_url
        check_flags("sglang.teacher_server", sglang.teacher_server)
        gpus_of(underscored(sglang.teacher_server), "sglang.teacher_server")
        check_urls("teacher_url", [sglang.teacher_url] if sglang.teacher_url else [])
        is_attaching = config.rollout.rollout_engine == SGLANG and bool(sglang.sglang_urls)
        if is_attaching and sglang.teacher_url and canonical(sglang.teacher_url) in map(canonical, sglang.sglang_urls):
            raise ValueError(
                f"teacher_url = {sglang.teacher_url} is one of sglang_urls too, whose servers take the student's weights; "
                f"start a server of its own for the teacher"
            )
        check_unread(
            "teacher_url",
            bool(sglang.teacher_url),
            launched={"[sglang.teacher_server]": bool(sglang.teacher_server)},
            attached={"teacher_key_file": bool(sglang.teacher_key_file)},
        )
        read_keys(sglang.teacher_key_file)
        if sglang.teacher_model and not (Path(sglang.teacher_model) / "config.json").is_file():
            raise ValueError(f"teacher_model = {sglang.teacher_model}: no config.json there; give a Hugging Face directory")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_teacher_host(config, num_ranks=world, num_here=int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        lines.append(f"teacher: SGLang, {sglang.teacher_url or sglang.teacher_model}, top {sglang.teacher_top_k}")
    if is_launching:
        check_program(sglang.sglang_python, sglang.sglang_program)
    return lines


def check_teacher_host(config: Config, *, num_ranks: int, num_here: int) -> None:
    """ValueError where a launched teacher could not be reached by every rank."""
    if is_teacher_served(config) and config.sglang.teacher_model and num_ranks != num_here:
        raise ValueError(
            f"teacher_model launches a server that only its own host reaches, and this run has {num_ranks} ranks of which "
            f"{num_here} are here; start the teacher by hand and give its teacher_url"
        )


def check_unused(config: Config) -> None:
    """ValueError for what names servers that this run does not use: it would play and score otherwise than was asked.

    Tables of SGLang's flags name none; a file may hold them for the runs that choose servers.
    """
    sglang = config.sglang
    of_rollouts = {
        f"sglang_urls = {sglang.sglang_urls}": sglang.sglang_urls,
        f"sglang_key_file = {sglang.sglang_key_file}": sglang.sglang_key_file,
    }
    of_teacher = {
        f"teacher_url = {sglang.teacher_url}": sglang.teacher_url,
        f"teacher_model = {sglang.teacher_model}": sglang.teacher_model,
        f"teacher_key_file = {sglang.teacher_key_file}": sglang.teacher_key_file,
    }
    engine, teacher = config.rollout.rollout_engine, config.model.teacher
    for flag, value, settings in (("rollout-engine", engine, of_rollouts), ("teacher", teacher, of_teacher)):
        given = next((name for name, setting in settings.items() if setting), "")
        if given and value != SGLANG and not (flag == "teacher" and config.objective.objective == "sft"):
            raise ValueError(
                f"{given} is read with --{flag} sglang only, and {flag.replace('-', '_')} = {value}; give --{flag} sglang, "
                f"or remove it"
            )


def canonical(url: str) -> tuple[str, str, int | None, str]:
    """Equal for spellings of one address."""
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname in LOCAL_HOSTS else parts.hostname or ""
    return parts.scheme, host, parts.port or {"http": 80, "https": 443}.get(parts.scheme), parts.path.rstrip("/")


def check_urls(field: str, urls: list[str], *, key_setting: str = "a key file") -> None:
    for url in urls:
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
        except ValueError:  # a port that is none, a name that no host can have
            is_address = False
        if "@" in url or "?" in url or "#" in url:  # and is not repeated here
            raise ValueError(
                f"{field} holds a user name, a password, a query or a fragment; give the address alone, and the key by "
                f"{key_setting}"
            )
        if not is_address or " " in url:
            raise ValueError(f"{field}: {url!r} is no server address; expected http://HOST:PORT")
    bare = [canonical(url) for url in urls]
    twice = next((url for index, url in enumerate(urls) if bare.index(bare[index]) < index), "")
    if twice:
        raise ValueError(f"{field} names {twice} twice; give each server once, because each is updated once a step")


def check_unread(field: str, is_attaching: bool, *, launched: Mapping[str, bool], attached: Mapping[str, bool]) -> None:
    """ValueError for a setting that nothing would read, of those for servers launched here or for attached ones."""
    unread = next((name for name, is_given in (launched if is_attaching else attached).items() if is_given), "")
    if unread and is_attaching:
        raise ValueError(f"{unread} is for servers that are launched here, but {field} attaches to others; remove either")
    if unread:
        raise ValueError(f"{unread} is for attached servers, but {field} is empty; give {field}, or remove {unread}")


def check_sync_address(sglang: SGLangConfig) -> None:
    remote = [url for url in sglang.sglang_urls if urlsplit(url).hostname not in LOCAL_HOSTS]
    own = {*LOCAL_HOSTS, socket.gethostname(), sglang.weight_sync_address}
    if sglang.weight_sync == "tensor" and (elsewhere := [url for url in remote if urlsplit(url).hostname not in own]):
        raise ValueError(
            f"weight_sync = tensor hands over memory of this host, and {elsewhere[0]} may be another; set weight_sync to "
            f"disk or distributed, or give the server's address as 127.0.0.1"
        )
    if sglang.weight_sync == "distributed" and remote and sglang.weight_sync_address in LOCAL_HOSTS:
        raise ValueError(
            f"weight_sync_address = {sglang.weight_sync_address} is each machine's own, so {remote[0]} cannot reach this one "
            f"by it; give this host's address in the servers' network"
        )


def check_teacher_model(config: Config, tokenizer: TurnTokenizer) -> None:
    """What tokenizer and config.json tell of a teacher behind a server. Raises ValueError."""
    sglang, context = config.sglang, config.rollout.rollout_max_context_len
    if sglang.teacher_top_k > tokenizer.vocab_size:
        raise ValueError(
            f"teacher_top_k = {sglang.teacher_top_k} exceeds the {tokenizer.vocab_size} ids of the student's tokenizer; "
            f"lower it (64 is usual)"
        )
    if not sglang.teacher_model:
        return
    found = read_json(Path(sglang.teacher_model) / "config.json")
    found = found.get("text_config") or found
    longest, num_ids = (found.get(key) for key in ("max_position_embeddings", "vocab_size"))
    if not all(value is None or isinstance(value, int) for value in (longest, num_ids)):
        raise ValueError(
            f"teacher_model = {sglang.teacher_model}: max_position_embeddings {longest!r} and vocab_size {num_ids!r} of its "
            f"config.json must be whole numbers; copy it again"
        )
    if longest and context > longest:  # the server is told to serve any context
        raise ValueError(
            f"rollout_max_context_len = {context} exceeds max_position_embeddings = {longest} of teacher_model = "
            f"{sglang.teacher_model}; lower rollout_max_context_len"
        )
    if num_ids and num_ids < tokenizer.vocab_size:
        raise ValueError(
            f"teacher_model = {sglang.teacher_model} has vocab_size = {num_ids}, the student's tokenizer "
            f"{tokenizer.vocab_size} ids; give a teacher that was made for this tokenizer"
        )


def check_attached(config: Config) -> None:
    """Whether each attached server is there and takes the key; rank 0 asks. Raises ValueError, before the ranks have met."""
    from megatron_tcod.rollout.sglang_server import status_of

    if int(os.environ.get("RANK", "0")) != 0:
        return
    sglang, asked = config.sglang, []
    if config.rollout.rollout_engine == SGLANG:
        asked += [("sglang_urls", url, "sglang_key_file", sglang.sglang_key_file) for url in sglang.sglang_urls]
    if is_teacher_served(config) and sglang.teacher_url:
        asked.append(("teacher_url", sglang.teacher_url, "teacher_key_file", sglang.teacher_key_file))
    for field, url, key_field, key_file in asked:
        status = status_of(url, "/model_info", read_keys(key_file)[0])
        if status == 0:
            raise ValueError(
                f"{field}: no HTTP server answers at {url} within 10 s; start the server first, or give its right address"
            )
        if status in (401, 403):
            given = f"the key in {key_field} = {key_file}" if key_file else f"a request without a key ({key_field} is empty)"
            raise ValueError(f"{field}: {url} refuses {given}; give a file with the server's --api-key in its first line")
        if status != 200:
            raise ValueError(f"{field}: {url} answers /model_info with status {status}; expected an SGLang server")


def check_program(python: str, program: str) -> None:
    if python and not (Path(python).is_file() and os.access(python, os.X_OK)):
        raise ValueError(
            f"sglang_python = {python}: no program that can be run; give the interpreter of SGLang's environment (on a CPU "
            f"tools/sglang_cpu_env.sh makes one)"
        )
    if program.endswith(".py") or not all(part.isidentifier() for part in program.split(".")):
        if not (program.endswith(".py") and Path(program).is_file()):
            raise ValueError(f"sglang_program = {program}: no such file; give a module name or a launcher script")
    if python and not has_sglang(python):
        raise ValueError(
            f"sglang_python = {python} has no package sglang; give the interpreter of the environment that has it (on a CPU "
            f"tools/sglang_cpu_env.sh makes one)"
        )
    if not python and not program.endswith(".py") and importlib.util.find_spec(program.partition(".")[0]) is None:
        raise ValueError(
            f"sglang_program = {program}: not installed beside the trainer; set sglang_python to the interpreter of the "
            f"environment that has it, or attach to servers with sglang_urls"
        )


def has_sglang(python: str) -> bool:
    """Whether an interpreter finds the package, which it does not import."""
    script = "import importlib.util; print(importlib.util.find_spec('sglang') is not None)"
    try:
        told = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return told.stdout.strip() == "True"
