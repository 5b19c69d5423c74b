"""Small random transformers models of each family: the reference of the decoder and the engine."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = dict(num_experts=6, moe_intermediate_size=24, head_dim=16)
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16, tie_word_embeddings=False)),
    "qwen3_bias": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | dict(num_experts_per_tok=2, norm_topk_prob=True)),
    "qwen3_moe_raw": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | dict(num_experts_per_tok=3, norm_topk_prob=False)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=512)),
    "llama": (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=False)),
    "llama3_rope": (LlamaConfig, LlamaForCausalLM, dict(rope_parameters=LLAMA3_ROPE, num_key_value_heads=1)),
    "llama_bias": (LlamaConfig, LlamaForCausalLM, dict(attention_bias=True, mlp_bias=True, num_key_value_heads=4)),
}


def tiny_model(family="qwen3", *, seed=0, **changes):
    """A model whose every weight, norms and biases included, is random, so that a skipped one shows."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(SIZES | options | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def weights_of(model):
    """Name and tensor as the files of a checkpoint have them: every expert's matrices on their own."""
    for name, tensor in model.state_dict().items():
        prefix, kind = name.rsplit(".", 1)
        if not prefix.endswith(".experts"):
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for part, of_expert in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                yield f"{prefix}.{expert}.{part}.weight", of_expert


def logprobs_of(model, ids, *, num_ids=None):
    """Log-probability of each token but the first, [N - 1], among the first `num_ids` ids."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1, :num_ids]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
