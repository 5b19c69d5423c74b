"""Qwen2 and Qwen2.5, dense: the plain decoder with a bias on the query, key and value projections.

    find_family("qwen2").read_config(config)

Small sizes tie the embeddings; the output head is then the embedding and has no tensor of its own.
"""

from megatron_tcod.model.families.family import DENSE_DECODER, Family
from megatron_tcod.model.families.rules import Rule

QKV_BIAS = Rule(
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
    "qkv",
    {
        "model.layers.{layer}.self_attn.q_proj.bias": "query",
        "model.layers.{layer}.self_attn.k_proj.bias": "kv",
        "model.layers.{layer}.self_attn.v_proj.bias": "kv",
    },
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=(*DENSE_DECODER, QKV_BIAS),
    add_qkv_bias=True,
    required={"use_sliding_window": False},
)
