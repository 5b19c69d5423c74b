"""What a model family declares, and config.json <-> `ModelShape` from that declaration.

    family = find_family(config["model_type"])
    shape = family.read_config(config)                  # ValueError for anything the Megatron model would not compute
    config = family.write_config(shape, dtype=torch.bfloat16)
    for slot in family.slots(shape): ...                # every parameter of the unsharded model, in a fixed order

Reads the spelling of transformers 4 (`rope_theta`) and 5 (`rope_parameters`), and writes both so that either version
and the serving engines read it. It does not read tensors, and it does not guess: a feature that changes the
computation and is not implemented (rope scaling other than Llama 3's, a sliding window that a row could exceed, shared
experts, another activation, biases) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron_tcod.model.families.rules import Rule, Slot
from megatron_tcod.model.shape import ExpertShape, ModelShape, RopeScaling

DECODER = (
    Rule("embedding.word_embeddings.weight", "vocab", {"model.embed_tokens.weight": "vocab hidden"}),
    Rule(
        "decoder.layers.{layer}.input_layernorm.weight",
        "replicated",
        {"model.layers.{layer}.input_layernorm.weight": "hidden"},
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        "qkv",
        {
            "model.layers.{layer}.self_attn.q_proj.weight": "query hidden",
            "model.layers.{layer}.self_attn.k_proj.weight": "kv hidden",
            "model.layers.{layer}.self_attn.v_proj.weight": "kv hidden",
        },
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        "row",
        {"model.layers.{layer}.self_attn.o_proj.weight": "hidden query"},
    ),
    Rule(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        "replicated",
        {"model.layers.{layer}.post_attention_layernorm.weight": "hidden"},
    ),
    Rule("decoder.final_layernorm.weight", "replicated", {"model.norm.weight": "hidden"}),
    Rule("output_layer.weight", "vocab", {"lm_head.weight": "vocab hidden"}),
)
"""Embedding, RMSNorm, grouped-query attention with rotary positions, head, no biases: what all families here share."""

MLP = (
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        "gate_up",
        {
            "model.layers.{layer}.mlp.gate_proj.weight": "ffn hidden",
            "model.layers.{layer}.mlp.up_proj.weight": "ffn hidden",
        },
    ),
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        "row",
        {"model.layers.{layer}.mlp.down_proj.weight": "hidden ffn"},
    ),
)
"""SwiGLU in every layer."""

DENSE_DECODER = (*DECODER, *MLP)

HEAD = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"

_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""ModelShape field -> config.json field; the rotary positions have two spellings and are treated apart."""

_SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_REALS = ("layernorm_epsilon", "init_std", *_SCALING_FIELDS[:3])
_FLAGS = ("tie_word_embeddings", "normalizes_weights")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its names, its tensors, and the config fields that must hold one value.

    Example: `QWEN3` in `qwen3.py`.
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    required: Mapping[str, Any] = field(default_factory=dict)
    """Config fields that may only hold this value, written out again; absent counts as holding it."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Config fields written out without being read, where absent would mean something else."""
    expert_fields: Mapping[str, str] = field(default_factory=dict)
    """ExpertShape field -> config.json field; empty for a dense family."""
    has_window_switch: bool = True
    """Whether `use_sliding_window` decides about `sliding_window`, which counts whenever it is set otherwise."""
    head_dim_default: int | None = None
    """`head_dim` where config.json has none; None means hidden_size / num_attention_heads."""
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Tensors that some exporters add and that hold no weights."""

    def read_config(self, config: Mapping[str, Any]) -> ModelShape:
        """The shape that config.json describes; ValueError names the field, what was expected, and the fix."""
        self._refuse_unsupported(config)
        values = dict(config)
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        values.setdefault("initializer_range", 0.02)
        values.setdefault("tie_word_embeddings", False)
        if values.get("head_dim") is None:
            values["head_dim"] = self.head_dim_default or _head_dim(values)
        fields = {ours: _typed(values, ours, theirs) for ours, theirs in _FIELDS.items()}
        if fields["num_attention_heads"] % fields["num_query_groups"]:
            raise ValueError(
                f"config.json: num_attention_heads {fields['num_attention_heads']} is not a multiple of "
                f"num_key_value_heads {fields['num_query_groups']}; correct config.json"
            )
        rotary_base, rope_scaling = _read_rope(config)
        return ModelShape(
            **fields,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
            qk_layernorm=self.qk_layernorm,
            add_qkv_bias=self.add_qkv_bias,
            experts=self._read_experts(values),
        )

    def write_config(self, shape: ModelShape, *, dtype: torch.dtype) -> dict[str, Any]:
        """config.json for `shape`; tokens such as `eos_token_id` are the tokenizer's business and not in it."""
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **self.required,
            **self.written,
            **{theirs: getattr(shape, ours) for ours, theirs in _FIELDS.items()},
            **{theirs: getattr(shape.experts, ours) for ours, theirs in self.expert_fields.items()},
            "rope_theta": float(shape.rotary_base),
            "rope_parameters": {"rope_theta": float(shape.rotary_base), "rope_type": "default"},
            "dtype": str(dtype).removeprefix("torch."),
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if shape.rope_scaling is not None:
            scaling = {"rope_type": "llama3", **asdict(shape.rope_scaling)}
            config["rope_parameters"] = {**config["rope_parameters"], **scaling}
            config["rope_scaling"] = scaling
        return config

    def _read_experts(self, values: Mapping[str, Any]) -> ExpertShape | None:
        if not self.expert_fields:
            return None
        counts = {values[name] for name in ("num_experts", "num_local_experts") if values.get(name) is not None}
        if len(counts) > 1:
            raise ValueError(f"config.json: num_experts and num_local_experts disagree: {sorted(counts)}; remove one")
        values = {**values, "num_experts": next(iter(counts), None)}  # transformers 5 writes the longer name
        return ExpertShape(**{ours: _typed(values, ours, theirs) for ours, theirs in self.expert_fields.items()})

    def slots(self, shape: ModelShape) -> list[Slot]:
        """Every parameter of the unsharded model, embedding first, layers in order, head last (none when tied)."""
        per_layer = [rule for rule in self.rules if "{layer}" in rule.megatron]
        once = [rule for rule in self.rules if "{layer}" not in rule.megatron]
        before = [Slot.of(rule) for rule in once if rule.megatron == EMBEDDING]
        layers = [slot for layer in range(shape.num_layers) for slot in _layer_slots(per_layer, layer, shape)]
        after = [Slot.of(rule) for rule in once if rule.megatron != EMBEDDING]
        if shape.tie_word_embeddings:
            after = [slot for slot in after if slot.megatron != HEAD]
        return before + layers + after

    def _refuse_unsupported(self, config: Mapping[str, Any]) -> None:
        found = config.get("model_type")
        if found != self.model_type:
            raise ValueError(f"config.json: model_type {found!r}, expected {self.model_type!r}; use its own family")
        for name in _EXPERTS:
            if config.get(name) and not self.expert_fields:
                raise ValueError(f"config.json: {name} {config[name]}: experts are not supported; use a dense model")
        if config.get("quantization_config"):
            raise ValueError("config.json: quantization_config is set; export the unquantised weights")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act {activation!r}, expected 'silu'; use a SwiGLU model")
        _refuse_sliding_window(config, has_switch=self.has_window_switch)
        for name, value in self.required.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"config.json: {name} {config[name]!r}, expected {value!r}: the {self.model_type} model here does "
                    "not compute it; use a checkpoint without it"
                )


