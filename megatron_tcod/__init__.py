"""megatron_tcod: on-policy distillation of multi-turn agents under a temporal curriculum, on megatron-core."""

__version__ = "0.1.0"
