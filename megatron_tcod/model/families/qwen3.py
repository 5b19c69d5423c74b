"""Qwen3, dense: the plain decoder with an RMSNorm over each query and key head, and a head width of its own.

    find_family("qwen3").read_config(config)

The head norms have one weight vector of `head_dim`, shared by all heads and so by all tensor-parallel ranks.
"""

from megatron_tcod.model.families.family import DENSE_DECODER, Family
from megatron_tcod.model.families.rules import Rule

QUERY_NORM = Rule(
    "decoder.layers.{layer}.self_attention.q_layernorm.weight",
    "replicated",
    {"model.layers.{layer}.self_attn.q_norm.weight": "head"},
)
KEY_NORM = Rule(
    "decoder.layers.{layer}.self_attention.k_layernorm.weight",
    "replicated",
    {"model.layers.{layer}.self_attn.k_norm.weight": "head"},
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=(*DENSE_DECODER, QUERY_NORM, KEY_NORM),
    qk_layernorm=True,
    head_dim_default=128,
    required={"use_sliding_window": False, "attention_bias": False},
)
