"""Directories of weights on disk: read safetensors by name, write them as a stream, hash them, replace them whole.

    with WeightFiles(directory) as files:                 # model.safetensors, or the index and its parts
        files.shapes["lm_head.weight"], files["lm_head.weight"]

    with replaced_directory(target) as staging:           # a hidden sibling, renamed to target when the block succeeds
        with TensorWriter(staging / "model.safetensors", plan) as writer:
            for name, tensor in tensors:                  # in the order of plan; one tensor in memory at a time
                writer.write(name, tensor)
        write_manifest(staging, {}, known={"model.safetensors": writer.sha256})

Only JSON and safetensors, so reading can run no code. It knows nothing about models: names and shapes come from the
caller.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "manifest.json"
FIX = f"copy the directory again, or, if it is no training checkpoint and the change was meant, remove {MANIFEST_FILE}"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

logger = logging.getLogger(__name__)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors of a directory by name, read on demand; use it as a context manager.

    Every look-up reads its tensor into memory of its own, and nothing is mapped: what a process holds is what its
    caller keeps, however large the files. Raises ValueError at once when a file is absent, truncated, or disagrees with
    the index, and KeyError for a name that is not there.
    """

    def __init__(self, directory: str | Path, *, file_names: Sequence[str] | None = None) -> None:
        self.directory = Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._starts: dict[str, tuple[Path, int]] = {}
        indexed = None if file_names is not None else self._read_index()
        names = file_names if file_names is not None else sorted(set((indexed or {"": SINGLE_FILE}).values()))
        for file_name in names:
            self._open(file_name)
        if indexed is not None and set(indexed) != set(self.shapes):
            odd = sorted(set(indexed) ^ set(self.shapes))
            raise ValueError(f"{self.directory}: {INDEX_FILE} and the files disagree on {odd[:3]}; copy both again")

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._starts.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        path, start = self._starts[name]
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        buffer = memoryview(tensor_bytes(tensor))
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            filled = 0
            while filled < len(buffer):
                count = file.readinto(buffer[filled:])  # at most 2 GiB a call
                if not count:
                    raise ValueError(f"{path} was cut short while it was read; copy or export it again")
                filled += count
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def _read_index(self) -> dict[str, str] | None:
        path = self.directory / INDEX_FILE
        if (self.directory / SINGLE_FILE).exists() or not path.exists():
            return None
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path}: expected a non-empty weight_map; copy the file again")
        for file_name in weight_map.values():
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise ValueError(f"{path}: {file_name!r} must be a plain file name beside the index; correct the index")
        return weight_map

    def _open(self, file_name: str) -> None:
        path = self.directory / file_name
        if not path.is_file():
            listed = (self.directory / INDEX_FILE).is_file() and file_name != SINGLE_FILE
            fix = f"{INDEX_FILE} lists it, copy it again" if listed else "convert other formats to safetensors first"
            raise ValueError(f"{path} does not exist; {fix}")
        try:
            with safe_open(path, framework="pt"):
                pass  # the library checks that header and length agree
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated ({error}); copy or export it again") from error
        header, data = _read_header(path)
        for name, entry in header.items():
            if name in self.shapes:
                raise ValueError(f"{path}: tensor {name!r} is in two files; remove one")
            if entry["dtype"] not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise ValueError(f"{path}: {name} is {entry['dtype']}, expected {known}; export it unquantised")
            self.shapes[name] = tuple(entry["shape"])
            self.dtypes[name] = _DTYPES[entry["dtype"]]
            self._starts[name] = (path, data + entry["data_offsets"][0])


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file, and where its data begins: 8 bytes of length, then JSON, then data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


