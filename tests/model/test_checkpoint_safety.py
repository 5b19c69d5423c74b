"""Damaged checkpoints are noticed whatever the byte, and hostile ones run nothing, where stock torch would."""

import io
import json
import os
import pickle
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from test_checkpoint import FAMILY, FILES, SHAPE, load_student, new_student, save_student, train, weights

from megatron_tcod.model import checkpoint, parallel, safe_reader
from megatron_tcod.model.checkpoint import find_latest
from megatron_tcod.model.mapping import check_tensors
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.sharded_files import ShardedWeights, read_sharded
from megatron_tcod.model.weight_files import verify_manifest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402

NUM_FLIPS, NUM_TRUNCATIONS = 1000, 200


@pytest.fixture(scope="module", autouse=True)
def lone_rank():
    parallel.initialize(ParallelLayout())
    yield
    parallel.shutdown()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of a run, the second with everything a checkpoint can have."""
    root = tmp_path_factory.mktemp("run")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text('{"any": "thing"}')
    student = new_student()
    for step in (1, 2):
        train(student, step - 1, step)
        save_student(root / "save", student, step, tokenizer=root / "tokenizer", state={"curriculum": {"k": step}})
    return root / "save"


@pytest.fixture
def root(tmp_path, saved):
    shutil.copytree(saved, tmp_path / "save")
    return tmp_path / "save"


def test_1000_flipped_bytes_and_200_truncations_are_all_found(root):
    """Spread over the files by their size, each at least 20 times; every 20th time to the one that is taken instead."""
    newest, draw, found = root / "step_0000002", random.Random(0), 0
    sizes = {name: (newest / name).stat().st_size for name in FILES}
    for count, damage in ((NUM_FLIPS, flip), (NUM_TRUNCATIONS, truncate)):
        least = 20 * count // NUM_FLIPS
        rest = draw.choices(FILES, weights=[sizes[name] for name in FILES], k=count - least * len(FILES))
        for name in [*FILES * least, *rest]:
            path = newest / name
            intact = path.read_bytes()
            path.write_bytes(damage(intact, draw))
            with pytest.raises(ValueError, match=re.escape(name)):
                verify_manifest(newest)
            if found % 20 == 0:
                assert find_latest(root) == root / "step_0000001", (name, damage)
            path.write_bytes(intact)
            found += 1
    assert found == NUM_FLIPS + NUM_TRUNCATIONS and find_latest(root) == newest


def flip(data, draw):
    position = draw.randrange(len(data))
    return data[:position] + bytes([data[position] ^ draw.randrange(1, 256)]) + data[position + 1 :]


def truncate(data, draw):
    return data[: draw.randrange(len(data))]


def test_a_damaged_checkpoint_is_no_student_and_is_not_exported(root, tmp_path):
    from megatron_tcod.model.pretrained import verify_if_listed

    path = root / "step_0000002"
    data = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(flip(data, random.Random(3)))
    export = partial(convert_checkpoint.checkpoint_to_hf, target=tmp_path / "out", max_part_bytes=10**9)
    for use in (verify_if_listed, export):
        with pytest.raises(ValueError, match="__0_0.distcp has sha256"):
            use(path)
    assert not (tmp_path / "out").exists()


class Hostile:
    """Unpickles by calling something."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def dotted(canary):
    """A global that is reached through an attribute of an allowed module: protocol 4 splits the name at its dots."""
    touch = pickle.dumps(f"touch {canary}")[2:-1]
    name = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93"
    return b"\x80\x04" + name + b"(" + touch + b"tR."


def by_inst(canary):
    """The oldest opcode that calls: INST."""
    return b"(S'touch %s'\nios\nsystem\n." % str(canary).encode()


def by_build(canary):
    """An allowed class whose state is set by a call."""
    return pickle.dumps(dcp.metadata.StorageMeta())[:-1] + b"0" + pickle.dumps(Hostile(os.system, f"touch {canary}"))[2:]


def hostile_pickles(canary):
    """Five ways to run code when unpickled, each making the file `canary`."""
    return {
        "os.system": pickle.dumps(Hostile(os.system, f"touch {canary}")),
        "exec": pickle.dumps(Hostile(exec, f"open({str(canary)!r}, 'w')")),
        "open": pickle.dumps(Hostile(open, str(canary), "w")),
        "inst": by_inst(canary),
        "build": by_build(canary),
    }


