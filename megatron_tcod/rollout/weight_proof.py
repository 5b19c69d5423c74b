"""The proof that a server holds the trainer's weights: its checksums against those of the tensors it was given.

    expected = Expected(features)
    for name, tensor in student.hf_weights():
        expected.add(name, tensor)
    unknown = expected.compare(await client.checksums())      # UnprovenWeights names the tensors that differ

The server's checksums are those of its own fused tensors, so the trainer's q, k, v and gate, up are joined before hashing,
vocabularies are padded as SGLang pads them, and everything is cast to the server's dtype. That is known for dense models on
one rank; other tensors are returned as unknown and left to a probe (`sglang_engine.py`).
"""

from __future__ import annotations

import hashlib
import re

import torch

from megatron_tcod.rollout.sglang_client import ServerFeatures

VOCAB_MULTIPLE, CPU_MLP_MULTIPLE = 64, 32
"""SGLang pads vocabularies, and on a CPU the width of MLPs, with zeros to a multiple of these."""
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
TILE_WORDS = 8192
"""Of SGLang's checksum on GPUs."""
_LOW, _ALL = (1 << 32) - 1, (1 << 64) - 1


class UnprovenWeights(OSError):
    """A server holds other weights than it was given."""


class Expected:
    """Checksums of the tensors that a server of one device kind and dtype must hold, collected as they pass by."""

    def __init__(self, features: ServerFeatures) -> None:
        self._dtype = getattr(torch, features.dtype, None)  # None: "auto", the checkpoint's
        self.can_tell = features.has_checksums and features.num_ranks == 1 and self._dtype is not None
        """Else nothing is collected."""
        self._hash = cpu_checksum if features.device == "cpu" else gpu_checksum
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._known: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if not self.can_tell:
            return
        fused, part = fused_name(name)
        tensor = self._padded(name, tensor.detach().to(self._dtype))
        if part is None:
            self._known[name] = self._hash(tensor)
            return
        parts = self._parts.setdefault(fused, {})
        parts[part] = tensor
        wanted = FUSED[fused.split(".")[-2]]
        if len(parts) == len(wanted):
            self._known[fused] = self._hash(torch.cat([parts[one] for one in wanted]))
            del self._parts[fused]

    def _padded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """As the server holds it."""
        rows = columns = 0
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -len(tensor) % VOCAB_MULTIPLE
        elif self._hash is cpu_checksum and (".mlp.gate_proj." in name or ".mlp.up_proj." in name):
            rows = -len(tensor) % CPU_MLP_MULTIPLE
        elif self._hash is cpu_checksum and name.endswith(".mlp.down_proj.weight"):
            columns = -tensor.shape[1] % CPU_MLP_MULTIPLE
        if not rows and not columns:
            return tensor
        return torch.nn.functional.pad(tensor, (0, rows) if tensor.dim() == 1 else (0, columns, 0, rows))

    def compare(self, held: dict[str, str]) -> list[str]:
        """The server's tensors that cannot be told; UnprovenWeights when one that can be told differs."""
        assert not self._parts, f"parts are missing of {sorted(self._parts)[:3]}"
        wrong = sorted(name for name, checksum in held.items() if self._known.get(name, checksum) != checksum)
        if wrong or not self._known.keys() & held.keys():
            raise UnprovenWeights(
                f"{len(wrong)} of {len(held)} tensors differ from the trainer's, first {wrong[:3]}; the update was lost or "
                "damaged, or the server was started with another dtype or quantisation"
            )
        return sorted(held.keys() - self._known.keys())


def fused_name(name: str) -> tuple[str, str | None]:
    """The server's name of the tensor that `name` is a part of, and which part; None where it stands alone."""
    for fused, parts in FUSED.items():
        if found := re.fullmatch(rf"(.*\.)({'|'.join(parts)})(\.(?:weight|bias))", name):
            return f"{found[1]}{fused}{found[3]}", found[2]
    return name, None


def cpu_checksum(tensor: torch.Tensor) -> str:
    """SGLang's on a CPU: the first 8 bytes of the SHA-256 of the tensor's bytes."""
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(data)).hexdigest()[:16]


def gpu_checksum(tensor: torch.Tensor) -> str:
    """SGLang's on a GPU, on any device.

    The bytes are 32-bit words w_i, zero padded. Per tile of 8192 words and for two seeds: the sum of mix(w_i ^ p_i) over
    the tile, with p_i = (i * a + seed) ^ rotl(i, r), xored with the byte count and mixed again; both halves make one
    64-bit number. The tiles are added modulo 2^64 and mixed once more (splitmix64). All arithmetic wraps.
    """
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -len(data) % 4)).view(torch.int32)  # [n]
    seed, total = 0x243F6A88, 0
    seeds = ((seed, 0x27D4EB2D, 15), ((seed * 0x9E3779B1 ^ 0xDEADBEEF) & _LOW, 0x165667B1, 13))
    num_bytes = 4 * len(words) & _LOW
    step = 1024 * TILE_WORDS  # bounds the memory of the int64 copies
    for first in range(0, len(words), step):
        part = words[first : first + step].to(torch.int64) & _LOW  # [m]
        at = torch.arange(first, first + len(part), device=part.device) & _LOW  # [m]
        halves = []
        for offset, factor, bits in seeds:
            place = ((at * factor + offset) & _LOW) ^ (((at << bits) | (at >> (32 - bits))) & _LOW)
            mixed = torch.nn.functional.pad(_mix32(part ^ place), (0, -len(part) % TILE_WORDS))
            halves.append(_mix32((mixed.view(-1, TILE_WORDS).sum(1) & _LOW) ^ num_bytes))  # [tiles]
        total += int(((halves[0] << 32) | halves[1]).sum()) if len(halves[0]) else 0
    total &= _ALL
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = (total ^ total >> shift) * factor & _ALL
    return f"{total ^ total >> 31:016x}"


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3 on numbers below 2^32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW
    return x ^ (x >> 16)
