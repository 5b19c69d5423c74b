"""Configuration: frozen dataclasses, one per part, filled from a TOML file and Megatron-named flags.

Precedence, weakest first: the defaults below, the `--fidelity` preset, the TOML files in the order in which they are given
(one for the experiment, one for the machine), the command line. In a file each part is a table (`[parallel]`,
`[curriculum]`, ...); on the command line every field is a flat flag (`--tensor-model-parallel-size 2`).
`load_config(argv)` returns the resolved `Config` or raises `ConfigError` with one message that names the field, what was
expected and the fix. It imports neither torch nor megatron.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import logging
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass as validated

STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ConfigError(ValueError):
    """A setting that the user can fix. The message is complete; no traceback helps."""


class Faults(ConfigError):
    """Several mistakes of the user, one message each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))

    @staticmethod
    def of(error: Exception) -> list[str]:
        """The messages of any error."""
        return error.faults if isinstance(error, Faults) else [str(error)]


def also(*names: str) -> Any:
    """The same field under another flag."""
    return tyro.conf.arg(aliases=list(names))


@validated(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    student: Annotated[str, also("--hf-checkpoint")] = ""
    """Hugging Face directory of the student: config.json, tokenizer.json and, unless `init` is random, safetensors."""
    teacher: Annotated[str, also("--opd-teacher-load")] = ""
    """Hugging Face directory of the frozen teacher, or `sglang`: a server scores, see [sglang]. Not read by sft."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layers: Transformer Engine's modules or megatron-core's own. `auto` takes the first where it imports and a GPU is."""
    init: Literal["load", "random"] = "load"
    """`random` initialises the student from its config.json alone."""
    chat_template: str = "chatml"
    """`chatml` (append-only, Qwen's control tokens), `model` (the directory's own Jinja template) or a template file."""
    system_prompt: str = ""
    """Text of the system message; empty for none."""


@validated(frozen=True, kw_only=True, config=STRICT)
class ParallelConfig:
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the stack of layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """Model chunks per pipeline rank for the interleaved schedule."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the tokens of each microbatch."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts of each layer; divides the ranks that hold the same weights (cp x dp)."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks share the tokens between a layer's matrix products."""
    use_distributed_optimizer: bool = False
    """Data-parallel ranks share Adam's state and the fp32 master weights."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations computed again in the backward pass: whole layers, or the core attention."""
    recompute_method: Literal["uniform", "block"] | None = None
    """full: `uniform` keeps the input of every recompute_num_layers layers, `block` recomputes that many per chunk."""
    recompute_num_layers: int | None = Field(default=None, ge=1)
    """full: layers of a unit (uniform), or recomputed layers of a model chunk (block)."""
    teacher_tensor_model_parallel_size: int | None = Field(default=None, ge=1)
    """The teacher's own; by default the student's."""
    teacher_pipeline_model_parallel_size: int | None = Field(default=None, ge=1)
    """The teacher's own; by default the student's."""
    teacher_expert_model_parallel_size: int | None = Field(default=None, ge=1)
    """The teacher's own; by default the student's."""
    teacher_offload: bool = False
    """Keep the teacher's weights in host memory but while it scores."""
    distributed_timeout_minutes: int = Field(default=30, ge=1)
    """Minutes that a rank waits for the others in a collective, rollouts of ranks that play included."""
    heartbeat_timeout_seconds: float = Field(default=120.0, ge=0)
    """Silence after which a rank counts as dead or stopped and the job ends with its name; 0 turns the watchdog off."""


@validated(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    train_iters: int = Field(default=250, ge=0)
    """Optimizer steps."""
    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from `lr` to `min_lr` over `train_iters`."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first-moment decay rate."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's second-moment decay rate."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW's denominator offset."""
    bf16: bool = False
    """Student and teacher compute in bfloat16; gradients are summed, and Adam steps master weights, in fp32."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm limit; 0 turns clipping off."""
    max_tokens_per_microbatch: Annotated[int, also("--max-tokens-per-gpu")] = Field(default=16384, ge=1)
    """Packed tokens per microbatch; a longer row travels alone."""
    prefix_tree: bool = False
    """Compute the tokens that rows of a task share at their start once, not once a row: the same gradient, fewer tokens."""
    seed: int = 42
    """Of the task order, the sampling and a random initialisation."""
    save: str = "runs/tcod"
    """Run directory: checkpoints, metrics, trajectories, evaluations. An existing run is resumed."""
    save_interval: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    async_save: bool = False
    """Write checkpoints in a thread beside training, from a copy in host memory; at most one at a time."""
    save_hf: bool = False
    """Add model.safetensors to every checkpoint. The last one always has it, tools/convert_checkpoint.py exports any."""
    allow_pickle: bool = False
    """Resume with stock torch, which runs whatever code a checkpoint's files hold. Only for files you trust."""
    trajectory_interval: int = Field(default=1, ge=1)
    """Optimizer steps between steps whose episodes are written to trajectories.jsonl."""
    log_interval: int = Field(default=1, ge=1)
    """Optimizer steps between lines on the console; the first and the last step always have one."""
    tensorboard_dir: str = ""
    """Also write the metrics as TensorBoard events here; empty for none."""


@validated(frozen=True, kw_only=True, config=STRICT)
class CurriculumConfig:
    curriculum: Annotated[Literal["full", "f2b", "b2f"], also("--opd-curriculum-variant")] = "full"
    """`full`: vanilla OPD. `f2b`: the student plays the first k turns. `b2f`: it takes over L - k turns in."""
    k_start: Annotated[int, also("--opd-k-start")] = Field(default=1, ge=1)
    """Window depth at the first step, in turns."""
    eta: Annotated[int, also("--opd-eta")] = Field(default=2, ge=1)
    """Optimizer steps per turn of growth (the paper's stride)."""
    k_max: Annotated[int | None, also("--opd-k-max")] = Field(default=None, ge=1)
    """Largest window depth in turns; by default only max_turns (f2b) and the demonstration (b2f) bound it."""
    step_origin: Literal[0, 1] = 0
    """Number of the first optimizer step in k = k_start + step // eta: 1 in the paper (n = 1..N) and in its code."""
    b2f_stop: Literal["horizon", "demonstration"] = "horizon"
    """Where the b2f student stops: `horizon` is max_turns (released code), `demonstration` is L (paper)."""
    missing_demonstration: Literal["outcome", "full"] = "outcome"
    """b2f task without a demonstration: counted as `no_demonstration`, or played in full (released code)."""
    demonstrations: Annotated[str, also("--opd-b2f-trajectory-path")] = ""
    """JSONL of demonstrations: replayed by b2f, imitated by sft. `expert` asks the environment's own expert."""
    mistake_rate: float = Field(default=0.0, ge=0, lt=1)
    """sft on `expert`: share of turns at which a mistake is injected, not imitated, for the expert to recover from."""


@validated(frozen=True, kw_only=True, config=STRICT)
class ObjectiveConfig:
    objective: Literal["reverse_kl", "forward_kl", "jsd", "sampled_token", "sft"] = "reverse_kl"
    """Per-token loss. reverse_kl = KL(student||teacher), forward_kl = KL(teacher||student)."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """Teacher weight of the jsd mixture."""
    kl_coef: Annotated[float, also("--opd-kl-coef")] = 1.0
    """sampled_token: scale of the log-ratio advantage."""
    eps_clip: float = Field(default=0.2, gt=0, le=1)
    """sampled_token: lower PPO clip range."""
    eps_clip_high: float = Field(default=0.2, gt=0)
    """sampled_token: upper PPO clip range."""
    eps_clip_c: float = Field(default=3.0, gt=1)
    """sampled_token: dual-clip bound for negative advantages."""
    teacher_temperature: float = Field(default=1.0, gt=0)
    """Divides the teacher's logits. The student's are divided by rollout_temperature."""
    loss_aggregation: Literal["token_mean", "turn_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """How per-token losses become one number; see packing.py."""
    divergence_backend: Literal["auto", "cuda", "triton", "cpp", "torch"] = "auto"
    """Who computes on chunks of logits; auto takes the fastest that runs here and logs it. See ops/backends.py."""
    divergence_packed: bool = False
    """Keep a chunk's logits between their two reads as fp16 (s, s - t): half the memory, statistics still from fp32."""


@validated(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    rollout_engine: Literal["embedded", "sglang"] = "embedded"
    """Who generates: `embedded` decodes in the trainer's processes, `sglang` are servers of their own; see [sglang]."""
    server: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """SGLang's own flags for servers that are launched here, passed on untouched: [rollout.server] tp_size = 2. In the
    file only."""
    max_staleness: int = Field(default=0, ge=0)
    """Optimizer steps that the weights of a sampled token may be behind those that train on it. 0 plays and trains in
    turn; above it the servers play the coming steps while one trains."""
    rollout_batch_size: int = Field(default=16, ge=1)
    """Tasks per optimizer step, over all data-parallel replicas."""
    n_samples_per_prompt: int = Field(default=1, ge=1)
    """Episodes per task and step."""
    rollout_temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the divergence uses the same."""
    rollout_top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampler."""
    rollout_max_response_len: int = Field(default=512, ge=1)
    """Tokens per turn."""
    rollout_max_context_len: int = Field(default=16384, ge=2)
    """Tokens per row; an episode that would exceed it ends with `context_length`."""
    max_turns: int = Field(default=30, ge=1)
    """Horizon of an episode, replayed turns included."""
    history_mode: Literal["full", "compact"] = "full"
    """`full`: the whole conversation. `compact`: task and the last `history_length` observation/action lines."""
    history_length: int = Field(default=2, ge=0)
    """Observation/action lines in compact mode."""
    action_format: Literal["plain", "tags"] = "plain"
    """`plain`: the answer is the command. `tags`: <think>...</think><action>...</action>."""
    max_running_requests: int = Field(default=64, ge=1)
    """Completions decoded together by the embedded engine, per rank; requests with one server at a time."""
    max_total_tokens: int = Field(default=262144, ge=1)
    """Token budget of the embedded engine's radix cache, per rank."""


@validated(frozen=True, kw_only=True, config=STRICT)
class SGLangConfig:
    sglang_urls: list[str] = Field(default_factory=list)
    """Servers to attach to, dealt evenly to the data-parallel replicas; empty launches servers on this machine."""
    sglang_key_file: str = ""
    """File with the API key of the attached servers in its first line and, if it differs, their admin key in the second."""
    servers_per_replica: int = Field(default=1, ge=1)
    """Servers that each data-parallel replica launches."""
    sglang_python: str = ""
    """Interpreter of the environment that SGLang is installed in; by default this one."""
    sglang_program: str = "sglang.launch_server"
    """Module to run, or path of a launcher script."""
    weight_sync: Literal["auto", "tensor", "disk", "distributed"] = "auto"
    """How new weights travel. `tensor`: in the request, same host. `disk`: a directory that all see, below the run's.
    `distributed`: broadcast by NCCL, or gloo on CPUs. `auto`: tensor to launched servers, disk to attached ones."""
    weight_sync_address: str = "127.0.0.1"
    """distributed: this host's address as the servers reach it."""
    weight_probe_tolerance: float = Field(default=0.05, ge=0)
    """After each update the servers' log-probabilities of a probe must be as near to the trainer's; 0 asks no probe."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds a request may take with its retries."""
    server_start_timeout: float = Field(default=900.0, gt=0)
    """Seconds until a launched server must be healthy."""
    teacher_url: str = ""
    """teacher = sglang: the server to attach to."""
    teacher_key_file: str = ""
    """File with the teacher's API key in its first line."""
    teacher_model: str = ""
    """teacher = sglang: Hugging Face directory to launch a server with on this machine, instead of teacher_url."""
    teacher_server: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """SGLang's own flags for a teacher that is launched here: [sglang.teacher_server]. In the file only."""
    teacher_top_k: int = Field(default=64, ge=0)
    """Likeliest tokens that the teacher's server sends a position; 0 for the sampled token alone."""
    teacher_max_inflight_tokens: int = Field(default=131072, ge=1)
    """Tokens that may be with the teacher's server at a time."""


@validated(frozen=True, kw_only=True, config=STRICT)
class EnvironmentConfig:
    env: str = "household"
    """Name in megatron_tcod.envs.ENVS."""
    train_split: str = "train"
    """Split that training tasks come from."""
    train_tasks: int | None = Field(default=None, ge=1)
    """Training tasks taken from the start of the split; by default all that the environment lists."""
    env_options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """The environment's own options, the same for both splits."""
    max_open_environments: int | None = Field(default=None, ge=1)
    """Environments that a rank holds open at a time; by default those of all its episodes, and of processes 128."""
    max_observation_bytes: int = Field(default=1 << 18, ge=1)
    """A longer observation ends its episode as `env_oversized`."""
    stuck_after: int = Field(default=10, ge=0)
    """Different accepted commands in a row, all answered alike, that end an episode as `env_stuck`; 0 for never."""
    max_diverged: float = Field(default=1.0, gt=0, le=1)
    """Share of a step's replays that may diverge or be rejected; more stop the run. 1 for any."""
    max_env_faults: float = Field(default=1.0, gt=0, le=1)
    """Share of a step's episodes whose environments may break; more stop the run. 1 for any."""


@validated(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    eval_split: str = "held_out"
    """Split that evaluation tasks come from."""
    eval_tasks: int | None = Field(default=None, ge=1)
    """Tasks played, from the start of the split; by default all."""
    eval_interval: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations during training; 0 for none."""
    eval_at_end: bool = True
    """Evaluate after the last step."""
    eval_temperature: float = Field(default=0.4, ge=0)
    """0 is greedy."""
    eval_seed: int = 7
    """Of the evaluation's sampling."""
    eval_samples: int = Field(default=1, ge=1)
    """Episodes per task: pass@1 and pass@k up to this many."""


@validated(frozen=True, kw_only=True, config=STRICT)
class DemonstrationConfig:
    demonstration_tasks: int | None = Field(default=None, ge=1)
    """Training tasks that the teacher is asked to solve; by default all."""
    demonstration_samples: int = Field(default=10, ge=1)
    """Attempts per task (the paper's pass@10); the shortest success is kept."""
    demonstration_temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of the teacher."""


@validated(frozen=True, kw_only=True, config=STRICT)
class EndpointConfig:
    endpoint_url: str = ""
    """evaluate, demonstrate: a server that plays in the model's place, http(s)://HOST[:PORT][/v1]."""
    endpoint_api: Literal["chat", "sglang"] = "chat"
    """`chat`: OpenAI's /chat/completions, text only. `sglang`: /generate, with the token ids of the student's tokenizer."""
    endpoint_model: str = ""
    """chat: the model's name there; empty where the endpoint serves just one."""
    endpoint_key_env: str = ""
    """Environment variable that holds the API key; empty sends none."""
    endpoint_timeout: float = Field(default=600.0, gt=0)
    """Seconds a request may take with its retries."""
    endpoint_omit: list[str] = Field(default_factory=list)
    """chat: fields of a request that the endpoint does not take: seed, top_p, max_tokens."""
    endpoint_extra: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """chat: more fields of every request: [endpoint.endpoint_extra] max_completion_tokens = 512. In the file only."""


FIDELITY: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "objective": {"objective": "forward_kl", "loss_aggregation": "sequence_sum"},
        "curriculum": {"step_origin": 1, "b2f_stop": "demonstration", "missing_demonstration": "outcome", "eta": 2},
        "rollout": {"history_mode": "full", "action_format": "tags"},
    },
    "repo": {
        "objective": {"objective": "sampled_token", "loss_aggregation": "token_mean", "kl_coef": 1.0, "eps_clip_c": 3.0},
        "curriculum": {"step_origin": 1, "b2f_stop": "horizon", "missing_demonstration": "full", "eta": 5},
        "rollout": {"history_mode": "compact", "history_length": 2, "action_format": "tags"},
    },
}
"""Every switch at which the paper (arXiv 2604.24005, Eq. 2-5) and its released code differ."""


@validated(frozen=True, kw_only=True, config=STRICT)
class Config:
    """Everything a run needs. Example: `load_config(["--config", "run.toml", "--curriculum", "b2f"])`."""

    fidelity: Literal["none", "paper", "repo"] = "none"
    """Sets every switch where the paper and its released code differ; file and flags still override single ones."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    curriculum: CurriculumConfig = dataclasses.field(default_factory=CurriculumConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    sglang: SGLangConfig = dataclasses.field(default_factory=SGLangConfig)
    environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    demonstration: DemonstrationConfig = dataclasses.field(default_factory=DemonstrationConfig)
    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)

    def __post_init__(self) -> None:
        if faults := list(disagreements(self)):
            raise Faults(faults)


def disagreements(config: Config) -> Iterator[str]:
    """The rules that span several fields: a message for each that is broken, with the fields and the fix."""
    curriculum, rollout, objective = config.curriculum, config.rollout, config.objective.objective
    if curriculum.curriculum == "b2f" and not curriculum.demonstrations:
        yield (
            "demonstrations is empty but curriculum = b2f replays them; give --demonstrations FILE, "
            "made by python -m megatron_tcod.demonstrate"
        )
    elif objective == "sft" and not curriculum.demonstrations:
        yield "demonstrations is empty but objective = sft imitates them; give a JSONL file or `expert`"
    if objective != "sft" and curriculum.demonstrations == "expert":
        yield "demonstrations = expert is for objective = sft; record a file with megatron_tcod.demonstrate"
    if curriculum.curriculum in ("f2b", "b2f") and curriculum.k_start > rollout.max_turns:
        yield (
            f"k_start = {curriculum.k_start} exceeds max_turns = {rollout.max_turns}: every window would be a whole episode; "
            f"lower k_start, or set curriculum = full"
        )
    if curriculum.curriculum == "f2b" and curriculum.k_max is not None and curriculum.k_max > rollout.max_turns:
        yield f"k_max = {curriculum.k_max} exceeds max_turns = {rollout.max_turns}; lower k_max"
    if curriculum.k_max is not None and curriculum.k_max < curriculum.k_start:
        yield f"k_max = {curriculum.k_max} is below k_start = {curriculum.k_start}; raise k_max"
    if config.objective.eps_clip_c <= 1 + config.objective.eps_clip_high:
        yield (
            f"eps_clip_c = {config.objective.eps_clip_c} must exceed 1 + eps_clip_high = "
            f"{1 + config.objective.eps_clip_high}; 3.0 is usual"
        )
    if config.training.lr < config.training.min_lr:
        yield f"min_lr = {config.training.min_lr} exceeds lr = {config.training.lr}; lower min_lr"
    yield from disagreements_with_servers(config)


SGLANG = "sglang"


def disagreements_with_servers(config: Config) -> Iterator[str]:
    """What a rollout engine or a teacher behind servers asks of the other settings, as `disagreements`."""
    rollout, sglang, objective = config.rollout, config.sglang, config.objective
    if rollout.max_staleness and rollout.rollout_engine != SGLANG:
        yield (
            f"max_staleness = {rollout.max_staleness} plays while the trainer trains, which the embedded engine cannot; "
            f"set rollout_engine = sglang, or max_staleness = 0"
        )
    if rollout.max_staleness and objective.objective == "sft":
        yield (
            f"max_staleness = {rollout.max_staleness} is about episodes that are trained on, and objective = sft trains on "
            f"recorded ones; set max_staleness = 0"
        )
    if config.model.teacher != SGLANG or objective.objective == "sft":
        return
    if bool(sglang.teacher_url) == bool(sglang.teacher_model):
        yield (
            f"teacher = sglang needs one of teacher_url (a server to attach to, {sglang.teacher_url!r}) and teacher_model "
            f"(a directory to launch one with, {sglang.teacher_model!r}); give exactly one"
        )
    if not sglang.teacher_top_k and objective.objective != "sampled_token":
        yield (
            f"teacher_top_k = 0 asks the teacher's server for the sampled token alone, objective = {objective.objective} "
            f"compares distributions; raise teacher_top_k (64 is usual), or set objective = sampled_token"
        )
    if objective.teacher_temperature != 1.0:
        yield (
            f"teacher_temperature = {objective.teacher_temperature}, but a server's log-probabilities are of temperature 1; "
            f"set teacher_temperature = 1.0"
        )


FILE_ONLY = (("rollout", "server"), ("sglang", "teacher_server"), ("endpoint", "endpoint_extra"))
"""Tables of another program's flags, which cannot be flags of ours."""

PARTS = {field.name: field.default_factory for field in dataclasses.fields(Config) if field.name != "fidelity"}


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain tables, ready for JSON."""
    return dataclasses.asdict(config)


def nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def unknown_names(tables: dict[str, Any]) -> Iterator[str]:
    """A message for each table and key that is none of ours, with where it belongs or the nearest name."""
    homes = {field.name: part for part, kind in PARTS.items() for field in dataclasses.fields(kind)}
    for part, table in tables.items():
        if part == "fidelity":
            continue
        if part not in PARTS:
            where = f"it belongs under [{homes[part]}]" if part in homes else nearest(part, [*PARTS, "fidelity"])
            yield f"unknown table or top-level key {part!r}; {where}"
        elif not isinstance(table, dict):
            yield f"[{part}] must be a table, got {table!r}"
        else:
            known = [field.name for field in dataclasses.fields(PARTS[part])]
            for key in (key for key in table if key not in known):
                where = f"it belongs under [{homes[key]}]" if key in homes else nearest(key, known)
                yield f"unknown key {key!r} in [{part}]; {where}"


def read_file(path: str) -> dict[str, dict[str, Any]]:
    """A TOML file as tables; ConfigError for an unreadable file; `Faults` for unknown tables and keys."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; give an existing TOML file to --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from None
    if faults := [f"{path}: {fault}" for fault in unknown_names(tables)]:
        raise Faults(faults)
    return tables


def build(tables: dict[str, Any], source: str) -> Config:
    """A Config from plain tables; ConfigError names the fields that do not fit."""
    try:
        return Config(**{name: PARTS[name](**table) if name in PARTS else table for name, table in tables.items()})
    except pydantic.ValidationError as error:
        if isinstance(cause := error.errors()[0].get("ctx", {}).get("error"), ConfigError):
            raise cause from None
        raise Faults(f"{source}: {told}" for told in complaints(error)) from None


def complaints(error: pydantic.ValidationError) -> list[str]:
    """What pydantic complains of, a line each: field, expectation, value."""
    return [
        f"{'.'.join(map(str, one['loc'])) or error.title}: {one['msg']}, got {one['input']!r}" for one in error.errors()
    ]


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return merged


def take_all(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Every value of `--flag VALUE` or `--flag=VALUE`, in order, and the other arguments."""
    values, rest, left = [], [], list(argv)
    while left:
        argument = left.pop(0)
        if argument == flag and not left:
            raise ConfigError(f"{flag} needs a value")
        if argument == flag:
            values.append(left.pop(0))
        elif argument.startswith(flag + "="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return values, rest


def take_flag(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The one value of a flag, None where it is not given, and the other arguments."""
    values, rest = take_all(argv, flag)
    if len(values) > 1:
        raise ConfigError(f"{flag} is given twice; give it once")
    return (values[0] if values else None), rest


def take_switch(argv: Sequence[str], switch: str) -> tuple[bool, list[str]]:
    """Whether `switch` is among the arguments, and the other arguments."""
    return switch in argv, [argument for argument in argv if argument != switch]


def load_config(argv: Sequence[str], *, prog: str = "megatron_tcod") -> Config:
    """Resolve defaults, fidelity preset, each `--config FILE` and flags. --help prints and leaves by SystemExit(0)."""
    paths, rest = take_all(list(argv), "--config")
    tables = merge(*(read_file(path) for path in paths))
    fidelity, rest = take_flag(rest, "--fidelity")
    fidelity = fidelity or tables.get("fidelity", "none")
    if fidelity not in ("none", *FIDELITY):
        raise ConfigError(f"fidelity = {fidelity!r}; {nearest(str(fidelity), ['none', *FIDELITY])}")
    layers = merge(FIDELITY.get(fidelity, {}), tables, {"fidelity": fidelity})
    return parse_flags(layers, " and ".join(paths) or "defaults", rest, prog)


def parse_flags(tables: dict[str, Any], source: str, argv: list[str], prog: str) -> Config:
    """Flags over tables. The cross-field rules run once, on the result."""
    parts, faults = {}, []
    for name, kind in PARTS.items():
        try:
            parts[name] = kind(**tables.get(name, {}))
        except pydantic.ValidationError as error:
            faults += [f"{source}: [{name}] {told}" for told in complaints(error)]
    if faults:
        raise Faults(faults)
    from_file = {(part, key): tables.get(part, {}).get(key, {}) for part, key in FILE_ONLY}
    options_of_file = tables.get("environment", {}).get("env_options", {})
    for part, key in (*FILE_ONLY, ("environment", "env_options")):  # their entries are no flags of ours
        parts[part] = dataclasses.replace(parts[part], **{key: {}})
    unchecked = dataclasses.make_dataclass(
        "Flags", [(name, PARTS[name], dataclasses.field(default=part)) for name, part in parts.items()], kw_only=True
    )
    unchecked.__doc__ = "Every flag is also a key of the TOML file given to --config FILE; --fidelity paper|repo presets."
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint), redirect_stdout(sys.stdout):
            flags = tyro.cli(unchecked, args=argv, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    except pydantic.ValidationError as error:
        raise Faults(complaints(error)) from None
    except SystemExit as leaving:
        if not leaving.code:
            raise
        raise ConfigError(explain_flag_error(argv, complaint.getvalue())) from None
    chosen = {name: dataclasses.asdict(getattr(flags, name)) for name in PARTS}
    for (part, key), table in from_file.items():
        chosen[part][key] = table
    options = {name: scalar(value) for name, value in chosen["environment"]["env_options"].items()}
    chosen["environment"]["env_options"] = options_of_file | options
    return build({**chosen, "fidelity": tables["fidelity"]}, "settings")


def scalar(text: Any) -> Any:
    """A flag's text as the TOML value it spells: a number, true or false; any other text as it is."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def explain_flag_error(argv: list[str], complaint: str) -> str:
    """One line instead of tyro's box: the unknown flag with its nearest name, or what the box says."""
    known = ["--" + field.name.replace("_", "-") for kind in PARTS.values() for field in dataclasses.fields(kind)]
    for argument in argv if "nrecognized" in complaint else ():
        flag = argument.partition("=")[0].replace("_", "-")
        for part, key in FILE_ONLY:
            if flag == "--" + key.replace("_", "-"):
                return f"{flag} is no flag: give [{part}.{key}] in a file of --config, with the server's own names in it"
        if flag.startswith("--") and flag not in known and not flag.startswith(("--opd-", "--no-")):
            hint = nearest(flag, known) if difflib.get_close_matches(flag, known, n=1) else "--help lists the flags"
            return f"unknown flag {flag}; {hint}"
    lines = [line.strip(" │╭╮╰╯─\n") for line in complaint.splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("For full", "Parsing error")))
    if bound := re.search(r"validation errors? for \w+ (\w+) (.+?) \[type=\w+, input_value=(.+?), input_type", text):
        return f"--{bound[1].replace('_', '-')}: {bound[2]}, got {bound[3]}"
    return text.partition(" Argument helptext")[0].removeprefix("Value error ").removeprefix("Invalid choice ")


def to_toml(config: Config) -> str:
    """The resolved configuration as a file that `--config` reads back to the same Config."""
    lines = [f"fidelity = {json.dumps(config.fidelity)}"]
    for part in PARTS:
        lines += ["", f"[{part}]"]
        for key, value in dataclasses.asdict(getattr(config, part)).items():
            if value is not None:
                lines.append(f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML spells it; JSON spells all but tables alike."""
    if isinstance(value, dict):
        items = ", ".join(f"{json.dumps(name)} = {toml_value(item)}" for name, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value)


def log_to_console() -> None:
    """Messages of this package on stderr, from the first rank; other packages' from warnings up."""
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING if is_first else logging.ERROR, format="%(message)s")
    if is_first:
        logging.getLogger("megatron_tcod").setLevel(logging.INFO)


def run_entry_point(main: Callable[[list[str]], int | None]) -> None:
    """Call an entry point; a user's mistake becomes one line on stderr, each of several its own, and exit code 2.

    Before the ranks meet all of them find the same mistake and the first one speaks; after that any of them may.
    """
    try:
        raise SystemExit(main(sys.argv[1:]) or 0)
    except KeyboardInterrupt:
        print("error: interrupted before there was anything to save", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        rank = os.environ.get("RANK", "0")
        torch = sys.modules.get("torch")
        have_met = torch is not None and torch.distributed.is_initialized()
        if rank == "0" or have_met:
            said = "error: " if rank == "0" else f"error (rank {rank}): "
            print("\n".join(said + fault for fault in Faults.of(error)), file=sys.stderr)
        logging.getLogger("megatron_tcod").debug("traceback of the error above", exc_info=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):  # gloo's words
            raise
        print(f"error (rank {os.environ.get('RANK', '0')}): another rank ended; its message says why", file=sys.stderr)
        raise SystemExit(3) from None
