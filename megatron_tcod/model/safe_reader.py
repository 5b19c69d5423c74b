"""Reads the torch_dist format without running code: an allowlist instead of pickle, tensors by torch's own checked loader.

    reader = SafeFileReader(directory)
    reader.read_metadata()                                  # ValueError names what the allowlist refuses
    dcp.load(state, storage_reader=reader, planner=SafeLoadPlanner())

Stock torch reads `.metadata` with pickle.load and every entry that is no tensor with torch.load(weights_only=False): both
run whatever the file says. Here `.metadata` may name the few classes that torch writes into it and nothing else, and
every entry goes through weights_only, which also refuses TorchScript archives. A file that needs more is refused;
nothing falls back to pickle. It does not bound memory: a hostile file can still ask for a huge tensor.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

METADATA_FILE = ".metadata"
FIX = "use a checkpoint that this program wrote; --allow-pickle resumes from one whose maker you trust"

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_CLASSES = {
    metadata: (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
}  # fmt: skip
ALLOWED: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib", "PurePosixPath"): pathlib.PurePosixPath,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    **{(module.__name__, name): getattr(module, name) for module, names in _CLASSES.items() for name in names},
}
"""All that `.metadata` may name. A dotted name is looked up as it is, so no attribute of these can be reached."""


class MetadataUnpickler(pickle.Unpickler):
    """pickle's machine with no globals but ALLOWED, and no persistent ids."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs") from None


class SafeFileReader(FileSystemReader):
    """torch's reader of a checkpoint directory, `.metadata` read by `MetadataUnpickler`, once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """ValueError when the file is absent, damaged, or names anything that is not allowed."""
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def read_metadata(directory: Path) -> Metadata:
    """What the checkpoint's files hold and where; ValueError names what is wrong with it."""
    path = directory / METADATA_FILE
    try:
        with open(path, "rb") as file:
            found = MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a sharded checkpoint in {directory}") from None
    except Exception as error:  # noqa: BLE001  damaged bytes raise whatever the opcode they became raises
        raise ValueError(f"{path} is refused: {error}; {FIX}") from None
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise ValueError(f"{path} is refused: it holds no checkpoint's metadata; {FIX}")
    for info in found.storage_data.values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path} is refused: {name!r} is no file of this directory; {FIX}")
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: {name}, which its {METADATA_FILE} names, is missing; restore the directory")
    return found


class SafeLoadPlanner(MCoreLoadPlanner):
    """Megatron's plan of a load, with entries that are no tensors read by weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.state_dict[name] = torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001  as above
            reason = str(error).partition("\n")[0]
            raise ValueError(f"entry {name} is refused: {reason}; {FIX}") from None
