"""What a step costs, from formulas: bytes on a rank, arithmetic and traffic of each phase, seconds. A model, no measurement.

    memory = rank_memory(student, teacher, layout, numerics, workload, serving)      # MemoryUse of the fullest stage
    phases = step_phases(student, teacher, layout, numerics, workload, serving, DEVICES["h200"])

It covers what grows with the model and the work: weights, gradients, optimizer, kept activations, KV, the teacher, the
divergence's chunks of logits; matrix products, attention, collectives. It leaves out environments, tokenizers, records,
fragmentation and whatever a framework allocates for itself; the efficiencies of `Device` are what such machines usually
reach, not what this code was seen to reach. Weights, gradients, optimizer and activations are held against a real model
in tests/test_cost_model.py.

    parameters of a layer    H (n + 2 n_kv) D + n D H + 3 H F + norms          n query heads of D channels, n_kv key heads
                             3 H F for each expert, and a router; a token meets those that it is sent to
    forward, per token       2 x parameters in products + 2 n D L per layer    L tokens of the row, half of them visible
    with gradients           3 x that; 4 x where whole layers are recomputed
    output head, S rows      2 S H V forward, as much for each of its two gradients; the teacher's 2 S H_t V
    ring all-reduce          2 (p - 1) / p of the bytes sent by each of p ranks; gather or scatter half of it
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megatron_tcod.model.shape import ModelShape, padded_vocab_size
from megatron_tcod.ops.chunk_loop import CHUNK_BYTES, CHUNK_ROWS

GRADIENT_BYTES = 4  # main_grad is fp32 whatever the weights are
MOMENT_BYTES = 8  # Adam's two, fp32
SUMS_BYTES = 10 * 8  # of a row and shard, in the divergence's all-gather


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ranks are laid out. Example: `Layout(tp=8, pp=2, dp=4)` has 64 ranks."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    """Of the cp * dp ranks that hold the same weights, those that share out the experts."""
    chunks: int = 1
    """The student's model chunks per pipeline rank; a teacher's stages are whole."""
    sequence_parallel: bool = False
    teacher_tp: int | None = None
    """The teacher's own, over the same ranks; by default the student's."""
    teacher_pp: int | None = None
    teacher_ep: int | None = None

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def of_teacher(self) -> Layout:
        """The teacher's; the student's where it has none of its own."""
        tp, pp, ep = self.teacher_tp or self.tp, self.teacher_pp or self.pp, self.teacher_ep or self.ep
        if (tp, pp, ep) == (self.tp, self.pp, self.ep):
            return replace(self, chunks=1, teacher_tp=None, teacher_pp=None, teacher_ep=None)
        is_parallel = self.sequence_parallel and tp > 1
        return Layout(tp=tp, pp=pp, ep=ep, dp=self.world // (tp * pp), sequence_parallel=is_parallel)

    @property
    def told(self) -> str:
        own, chunks = self.of_teacher, f" x virtual {self.chunks}" if self.chunks > 1 else ""
        teacher = f", teacher tp {own.tp}, pp {own.pp}" + own._told_experts if self.is_teacher_cut_otherwise else ""
        return f"tp {self.tp}, pp {self.pp}{chunks}, cp {self.cp}, dp {self.dp}{self._told_experts}{teacher}"

    @property
    def is_teacher_cut_otherwise(self) -> bool:
        own = self.of_teacher
        return (own.tp, own.pp, own.ep) != (self.tp, self.pp, self.ep)

    @property
    def _told_experts(self) -> str:
        return f", ep {self.ep}" if self.ep > 1 else ""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What is kept, and how wide. Example: `Numerics(weight_bytes=2, is_optimizer_sharded=True, recompute="full")`"""

    weight_bytes: int = 4
    """4: fp32. 2: bf16, with fp32 copies in the optimizer."""
    is_optimizer_sharded: bool = False
    """Copies and moments divided over data-parallel ranks (Megatron's distributed optimizer)."""
    recompute: str = "none"
    """`none`, `selective` (the core attention) or `full` (whole layers)."""
    is_teacher_offloaded: bool = False
    """The teacher's weights are in host memory while the student trains."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one optimizer step. Example: `Workload(episodes=128, turns=10, prompt_tokens=600)`"""

    episodes: int
    turns: float = 10.0
    prompt_tokens: float = 600.0
    """Before the first answer, shared by the samples of a task."""
    observation_tokens: float = 100.0
    """That the environment adds per turn."""
    response_tokens: float = 150.0
    """Sampled per turn."""
    samples: int = 1
    """Episodes per task."""
    microbatch_tokens: int = 16384

    @property
    def row_tokens(self) -> float:
        return self.prompt_tokens + self.turns * (self.observation_tokens + self.response_tokens)

    @property
    def tokens(self) -> float:
        return self.episodes * self.row_tokens

    @property
    def trained(self) -> float:
        """Positions with a loss."""
        return self.episodes * self.turns * self.response_tokens

    def microbatches(self, layout: Layout) -> int:
        """Of one replica."""
        rows = max(1, int(self.microbatch_tokens // self.row_tokens))
        return max(1, math.ceil(self.episodes / layout.dp / rows))

    def microbatch(self, layout: Layout) -> float:
        """Tokens of one microbatch."""
        return self.tokens / layout.dp / self.microbatches(layout)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Who plays. Example: `Serving(servers=8, ranks_per_server=1, kv_tokens=200_000)`"""

    servers: int
    ranks_per_server: int = 1
    weight_bytes: int = 2
    kv_bytes: int = 2
    kv_tokens: int = 0
    """Positions that one server keeps."""
    max_running: int = 256
    is_on_host: bool = False
    """The embedded engine: plain torch on the CPU, a whole model in every rank."""
    is_released: bool = True
    """Weights and cache leave the device while the models train."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one process on a CPU. Rates in units a second."""

    memory: float
    flops: float
    """Dense, of the usual type: bf16 on a GPU, fp32 on a CPU."""
    bandwidth: float
    """Of its memory, bytes."""
    link: float
    """Bytes to and from the ranks of its node."""
    network: float
    """Bytes to and from another node."""
    per_node: int
    train_efficiency: float = 0.40
    forward_efficiency: float = 0.50
    copy_efficiency: float = 0.70
    decode_overhead: float = 4e-3
    """Seconds of one decoding step that no arithmetic explains."""
    fp32_slowdown: float = 2.0
    """Of products with fp32 weights; TF32 on a GPU."""

    def way(self, ranks: int) -> float:
        """Bytes a second between neighbouring `ranks`."""
        return self.link if ranks <= self.per_node else self.network


DEVICES = {
    "a100": Device(memory=80 * 2**30, flops=312e12, bandwidth=2.0e12, link=300e9, network=25e9, per_node=8),
    "h100": Device(memory=80 * 2**30, flops=989e12, bandwidth=3.35e12, link=450e9, network=50e9, per_node=8),
    "h200": Device(memory=141e9, flops=989e12, bandwidth=4.8e12, link=450e9, network=50e9, per_node=8),
    "b200": Device(memory=192e9, flops=2250e12, bandwidth=8.0e12, link=900e9, network=50e9, per_node=8),
    "cpu": Device(
        memory=8 * 2**30, flops=100e9, bandwidth=10e9, link=1e9, network=1e9, per_node=2, train_efficiency=0.5,
        decode_overhead=2e-3, fp32_slowdown=1.0,
    ),
}  # fmt: skip
"""Data sheets, dense rates; `cpu` is one core of a server with AVX-512."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes on the rank of the stage that holds most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    chunk: float
    """The divergence's logits, and the hidden states' gradients."""
    teacher: float
    """Weights, and its hidden states of one step."""
    serving: float
    """Weights of the server or embedded engine."""
    kv: float
    is_released: bool

    @property
    def training(self) -> float:
        """The peak while the models train."""
        play = 0.0 if self.is_released else self.serving + self.kv
        return self.weights + self.gradients + self.optimizer + self.activations + self.chunk + self.teacher + play

    @property
    def playing(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.teacher + self.serving + self.kv

    @property
    def peak(self) -> float:
        return max(self.training, self.playing)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a step."""

    flops: float
    """Of the whole job."""
    sent: float
    """Bytes that one rank sends."""
    seconds: float


def layer_parameters(shape: ModelShape, tp: int = 1, ep: int = 1, *, of_one_token: bool = False) -> int:
    """Of one layer on one tensor- and expert-parallel rank; all of them, or those that a token is multiplied with."""
    heads, groups, width, hidden = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels, shape.hidden_size
    qkv = hidden * (heads + 2 * groups) * width // tp
    bias = (heads + 2 * groups) * width // tp if shape.add_qkv_bias else 0
    norms = 2 * hidden + (2 * width if shape.qk_layernorm else 0)
    if (experts := shape.experts) is None:
        mlp = 3 * hidden * shape.ffn_hidden_size // tp
    else:
        held = expert_parameters(shape, tp, ep)
        met = experts.num_experts_per_token * (held // (experts.num_experts // ep))
        mlp = hidden * experts.num_experts + (met if of_one_token else held)
    return qkv + bias + heads * width * hidden // tp + mlp + norms


def expert_parameters(shape: ModelShape, tp: int, ep: int) -> int:
    """Of the experts of one layer that a rank holds, without the router."""
    if (experts := shape.experts) is None:
        return 0
    return experts.num_experts // ep * (3 * shape.hidden_size * experts.ffn_hidden_size // tp)


def stage_parameters(shape: ModelShape, tp: int, pp: int, stage: int, ep: int = 1) -> int:
    """On one rank of a pipeline stage. A tied head on a last stage that is not the first is a copy."""
    vocabulary = padded_vocab_size(shape.vocab_size, tp) // tp * shape.hidden_size
    is_first, is_last = stage == 0, stage == pp - 1
    has_head = is_last and not (shape.tie_word_embeddings and is_first)
    layers = shape.num_layers // pp * layer_parameters(shape, tp, ep)
    return layers + is_first * vocabulary + has_head * vocabulary + is_last * shape.hidden_size


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model, its vocabulary padded as for one rank."""
    return stage_parameters(shape, 1, 1, 0)


def kv_token_bytes(shape: ModelShape, width: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * width


def layer_activations(shape: ModelShape, tp: int, *, recompute: str = "none", sequence_parallel: bool = False) -> float:
    """Numbers that one layer keeps of a token for the backward pass, on one tensor-parallel rank.

    Two norms and two products keep their inputs (4 H, whole on every rank unless sequence parallel), the head norms a copy of
    q and, because the keys they keep are a view of it, the whole of qkv, the core attention q, k, v and its output, the
    output projection its input, SwiGLU 2 F and the last product F; of each expert that a token goes to, its input, and F once
    more where the router's weight is applied. Packed rows of unequal length are padded for the
    attention, which is not counted.
    """
    hidden, queries, keys = shape.hidden_size, *(
        heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups)
    )
    mlp = 3 * shape.ffn_hidden_size
    if (experts := shape.experts) is not None:
        mlp = experts.num_experts_per_token * (hidden + 4 * experts.ffn_hidden_size)
    spread = tp if sequence_parallel else 1
    if recompute == "full":
        return hidden / spread
    head_norms = 2 * queries + 2 * keys if shape.qk_layernorm else 0
    core = queries + 2 * keys if recompute == "selective" else 2 * queries + 2 * keys
    return 4 * hidden / spread + (head_norms + core + queries + mlp) / tp


def most_in_flight(layout: Layout, stage: int, microbatches: int) -> int:
    """Passes through one of a rank's chunks that wait for their backward pass at a time, in Megatron's 1F1B schedule and its
    interleaved one, which fills up to a multiple of pp microbatches."""
    if layout.chunks == 1:
        return min(layout.pp - stage, microbatches)
    padded = -(-microbatches // layout.pp) * layout.pp
    return min(2 * (layout.pp - stage - 1) + (layout.chunks - 1) * layout.pp + 1, padded * layout.chunks)


def activation_bytes(
    shape: ModelShape, layout: Layout, numerics: Numerics, tokens: float, *, in_flight: float, stage: int
) -> float:
    """Kept on one rank of a stage by `in_flight` microbatches of `tokens`, and what one recomputed layer needs."""
    kept = layer_activations(
        shape, layout.tp, recompute=numerics.recompute, sequence_parallel=layout.sequence_parallel
    ) * (shape.num_layers // layout.pp)
    once = layer_activations(shape, layout.tp) if numerics.recompute == "full" else 0
    final_norm = 2 * shape.hidden_size if stage == layout.pp - 1 else 0
    return numerics.weight_bytes * tokens / layout.cp * (in_flight * (kept + final_norm) + once)


def chunk_bytes(shape: ModelShape, tp: int, rows: float, *, has_teacher: bool, kind: str) -> float:
    """Pairs of fp32 logits of a chunk, and the fp32 hidden gradients of all `rows` of a microbatch. With several shards
    the next chunk is there already while a chunk's sums travel."""
    columns = padded_vocab_size(shape.vocab_size, tp) // tp
    fewest, most = CHUNK_ROWS[kind]
    largest = min(max(fewest, CHUNK_BYTES[kind] // (4 * columns)), most)
    count = max(math.ceil(rows / largest), 1)
    chunk = max(rows / count, 1) * min(count, 1 if tp == 1 else 2)
    return 4 * chunk * columns * (2 if has_teacher else 1) + 4 * rows * shape.hidden_size


def rank_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    numerics: Numerics,
    workload: Workload,
    serving: Serving,
    *,
    kind: str = "cuda",
) -> MemoryUse:
    """On the stage that holds most."""
    stages = {0, layout.pp - 1}
    uses = [_stage_memory(student, teacher, layout, numerics, workload, serving, stage, kind) for stage in stages]
    return max(uses, key=lambda use: use.peak)


def _stage_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    numerics: Numerics,
    workload: Workload,
    serving: Serving,
    stage: int,
    kind: str,
) -> MemoryUse:
    is_last = stage == layout.pp - 1
    parameters = stage_parameters(student, layout.tp, layout.pp, stage, layout.ep)
    shared = student.num_layers // layout.pp * expert_parameters(student, layout.tp, layout.ep)
    stepped = (parameters + (layout.ep - 1) * shared) / (layout.dp * layout.cp)  # experts are on fewer ranks
    copies = MOMENT_BYTES + (4 if numerics.weight_bytes == 2 else 0)
    tokens, count = workload.microbatch(layout), workload.microbatches(layout)
    trained = tokens * workload.trained / workload.tokens
    teachers = 0.0
    if teacher is not None:
        own = layout.of_teacher
        cuts = [0, own.pp - 1] if layout.is_teacher_cut_otherwise else [stage]  # in its own a rank may hold any stage
        teachers = numerics.weight_bytes * max(stage_parameters(teacher, own.tp, own.pp, cut, own.ep) for cut in cuts)
        targets = workload.trained / layout.dp * teacher.hidden_size * numerics.weight_bytes if is_last else 0.0
        head = numerics.weight_bytes * padded_vocab_size(teacher.vocab_size, layout.tp) // layout.tp * teacher.hidden_size
        is_copied = numerics.is_teacher_offloaded or layout.is_teacher_cut_otherwise  # the head, cut as the student's
        resident = 0.0 if numerics.is_teacher_offloaded else teachers
        teachers = resident + targets + (head if is_last and is_copied else 0.0)
    is_server = not serving.is_on_host or kind == "cpu"
    kv = kv_token_bytes(student, serving.kv_bytes) * serving.kv_tokens
    return MemoryUse(
        weights=numerics.weight_bytes * parameters,
        gradients=GRADIENT_BYTES * parameters,
        optimizer=copies * (stepped if numerics.is_optimizer_sharded else parameters),
        activations=activation_bytes(
            student, layout, numerics, tokens, in_flight=most_in_flight(layout, stage, count) / layout.chunks, stage=stage
        ),
        chunk=chunk_bytes(student, layout.tp, trained, has_teacher=teacher is not None, kind=kind) if is_last else 0.0,
        teacher=teachers,
        serving=is_server * serving.weight_bytes * num_parameters(student) / serving.ranks_per_server,
        kv=is_server * kv / serving.ranks_per_server,
        is_released=serving.is_released,
    )


def forward_flops(shape: ModelShape, tokens: float, row_tokens: float) -> float:
    """Of all layers over `tokens` in causal rows of `row_tokens`, without the output head."""
    products = 2 * shape.num_layers * layer_parameters(shape, of_one_token=True)
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.kv_channels * row_tokens
    return tokens * (products + attention)


def head_flops(shape: ModelShape, rows: float) -> float:
    return 2 * rows * shape.hidden_size * shape.vocab_size


def layer_traffic(shape: ModelShape, layout: Layout, numerics: Numerics, tokens: float) -> float:
    """Bytes a rank sends in a forward pass over `tokens` of its replica: two all-reduces a layer over tp, one hand-over a
    stage over pp, heads against tokens over cp."""
    token = shape.hidden_size * numerics.weight_bytes * tokens / layout.cp
    layers = shape.num_layers / layout.pp
    tensor = 2 * layers * 2 * (layout.tp - 1) / layout.tp * token
    pipeline = token / (layout.tp if layout.sequence_parallel else 1) * layout.chunks if layout.pp > 1 else 0.0
    heads = 2 * (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels / layout.tp
    context = layers * (layout.cp - 1) / layout.cp * heads * numerics.weight_bytes * tokens / layout.cp
    return tensor + pipeline + context


def expert_traffic(shape: ModelShape, layout: Layout, numerics: Numerics, tokens: float) -> float:
    """Bytes a rank sends in a forward pass to other ranks' experts, and their answers back."""
    if shape.experts is None:
        return 0.0
    spread = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    sent = shape.experts.num_experts_per_token * shape.hidden_size * numerics.weight_bytes * tokens / spread
    return 2 * shape.num_layers / layout.pp * (layout.ep - 1) / layout.ep * sent


def step_phases(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    numerics: Numerics,
    workload: Workload,
    serving: Serving,
    device: Device,
) -> dict[str, Phase]:
    """rollout, teacher, train and weights, in the order of a step; the phases do not overlap."""
    phases = {"rollout": rollout_phase(student, workload, serving, DEVICES["cpu"] if serving.is_on_host else device)}
    slow = device.fp32_slowdown if numerics.weight_bytes == 4 else 1.0
    fast = device.way(layout.tp * layout.cp)
    count = workload.microbatches(layout)
    idle = (layout.pp - 1) / (count * layout.chunks + layout.pp - 1)  # of a pipeline that fills and empties
    of_replica = workload.tokens / layout.dp
    if teacher is not None:
        flops = forward_flops(teacher, workload.tokens, workload.row_tokens)
        own = layout.of_teacher
        sent, moved = (each(teacher, own, numerics, workload.tokens / own.dp) for each in (layer_traffic, expert_traffic))
        waiting = 1 - (own.pp - 1) / (workload.microbatches(own) + own.pp - 1)
        seconds = flops * slow / layout.world / device.flops / device.forward_efficiency / waiting
        seconds += (sent / fast + moved / device.way(own.tp * own.ep)) / device.copy_efficiency
        phases["teacher"] = Phase(flops=flops, sent=sent + moved, seconds=seconds)
    passes = 4 if numerics.recompute == "full" else 3
    heads = 3 * head_flops(student, workload.trained) + (head_flops(teacher, workload.trained) if teacher else 0)
    layers = passes * forward_flops(student, workload.tokens, workload.row_tokens)
    trained = workload.trained / layout.dp / layout.cp
    inner = (passes - 1) * layer_traffic(student, layout, numerics, of_replica)
    moved = (passes - 1) * expert_traffic(student, layout, numerics, of_replica)
    inner += (layout.tp - 1) / layout.tp * trained * (2 * 4 * student.hidden_size + SUMS_BYTES * layout.tp)
    replicas = layout.dp * layout.cp
    parameters = max(stage_parameters(student, layout.tp, layout.pp, stage, layout.ep) for stage in (0, layout.pp - 1))
    shared = student.num_layers // layout.pp * expert_parameters(student, layout.tp, layout.ep)
    width = GRADIENT_BYTES + numerics.weight_bytes if numerics.is_optimizer_sharded else 2 * GRADIENT_BYTES
    outer = width * ((replicas - 1) * parameters - (layout.ep - 1) * shared) / replicas
    wide = device.way(layout.world)
    # The last stage alone computes the heads: the others wait for it.
    seconds = (layers / layout.world + heads / (layout.world / layout.pp)) * slow / device.flops / device.train_efficiency
    sending = inner / fast + moved / device.way(layout.tp * layout.ep) + outer / wide
    seconds = seconds / (1 - idle) + sending / device.copy_efficiency
    phases["train"] = Phase(flops=layers + heads, sent=inner + moved + outer, seconds=seconds)
    whole = numerics.weight_bytes * num_parameters(student)
    ways = device.way(layout.tp * layout.pp)
    phases["weights"] = Phase(flops=0.0, sent=whole, seconds=whole / ways / device.copy_efficiency)
    return phases


def rollout_phase(shape: ModelShape, workload: Workload, serving: Serving, device: Device) -> Phase:
    """Each token is computed once: later turns find their history in the cache, samples of a task their prompt."""
    sampled = workload.trained
    prompts = workload.episodes * (
        workload.prompt_tokens / workload.samples + workload.turns * workload.observation_tokens
    )
    prefill = forward_flops(shape, prompts, workload.row_tokens) + head_flops(shape, workload.episodes * workload.turns)
    decode = forward_flops(shape, sampled, workload.row_tokens) + head_flops(shape, sampled)
    slow = device.fp32_slowdown if serving.weight_bytes == 4 else 1.0
    ranks = serving.servers * serving.ranks_per_server
    share = math.ceil(workload.episodes / serving.servers)
    waves = math.ceil(share / serving.max_running)
    running = share / waves
    cached = running * workload.row_tokens / 2 * kv_token_bytes(shape, serving.kv_bytes)
    read = serving.weight_bytes * num_parameters(shape) + cached
    steps = waves * workload.turns * workload.response_tokens
    moving = read / serving.ranks_per_server / device.bandwidth / device.copy_efficiency
    computing = decode * slow / ranks / steps / device.flops / device.forward_efficiency
    seconds = prefill * slow / ranks / device.flops / device.forward_efficiency
    seconds += steps * (max(moving, computing) + device.decode_overhead)
    reduced = 2 * 2 * shape.num_layers * (serving.ranks_per_server - 1) / serving.ranks_per_server
    sent = reduced * shape.hidden_size * serving.weight_bytes * (prompts + sampled) / serving.servers
    return Phase(flops=prefill + decode, sent=sent, seconds=seconds + sent / device.link / device.copy_efficiency)


def memory_parts(use: MemoryUse) -> dict[str, float]:
    """The components by name."""
    return {part.name: getattr(use, part.name) for part in fields(use) if part.name != "is_released"}