def _layer_slots(rules: list[Rule], layer: int, shape: ModelShape) -> list[Slot]:
    of_experts = [rule for rule in rules if "{expert}" in rule.megatron]
    slots = [Slot.of(rule, layer=layer) for rule in rules if rule not in of_experts]
    if of_experts:
        assert shape.experts is not None, "the family has experts, the shape has none"
        numbers = range(shape.experts.num_experts)
        slots += [Slot.of(rule, layer=layer, expert=expert) for expert in numbers for rule in of_experts]
    return slots


def _refuse_sliding_window(config: Mapping[str, Any], *, has_switch: bool) -> None:
    """A window that holds every position the model knows is full attention; rows beyond those are refused elsewhere."""
    layer_types = set(config.get("layer_types") or ["full_attention"])
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(longest, int) and window >= longest:
        layer_types.discard("sliding_attention")
        window = None
    is_on = window is not None and (not has_switch or config.get("use_sliding_window", True))
    if is_on or layer_types - {"full_attention"}:
        raise ValueError(
            f"config.json: use_sliding_window {config.get('use_sliding_window')!r}, sliding_window "
            f"{config.get('sliding_window')!r}, max_position_embeddings {longest!r}, layer_types {sorted(layer_types)}: "
            "expected full attention in every layer; where no sequence exceeds the window, lower max_position_embeddings "
            "to it (the model then refuses longer rows), otherwise use another checkpoint"
        )


def _head_dim(values: Mapping[str, Any]) -> int | None:
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return None  # the field itself is reported by _typed
    if hidden % heads:
        raise ValueError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is not "
            "given; add head_dim"
        )
    return hidden // heads


def _typed(values: Mapping[str, Any], ours: str, theirs: str, *, where: str = "") -> Any:
    value = values.get(theirs)
    if ours in _FLAGS:
        expected, is_right = "true or false", isinstance(value, bool)
    elif ours in _REALS:
        expected, is_right = "a number > 0", isinstance(value, (int, float)) and not isinstance(value, bool)
        is_right = is_right and value > 0
    else:
        expected, is_right = "an integer > 0", isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_right:
        raise ValueError(f"config.json: {where}{theirs} must be {expected}, got {value!r}; correct config.json")
    return float(value) if ours in _REALS else value


def _read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The rotary base, and Llama 3's scaling where config.json asks for it."""
    scalings = []
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"config.json: {name} must be an object, got {given!r}; correct config.json")
        if given:
            scalings.append(_read_scaling(name, given))
    if len(set(scalings)) > 1:
        raise ValueError("config.json: rope_scaling and rope_parameters disagree; remove one of them")
    partial = [source.get("partial_rotary_factor") for source in (config, config.get("rope_parameters") or {})]
    if any(value not in (None, 1, 1.0) for value in partial):
        raise ValueError(f"config.json: partial_rotary_factor {partial}, expected 1.0; use a fully rotary model")
    sources = (config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {})
    bases = {float(source["rope_theta"]) for source in sources if source.get("rope_theta") is not None}
    if len(bases) != 1:
        raise ValueError(
            f"config.json: expected one rotary base in rope_theta or rope_parameters.rope_theta, got {sorted(bases)}; "
            'give it once, for example "rope_theta": 10000.0'
        )
    return bases.pop(), scalings[0] if scalings else None


def _read_scaling(name: str, given: Mapping[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind == "llama3":
        known.update(_SCALING_FIELDS)
    extra = sorted(set(given) - known)
    if kind not in ("default", "llama3") or extra:
        raise ValueError(
            f"config.json: {name} {dict(given)}: expected rope_type 'default', or 'llama3' with {list(_SCALING_FIELDS)}; "
            "no other rope scaling is computed here, use a checkpoint without it"
        )
    if kind == "default":
        return None
    return RopeScaling(**{field: _typed(given, field, field, where=f"{name}.") for field in _SCALING_FIELDS})
