"""Qwen3 with a mixture of experts in every layer: Qwen3's attention, a router, and SwiGLU experts without a shared one.

    find_family("qwen3_moe").read_config(config)

The router sends each token to the `num_experts_per_tok` experts with the largest logits; the softmax runs over those
alone where `norm_topk_prob`, over all experts otherwise. Models whose every n-th layer is dense are refused.
"""

from megatron_tcod.model.families.family import DECODER, Family
from megatron_tcod.model.families.qwen3 import KEY_NORM, QUERY_NORM
from megatron_tcod.model.families.rules import Rule

ROUTER = Rule(
    "decoder.layers.{layer}.mlp.router.weight",
    "replicated",
    {"model.layers.{layer}.mlp.gate.weight": "experts hidden"},
)
EXPERT_GATE_UP = Rule(
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
    "gate_up",
    {
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden",
    },
)
EXPERT_DOWN = Rule(
    "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
    "row",
    {"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn"},
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=(*DECODER, QUERY_NORM, KEY_NORM, ROUTER, EXPERT_GATE_UP, EXPERT_DOWN),
    qk_layernorm=True,
    required={"use_sliding_window": False, "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    expert_fields={
        "num_experts": "num_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "ffn_hidden_size": "moe_intermediate_size",
        "normalizes_weights": "norm_topk_prob",
    },
)
