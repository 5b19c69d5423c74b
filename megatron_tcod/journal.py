"""A durable JSONL file: what was acknowledged is still there after SIGKILL, and a reader never trips over the rest.

    journal = Journal(run_dir / "metrics.jsonl")     # creates the file, or opens it and cuts a torn tail
    journal.append({"step": 1, "loss": 0.7})         # one os.write; on return the record is with the kernel
    journal.sync()                                   # on return it is on the disk
    journal.truncate_to(offset)                      # resume: forget what came after a checkpoint
    reading = read_journal(path)                     # reading.records, reading.num_bad

A line is the record as a JSON object whose last key is the CRC32 of the object without that key, so any JSONL tool
reads the file and a flipped bit is still found:

    {"step":1,"loss":0.7,"crc32":"1c291ca3"}

Why it holds: each record is one `write` on an O_APPEND descriptor, so a killed process leaves at most one unfinished
line, at the end, and that line was never acknowledged. Opening cuts the file after its last newline; without that the
next record would be glued to the torn one and both would be lost.

JSON has no NaN: a non-finite number is written, and read back, as null.

Not here: rotation, compression, several writers at once (refused while another process writes).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

logger = logging.getLogger(__name__)

_CHECKSUM = re.compile(rb'([,{])"crc32":"([0-9a-f]{8})"\}')
_CHECKSUM_BYTES = 20
_BLOCK_BYTES = 1 << 16


def seal(record: Any) -> bytes:
    """A record (a dict, or a dataclass of text and numbers) as one checked line, newline included.

    Raises ValueError when it is not an object or already has a key `crc32`.
    """
    body = msgspec.json.encode(record)  # escapes control characters, so the line holds no newline of its own
    if not body.startswith(b"{"):
        raise ValueError(f"a journal record must be a dict or a dataclass, got {type(record).__name__}")
    if isinstance(record, dict) and "crc32" in record:
        raise ValueError("the key 'crc32' is reserved for the journal's checksum; rename the field")
    separator = b"" if body == b"{}" else b","
    return body[:-1] + separator + b'"crc32":"%08x"}\n' % zlib.crc32(body)


def unseal(line: bytes, kind: Any = dict) -> Any | None:
    """The record of one line (with or without its newline) as a `kind`; None when checksum or JSON do not hold."""
    line = line.removesuffix(b"\n")
    checksum = _CHECKSUM.fullmatch(line[-_CHECKSUM_BYTES:])
    if checksum is None:
        return None
    body = line[:-_CHECKSUM_BYTES] + (b"}" if checksum[1] == b"," else b"{}")
    if zlib.crc32(body) != int(checksum[2], 16):
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Journal:
    """The one writer of a JSONL file. Also a context manager.

    Example: `with Journal("runs/a/metrics.jsonl") as journal: journal.append({"step": 1})`
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or create `path` and cut an unfinished last line.

        Raises ValueError while another process has it open for writing, OSError when it cannot be opened.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _lock(self._fd, self.path)
            size = os.fstat(self._fd).st_size
            self._offset = _end_of_last_line(self._fd, size)
            self.num_repaired_bytes = size - self._offset
            """Bytes of an unfinished line that opening cut away."""
            if self.num_repaired_bytes:
                logger.warning("%s: cut %d bytes of an unfinished record", self.path, self.num_repaired_bytes)
                os.ftruncate(self._fd, self._offset)
            if is_new:
                _sync_directory(self.path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def offset(self) -> int:
        """Bytes of complete records; store it in a checkpoint and give it to `truncate_to` on resume."""
        return self._offset

    def append(self, record: Any) -> int:
        """Write one record; returns the offset behind it. When it returns, no kill of this process can lose it.

        Raises OSError when the disk is full; the file then ends where it ended before.
        """
        line = seal(record)
        written = os.write(self._fd, line)
        if written != len(line):
            os.ftruncate(self._fd, self._offset)
            raise OSError(errno.ENOSPC, f"wrote {written} of {len(line)} bytes of a record; free some space", self.path)
        self._offset += written
        return self._offset

    def truncate_to(self, offset: int) -> None:
        """Drop every record that starts at or behind `offset`, an earlier value of `self.offset`.

        Raises ValueError when the file is shorter than that or `offset` is inside a record.
        """
        if not 0 <= offset <= self._offset:
            raise ValueError(
                f"{self.path} holds {self._offset} bytes of records but the checkpoint expects {offset}; "
                "it was cut or replaced since: restore it, or start a new run directory"
            )
        if offset and os.pread(self._fd, 1, offset - 1) != b"\n":
            raise ValueError(f"{self.path}: offset {offset} is inside a record; the checkpoint is of another journal")
        os.ftruncate(self._fd, offset)
        self._offset = offset
        self.sync()

    def sync(self) -> None:
        """Return once all records are on the disk, so that they survive a power loss too."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Free the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class JournalReading:
    """What a journal holds. Example: `JournalReading(records=[{"step": 1}], num_bad=0)`"""

    records: list[Any]
    num_bad: int
    """Lines whose checksum or JSON does not hold, an unfinished last line included."""


def read_journal(path: str | os.PathLike[str], kind: Any = dict) -> JournalReading:
    """All good records of a file, in order, and how many lines were bad. FileNotFoundError when there is no file.

    `kind` is what each record is decoded to (a dataclass, a `msgspec.Struct`, `dict`); unknown keys are ignored.
    """
    records = [record for _, record in scan_journal(path, kind)]
    good = [record for record in records if record is not None]
    return JournalReading(good, len(records) - len(good))


def scan_journal(path: str | os.PathLike[str], kind: Any = dict) -> Iterator[tuple[int, Any | None]]:
    """`(offset, record)` line by line, None for a bad line; one line in memory at a time. Reads only."""
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            is_complete = line.endswith(b"\n")
            yield offset, unseal(line, kind) if is_complete else None
            offset += len(line)


def _end_of_last_line(fd: int, size: int) -> int:
    """The offset behind the last newline among the first `size` bytes, 0 when there is none."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _lock(fd: int, path: Path) -> None:
    # A POSIX record lock: unlike flock it is not inherited by forked environment workers, so it ends with this process.
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"{path} is being written by another process; stop that run or choose another run directory"
        ) from None
    except OSError as error:
        logger.warning("%s: this file system cannot lock files (%s); do not start two runs here", path, error)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