def as_archive(stream):
    """The pickle in the file that torch.save would have made around it."""
    archive = io.BytesIO()
    with torch.serialization._open_zipfile_writer(archive) as writer:
        writer.write_record("data.pkl", stream, len(stream))
    return archive.getvalue()


def replace_entry(path, kind, content):
    """Put other bytes where the first weight, or the first entry that is no tensor, lies; `.metadata` points to them.
    A `weight called object` it calls an object, which stock torch believes."""
    with open(path / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    is_object = lambda index: isinstance(  # noqa: E731
        metadata.state_dict_metadata[index.fqn], dcp.metadata.BytesStorageMetadata
    )
    entries = [index for index in metadata.storage_data if not index.fqn.startswith("optimizer")]
    index = next(index for index in entries if is_object(index) == (kind == "object"))
    shard = path / "__0_0.distcp"
    info = metadata.storage_data[index]
    info.offset, info.length = shard.stat().st_size, len(content)
    if kind == "weight called object":
        metadata.storage_data[dcp.metadata.MetadataIndex(index.fqn)] = metadata.storage_data.pop(index)
        metadata.state_dict_metadata[index.fqn] = dcp.metadata.BytesStorageMetadata()
    shard.write_bytes(shard.read_bytes() + content)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def plant(path, place, stream):
    if place == ".metadata":
        (path / ".metadata").write_bytes(stream)
    elif place == "common.pt":
        (path / "common.pt").write_bytes(as_archive(stream))
    else:
        replace_entry(path, place, as_archive(stream))
    checkpoint.write_manifest(path, {"step": 2})  # the hashes do not give it away


def sharded_of(student):
    return checkpoint._tensors(student.chunks, checkpoint.optimizer_state(student.chunks, student.optimizer), with_rng=True)


def load_as_others_do(path, place, student):
    """Megatron's own load, which is not fooled about what is a tensor, or torch's own, which is; for a tensor's entry, which
    both read with weights_only, torch.load without."""
    if place == "tensor":
        return torch.load(io.BytesIO(last_archive(path)), weights_only=False)
    if place != "weight called object":
        return dist_checkpointing.load(sharded_of(student), str(path))
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
    weights = {name: torch.empty(getattr(entry, "size", ())) for name, entry in entries if not name.startswith("optimizer")}
    return dcp.load(weights, storage_reader=dcp.FileSystemReader(path), no_dist=True)


def last_archive(path):
    with open(path / ".metadata", "rb") as file:
        infos = pickle.load(file).storage_data.values()
    info = max(infos, key=lambda info: info.offset)
    return (path / "__0_0.distcp").read_bytes()[info.offset : info.offset + info.length]


def read_in_part(path, place, student):
    """The weights alone, as for an export, or where they are not attacked everything without the manifest's check."""
    if place == "object":
        return read_sharded(path, sharded_of(student))
    stored = ShardedWeights(path, FAMILY, SHAPE)
    check_tensors(stored, FAMILY, SHAPE)
    return dict(stored)


@pytest.mark.parametrize("place", [".metadata", "common.pt", "object", "tensor", "weight called object"])
def test_25_hostile_pickles_run_nothing_here_and_run_elsewhere(root, tmp_path, monkeypatch, place):
    """Under the variable torch.load does what it did before 2.6, which is what `common.pt` needs to run."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, student = root / "step_0000002", new_student()
    shutil.copytree(path, tmp_path / "intact")
    for number, name in enumerate(hostile_pickles(tmp_path / "x")):
        canary = tmp_path / f"canary_{number}"
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "intact", path)
        plant(path, place, hostile_pickles(canary)[name])
        if place == "common.pt":
            assert load_student(root, student).step == 2  # it is never opened
        else:
            with pytest.raises(ValueError, match="refused|cannot read"):
                load_student(root, student)
            with pytest.raises(ValueError, match="missing" if place == "weight called object" else "refused|cannot read"):
                read_in_part(path, place, student)
        assert not canary.exists(), name
        try:
            load_as_others_do(path, place, student)
        except BaseException:  # noqa: BLE001  after it has run, what it returned is no checkpoint
            pass
        assert canary.exists(), f"{name} is no attack: nobody else runs it either"


def test_the_witnesses_run_when_pickle_is_allowed(root, tmp_path):
    path, canary = root / "step_0000002", tmp_path / "canary"
    plant(path, "object", hostile_pickles(canary)["exec"])
    tensors = sharded_of(new_student())
    with pytest.raises(ValueError, match="refused.*--allow-pickle"):
        read_sharded(path, tensors)
    assert not canary.exists()
    try:
        read_sharded(path, sharded_of(new_student()), allow_pickle=True)
    except BaseException:  # noqa: BLE001  as above
        pass
    assert canary.exists()


def test_names_beside_the_allowed_ones_are_refused_however_they_are_written(tmp_path):
    """Attributes of allowed modules, extension codes, persistent ids, memo games."""
    canary = tmp_path / "canary"
    streams = {
        "dotted": dotted(canary),
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02U\x01a\x51.",
        "builtins": b"cbuiltins\neval\n(S'open(%r, \"w\")'\ntR." % str(canary).encode(),
        "torch.load": b"ctorch\nload\n(S'%s'\ntR." % str(canary).encode(),
        "not a pickle": b"\x00" * 40,
        "nothing": b"",
        "another object": pickle.dumps({"state": 1}),
        "a file elsewhere": elsewhere(),
    }
    for name, stream in streams.items():
        (tmp_path / ".metadata").write_bytes(stream)
        with pytest.raises(ValueError, match="is refused"):
            safe_reader.read_metadata(tmp_path)
        assert not canary.exists(), name


def elsewhere():
    index = dcp.metadata.MetadataIndex("weight", (0,))
    info = dcp.filesystem._StorageInfo("../../etc/passwd", 0, 10)
    return pickle.dumps(dcp.metadata.Metadata({}, storage_data={index: info}))


def test_every_name_that_real_metadata_needs_is_allowed_and_hardly_more(root):
    """From fp32, bf16 and two layouts' worth of entries; what is allowed beyond are dtypes and path classes."""
    student = new_student(dtype=torch.bfloat16)
    train(student, 0, 1)
    save_student(root, student, 3, keep=3)
    needed = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module, name):
            needed.add((module, name))
            return super().find_class(module, name)

    for step in (2, 3):
        Recording(io.BytesIO((root / f"step_{step:07d}" / ".metadata").read_bytes())).load()
    assert needed <= set(safe_reader.ALLOWED)
    surplus = {value for key, value in safe_reader.ALLOWED.items() if key not in needed}
    assert all(isinstance(value, torch.dtype) or value.__module__.startswith("pathlib") for value in surplus)


