"""Mistral, dense: the plain decoder, no biases.

    find_family("mistral").read_config(config)

The sliding window of the first version (4,096 tokens) is supported as far as it is full attention: config.json must say
`max_position_embeddings` of at most the window, and longer rows are then refused. Written configs name no window.
"""

from megatron_tcod.model.families.family import DENSE_DECODER, Family

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rules=DENSE_DECODER,
    written={"sliding_window": None},
    has_window_switch=False,
)
