import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tcod.journal import Journal, read_journal, scan_journal, seal, unseal

WRITER = """
import os, sys
from megatron_tcod.journal import Journal

path, first, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
size = 1 + seed * 7919 % 100_000
with Journal(path) as journal:
    for number in range(first, first + 1_000_000):
        journal.append({"number": number, "filler": "x" * (size * (number % 3) // 2)})
        os.write(1, b"%d\\n" % number)
"""


@dataclass(frozen=True)
class Reading:
    step: int
    loss: float


def test_a_record_comes_back_equal_and_the_line_is_plain_json(tmp_path):
    text = 'quote " newline \n null \0 emoji 🧪 line separator \u2028'
    record = {"step": 3, "text": text, "nested": {"a": [1, 2.5, None]}}
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append(record)
    line = (tmp_path / "a.jsonl").read_bytes()
    assert line.count(b"\n") == 1
    as_any_tool_sees_it = json.loads(line)
    assert as_any_tool_sees_it.pop("crc32") == f"{zlib.crc32(line[: line.rindex(b',')] + b'}'):08x}"
    assert as_any_tool_sees_it == record
    assert read_journal(tmp_path / "a.jsonl").records == [record]


def test_dataclasses_go_in_and_come_out(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append(Reading(step=1, loss=0.5))
    assert read_journal(tmp_path / "a.jsonl", Reading).records == [Reading(1, 0.5)]


def test_a_record_of_another_kind_counts_as_bad(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append({"step": 1, "loss": 0.5})
        journal.append({"step": "one", "loss": 0.5})
    reading = read_journal(tmp_path / "a.jsonl", Reading)
    assert (reading.records, reading.num_bad) == ([Reading(1, 0.5)], 1)


def test_non_finite_numbers_are_null(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        journal.append({"nan": math.nan, "inf": math.inf})
    assert read_journal(tmp_path / "a.jsonl").records == [{"nan": None, "inf": None}]


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text().filter(lambda key: key != "crc32"),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**63 - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"])),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=8,
        ),
        max_size=5,
    )
)
def test_seal_and_unseal_are_inverse(record):
    line = seal(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert unseal(line) == record


@pytest.mark.parametrize("record", [[1, 2], "text", 7, None])
def test_only_objects_are_records(record):
    with pytest.raises(ValueError, match="must be a dict or a dataclass"):
        seal(record)


def test_the_checksum_key_is_reserved():
    with pytest.raises(ValueError, match="crc32"):
        seal({"crc32": "deadbeef"})


def test_a_torn_tail_is_cut_on_open_and_the_next_record_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        journal.append({"step": 1})
        end = journal.append({"step": 2})
    for num_bytes in range(1, 30):
        torn = seal({"step": 3, "filler": "x" * 200_000})[: num_bytes * 6000]
        with open(path, "ab") as file:
            file.write(torn)
        assert read_journal(path).num_bad == 1
        with Journal(path) as journal:
            assert journal.offset == end
            assert journal.num_repaired_bytes == len(torn)
    with Journal(path) as journal:
        journal.append({"step": 3})
    reading = read_journal(path)
    assert ([record["step"] for record in reading.records], reading.num_bad) == ([1, 2, 3], 0)


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\0" * 200_000)
    with Journal(path) as journal:
        assert journal.offset == 0
    assert path.stat().st_size == 0


def test_truncation_forgets_what_came_after_a_checkpoint(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        for step in range(5):
            journal.append({"step": step})
        offset = journal.offset
        for step in range(5, 9):
            journal.append({"step": step})
        journal.sync()
    with Journal(path) as journal:
        journal.truncate_to(offset)
        journal.append({"step": 5, "again": True})
    assert [record["step"] for record in read_journal(path).records] == [0, 1, 2, 3, 4, 5]
    with Journal(path) as journal:
        journal.truncate_to(0)
    assert read_journal(path).records == []


def test_truncation_refuses_a_checkpoint_of_another_journal(tmp_path):
    with Journal(tmp_path / "a.jsonl") as journal:
        end = journal.append({"step": 1})
        with pytest.raises(ValueError, match="inside a record"):
            journal.truncate_to(end - 3)
        with pytest.raises(ValueError, match=f"holds {end} bytes of records but the checkpoint expects {end + 1}"):
            journal.truncate_to(end + 1)


def test_offsets_of_a_scan_are_where_the_records_start(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        starts = [journal.offset] + [journal.append({"step": step}) for step in range(3)]
    with open(path, "ab") as file:
        file.write(b"not a record\n")
    scanned = list(scan_journal(path))
    assert [offset for offset, _ in scanned] == starts
    assert [record and record["step"] for _, record in scanned] == [0, 1, 2, None]


def test_a_second_process_may_not_write_the_same_journal(tmp_path):
    path = tmp_path / "a.jsonl"
    open_elsewhere = f"from megatron_tcod.journal import Journal; Journal({str(path)!r})"
    with Journal(path):
        second = subprocess.run([sys.executable, "-c", open_elsewhere], capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert "ValueError" in second.stderr and "is being written by another process" in second.stderr
    assert subprocess.run([sys.executable, "-c", open_elsewhere], timeout=60).returncode == 0


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path):
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        end = journal.append({"step": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (end + 100, limits[1]))
        try:
            with pytest.raises(OSError, match="100 of 50"):
                journal.append({"step": 2, "filler": "x" * 50_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert journal.offset == end
        journal.append({"step": 3})
    reading = read_journal(path)
    assert ([record["step"] for record in reading.records], reading.num_bad) == ([1, 3], 0)


def test_forty_sigkills_tear_nothing_and_lose_nothing_acknowledged(tmp_path):
    path, rng = tmp_path / "a.jsonl", random.Random(20240)
    next_number = 0
    for round_number in range(40):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(next_number), str(round_number)], stdout=subprocess.PIPE
        )
        assert writer.stdout.readline() == b"%d\n" % next_number  # it is running: now let it write for a moment
        time.sleep(rng.uniform(0, 0.03))
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = writer.stdout.read().split(b"\n")
        writer.wait()
        writer.stdout.close()
        num_acknowledged = int(acknowledged[-2]) + 1 if len(acknowledged) > 1 else next_number + 1
        with Journal(path) as journal:  # the reopening that a restarted run does
            reading = read_journal(path)
            assert reading.num_bad == 0
            numbers = [record["number"] for record in reading.records]
            assert numbers == list(range(len(numbers)))
            assert len(numbers) >= num_acknowledged
            next_number = len(numbers)
            if journal.offset > 3_000_000:
                journal.truncate_to(0)
                next_number = 0


def test_ten_thousand_mutated_lines_are_all_counted(tmp_path):
    rng, path = random.Random(7), tmp_path / "a.jsonl"
    expected, num_mutated, num_still_json = [], 0, 0
    with open(path, "wb") as file:
        for number in range(12_000):
            record = {"number": number, "loss": rng.random(), "text": "go to desk 1 <é>" * rng.randrange(3)}
            line = seal(record)
            if number % 6 == 0:
                file.write(line)
                expected.append(record)
                continue
            mutated = _mutate(line[:-1], rng)
            num_mutated += 1
            num_still_json += _is_json(mutated)
            file.write(mutated + b"\n")
    reading = read_journal(path)
    assert num_mutated == 10_000
    assert num_still_json > 500, "the checksum has to be what catches these"
    assert reading.records == expected
    assert reading.num_bad == num_mutated


def _mutate(line: bytes, rng: random.Random) -> bytes:
    """`line` with one to three bytes changed, cut out, or put in; never a newline, never unchanged."""
    out = bytearray(line)
    while bytes(out) == line:
        for _ in range(rng.randrange(1, 4)):
            position = rng.randrange(len(out))
            byte = rng.choice([b for b in range(256) if b != 10])
            edit = rng.randrange(4)
            if edit == 0:
                out[position] = byte
            elif edit == 1:
                del out[position : position + rng.randrange(1, 9)]
            elif edit == 2:
                out.insert(position, byte)
            else:
                out[position] ^= 1 << rng.randrange(8)
                if out[position] == 10:
                    out[position] = 11
            if not out:
                out = bytearray(b"{")
    return bytes(out)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
