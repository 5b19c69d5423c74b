"""What a checkpoint holds, read by stock torch: `tensors_of(path)` by Megatron's names, `digest_of(path)` as one hash."""

import hashlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every full tensor of the shards, of whatever layout. Runs pickle: for checkpoints that the test wrote itself."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state


def digest_of(path: Path, *, vocab_size: int | None = None) -> str:
    """sha256 over names and bits of weights, moments and masters; files differ in timestamps and ids. `vocab_size` leaves
    out the rows that pad the vocabulary, whose number differs between layouts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(path).items()):
        if vocab_size is not None and name.endswith(("word_embeddings.weight", "output_layer.weight")):
            tensor = tensor[:vocab_size]
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
