"""The student and the teacher on megatron-core. The one folder that imports `megatron.core`."""

import warnings

# Importing megatron-core warns once per module that Transformer Engine and Apex are absent; `doctor` says it once.
warnings.filterwarnings("ignore", message="(Transformer Engine and Apex are|Apex is) not installed")
