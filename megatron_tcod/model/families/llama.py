"""Llama, dense, up to 3.x: the plain decoder, no biases, Llama 3's rope scaling where config.json has it.

    find_family("llama").read_config(config)

Old exports carry the rotary frequencies as tensors; they are skipped, as they hold no weights.
"""

from megatron_tcod.model.families.family import DENSE_DECODER, Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rules=DENSE_DECODER,
    required={"attention_bias": False, "mlp_bias": False},
)