class TensorWriter:
    """Writes one safetensors file front to back, so that no more than one tensor is in memory, and hashes as it goes.

    `plan` lists (name, dtype, shape) in the order of the `write` calls. `sha256` is the digest of the finished file,
    `digests` that of each tensor's bytes. On leaving the block the file is complete and on disk.
    """

    def __init__(self, path: Path, plan: Sequence[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
        self.sha256 = ""
        self.num_bytes = 0
        self._plan = list(plan)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in self._plan:
            stop = offset + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._hash = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115  closed in __exit__
        self._put(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor of the plan, from any device."""
        expected, dtype, shape = self._plan[len(self.digests)]
        assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, dtype, tuple(shape)), (name, expected, shape)
        data = memoryview(tensor_bytes(tensor))
        self._put(data)
        self.digests[name] = hashlib.sha256(data).hexdigest()

    @property
    def is_full(self) -> bool:
        """Whether every tensor of the plan has been written."""
        return len(self.digests) == len(self._plan)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            assert self.is_full, f"{self.path}: {len(self.digests)} of {len(self._plan)} tensors"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self.sha256 = self._hash.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """A contiguous CPU byte buffer of the tensor, without a copy where it is one already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file when it is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a directory that holds it") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); copy or export it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or export it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}; copy or export it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The inverse of `read_json`, durably; ValueError when `content` is not made of JSON's types."""
    try:
        text = json.dumps(content, indent=2)
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}; pass only text, numbers, lists and dicts") from None
    write_durably(path, text + "\n")


def write_durably(path: Path, data: str | bytes) -> None:
    """Write through a temporary sibling, flush to disk, and rename over `path`: readers see the old file or the new."""
    staging = path.with_name(f".{path.name}.tmp")
    with open(staging, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory survive a power loss."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A hidden empty sibling to fill; renamed to `target` when the block succeeds, removed when it raises.

    A `target` that exists is set aside until the new one is in place; after a kill in between, `restore_set_aside`.
    """
    staging = staging_directory(target)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    publish_directory(staging, target)


def staging_directory(target: Path) -> Path:
    """The hidden sibling that `publish_directory` renames to `target`, made and empty."""
    staging = staging_name(target)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def staging_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def publish_directory(staging: Path, target: Path) -> None:
    """Rename a complete directory to `target`, durably. Its files must be on disk already."""
    aside = target.with_name(f".{target.name}.old")
    sync_directory(staging)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        os.rename(target, aside)
    os.rename(staging, target)
    sync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_set_aside(root: Path) -> None:
    """Put back what `publish_directory` had set aside when its process was killed before the new one was in place."""
    for aside in root.glob(".*.old"):
        target = root / aside.name[1 : -len(".old")]
        if not target.exists():
            logger.warning("%s: putting it back, a save that was to replace it did not end", target)
            os.rename(aside, target)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy whichever TOKENIZER_FILES `source` has; returns their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        write_durably(target / name, (source / name).read_bytes())
    return names


def sync_file(path: Path) -> None:
    """Return once the file's bytes are on disk, whoever wrote them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, content: Mapping[str, Any], *, known: Mapping[str, str] | None = None) -> None:
    """Write manifest.json: `content` plus size and sha256 of every file in `directory`; `known` saves rehashing."""
    known = known or {}
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or file_sha256(path)}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST_FILE
    }
    write_durably(directory / MANIFEST_FILE, _canonical({**content, "files": files}))


def verify_manifest(
    directory: Path, *, share: tuple[int, int] = (0, 1), is_hashed: bool = True
) -> dict[str, Any]:
    """The manifest of a directory whose every listed file has its recorded size and hash; ValueError names the first
    file that has not. Hashes every byte, or none; `share` (index, count) takes every count-th file, for ranks that share
    it."""
    path = directory / MANIFEST_FILE
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or path.read_text(encoding="utf-8") != _canonical(manifest):
        raise ValueError(f"{path} is damaged: it is not as it was written; {FIX}")
    _check_entries(path, files)
    index, count = share
    for name, expected in list(files.items())[index::count]:
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{file} is missing, but {MANIFEST_FILE} lists it; {FIX}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{file} has {size} bytes, expected {expected['bytes']}; {FIX}")
        if is_hashed and (found := file_sha256(file)) != expected["sha256"]:
            raise ValueError(f"{file} has sha256 {found}, expected {expected['sha256']}; {FIX}")
    return manifest


def _check_entries(path: Path, files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"{path}: files.{name} must have bytes and sha256, got {entry!r}; write the directory again")


def _canonical(content: Mapping[str, Any]) -> str:
    """One text per content, with its own digest in it, so that a damaged manifest is told from a damaged file."""
    body = {key: value for key, value in content.items() if key != "manifest_sha256"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "manifest_sha256": digest}, sort_keys=True, indent=1) + "\n"