def test_a_checkpoint_without_hugging_face_weights_is_a_model_directory_and_exports_to_one(tmp_path, capsys):
    import transformers

    student = new_student()
    train(student, 0, 2)
    path = save_student(tmp_path / "save", student, 2, with_hf_weights=False)
    assert not (path / "model.safetensors").exists()
    with ShardedWeights(path, FAMILY, SHAPE) as stored:
        assert stored.keys() == weights(student).keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights(student).items())
    arguments = ["--direction", "checkpoint-to-hf", "--input", str(path), "--output", str(tmp_path / "out")]
    assert convert_checkpoint.main(arguments) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights(student).items())
    assert not [name for name in os.listdir(tmp_path / "out") if "distcp" in name]
    assert convert_checkpoint.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_generators_go_back_where_they_were(tmp_path):
    import numpy

    student = new_student()
    for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
        seeded(5)
    random.gauss(0, 1), numpy.random.randn()  # each keeps a second value for next time

    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.randn(), torch.rand(3).tolist()

    save_student(tmp_path, student, 1, state={"k": 1})
    expected = draw()
    draw()
    load_student(tmp_path, student)
    assert draw() == expected
    assert json.loads((tmp_path / "step_0000001" / "state.json").read_text())["num_ranks"] == 1


def test_saving_beside_training_keeps_what_was_there_at_the_call(tmp_path):
    student, saver = new_student(), checkpoint.BackgroundSaver()
    train(student, 0, 2)
    before = {name: tensor.clone() for name, tensor in weights(student).items()}
    save_student(tmp_path, student, 2, saver=saver)
    train(student, 2, 4)  # writes into the very tensors
    saver.wait()
    resumed = new_student(seed=9)
    assert load_student(tmp_path, resumed).step == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(resumed).items())


def test_what_fails_beside_training_is_raised_by_the_next_save_and_leaves_no_trace(tmp_path, monkeypatch):
    student, saver = new_student(), checkpoint.BackgroundSaver()
    save_student(tmp_path, student, 1, saver=saver)
    saver.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    save_student(tmp_path, student, 2, saver=saver)
    with pytest.raises(OSError, match="No space left on device"):
        save_student(tmp_path, student, 3, saver=saver)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000001"]
    assert find_latest(tmp_path) == tmp_path / "step_0000001"
