"""Training checkpoints: resumed runs end on the same bits, layouts may change, damage is found, nothing stays half."""

import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import time

import pytest
import torch
from checkpoint_content import digest_of
from gloo_world import run_ranks
from safetensors.torch import load_file
from tiny_models import tiny_shape

from megatron_tcod.model import build, checkpoint, parallel
from megatron_tcod.model.checkpoint import CheckpointError, find_latest, load_latest, save
from megatron_tcod.model.families import find_family
from megatron_tcod.model.mapping import export_hf, hf_plan, load_named
from megatron_tcod.model.optimizer_state import AdamState
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.shape import ExpertShape
from megatron_tcod.model.sharded_files import ShardedWeights
from megatron_tcod.model.student import OptimizerSettings, Student

FAMILY = find_family("qwen3")
SHAPE = tiny_shape(qk_layernorm=True, tie_word_embeddings=True, hidden_size=32, ffn_hidden_size=48, kv_channels=8)
EXPERTS = dataclasses.replace(SHAPE, experts=ExpertShape(num_experts=4, num_experts_per_token=2, ffn_hidden_size=16))
SETTINGS = OptimizerSettings(lr=0.02, lr_decay_style="cosine", lr_warmup_iters=2, lr_decay_iters=8, weight_decay=0.1)
SAVED_AT, STEPS = 3, 6
LAYOUTS = {
    "tp2": ParallelLayout(tensor_model_parallel_size=2),
    "dp": ParallelLayout(),
    "pp2": ParallelLayout(pipeline_model_parallel_size=2),
    "tp4": ParallelLayout(tensor_model_parallel_size=4),
    "tp2_pp2": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp2_sp": ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2_cp2": ParallelLayout(pipeline_model_parallel_size=2, context_parallel_size=2),
    "pp2_vpp2": ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}
RESUMES = [("tp2", "tp2"), ("tp2_pp2", "tp2_pp2"), ("tp2_pp2", "dp"), ("tp2", "pp2_vpp2"), ("pp2", "tp4")]


def family_of(shape):
    return find_family("qwen3_moe") if shape.experts else FAMILY


def new_student(layout=None, *, seed=1, shape=SHAPE, dtype=torch.float32):
    return Student(shape, layout or ParallelLayout(), SETTINGS, seed=seed, dtype=dtype)


def train(student, start, stop, shape=SHAPE):
    """Optimizer steps `[start, stop)` on gradients that depend on the step and the full tensor's name only."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        gradients = {
            name: torch.randn(size, generator=generator) for name, _, size in hf_plan(family_of(shape), shape, torch.float32)
        }
        load_named(
            student.chunks, family_of(shape), shape, gradients, write=lambda parameter, part: parameter.main_grad.copy_(part)
        )
        student.optimizer.prepare_grads()
        student.optimizer.step_with_ready_grads()
        student.scheduler.step(1)


def weights(student, shape=SHAPE):
    return {name: tensor.clone() for name, tensor in export_hf(student.chunks, family_of(shape), shape)}


def adam(student, shape=SHAPE):
    """Every optimizer tensor in full, gathered by the Hugging Face export; collective."""
    state = AdamState(student.chunks, student.optimizer)
    kinds = list(state.tensors(next(build.named_parameters(student.chunks))[1]))
    model = student.chunks, family_of(shape), shape
    return {"step": torch.tensor(state.scalars()["step"])} | {
        f"{kind}.{name}": tensor.clone()
        for kind in kinds
        for name, tensor in export_hf(*model, read=lambda p, kind=kind: state.tensors(p)[kind])
    }


def save_student(root, student, step, *, shape=SHAPE, **more):
    return save(
        root,
        step=step,
        chunks=student.chunks,
        family=family_of(shape),
        shape=shape,
        optimizer=student.optimizer,
        scheduler=student.scheduler,
        **{"with_hf_weights": True, **more},
    )


def load_student(root, student, *, shape=SHAPE):
    return load_latest(
        root,
        chunks=student.chunks,
        family=family_of(shape),
        shape=shape,
        optimizer=student.optimizer,
        scheduler=student.scheduler,
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resume_worker(root):
    for saved_in, resumed_in in RESUMES:
        where = f"{saved_in} -> {resumed_in}"
        directory = root / f"{saved_in}_{resumed_in}"
        parallel.initialize(LAYOUTS[saved_in])
        student = new_student(LAYOUTS[saved_in])
        train(student, 0, SAVED_AT)
        path = save_student(directory, student, SAVED_AT, state={"journal": [17, 4]})
        assert (path / "manifest.json").exists(), where  # on every rank: all have waited for rank 0
        kept_weights, kept_adam = weights(student), adam(student)
        assert same(load_file(path / "model.safetensors"), kept_weights), where
        with ShardedWeights(path, FAMILY, SHAPE) as stored:
            assert same(dict(stored), kept_weights), where
        train(student, SAVED_AT, STEPS)
        uninterrupted = weights(student), adam(student)

        parallel.initialize(LAYOUTS[resumed_in])
        student = new_student(LAYOUTS[resumed_in], seed=99)
        loaded = load_student(directory, student)
        assert (loaded.step, loaded.state, loaded.path) == (SAVED_AT, {"journal": [17, 4]}, path), where
        assert same(weights(student), kept_weights) and same(adam(student), kept_adam), where
        train(student, SAVED_AT, STEPS)
        if saved_in == resumed_in:
            assert same(weights(student), uninterrupted[0]) and same(adam(student), uninterrupted[1]), where
        # a vectorised CPU kernel may round the tail of a shard by another instruction than its middle
        for name, tensor in weights(student).items():
            torch.testing.assert_close(tensor, uninterrupted[0][name], rtol=1e-6, atol=1e-7, msg=f"{where} {name}")
    check_chain(root / "chain", SHAPE, ("tp2", "pp2_cp2", "pp2", "dp", "tp2_pp2"))
    check_chain(root / "experts", EXPERTS, ("tp2_sp", "pp2", "dp"))
    check_errors_reach_every_rank(root)
    parallel.shutdown()


def check_chain(root, shape, layouts):
    """One checkpoint goes from layout to layout, saved again in each: not a bit of weights and moments changes."""
    digests = set()
    for number, layout in enumerate(layouts):
        parallel.initialize(LAYOUTS[layout])
        student = new_student(LAYOUTS[layout], seed=number, shape=shape)
        if number == 0:
            train(student, 0, SAVED_AT, shape)
            kept = weights(student, shape), adam(student, shape)
        else:
            load_student(root / f"{number - 1}", student, shape=shape)
        assert same(weights(student, shape), kept[0]) and same(adam(student, shape), kept[1]), layout
        path = save_student(root / f"{number}", student, SAVED_AT, shape=shape, with_hf_weights=False)
        with ShardedWeights(path, family_of(shape), shape) as stored:
            assert same(dict(stored), kept[0]), layout
        digests.add(digest_of(path, vocab_size=shape.vocab_size))
    assert len(digests) == 1


def check_errors_reach_every_rank(root):
    layout = LAYOUTS["tp2_pp2"]
    parallel.initialize(layout)
    student = new_student(layout)
    directory = root / "tp2_pp2_dp"
    for words, action in (
        ("state.json", lambda: save_student(directory, student, 9, state={"set": {1}})),
        ("none of 1 checkpoints is intact", lambda: load_student(directory, student)),
    ):
        if "intact" in words and parallel.rank() == 0:
            with open(directory / "step_0000003" / "__3_0.distcp", "r+b") as file:
                file.truncate(1000)
        try:
            action()
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"rank {parallel.rank()} did not hear of: {words}")
    assert not (directory / "step_0000009").exists()


def test_resumed_runs_end_like_uninterrupted_ones_in_the_same_and_in_other_layouts(tmp_path):
    run_ranks(4, resume_worker, tmp_path)
    name = "_".join(RESUMES[0])
    config = json.loads((tmp_path / name / f"step_{SAVED_AT:07d}" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def saving_process(root, acknowledge):
    """Resume, then save step after step, writing each finished step's number to a pipe, until killed."""
    parallel.initialize(ParallelLayout())
    student = new_student()
    loaded = load_student(root, student)
    step = loaded.step if loaded else 0
    while True:
        step += 1
        save_student(root, student, step, state={"step": step})
        os.write(acknowledge, f"{step:07d}".encode())


def kill_worker(root, num_kills):
    """Forks, so that the imports are paid once. Nothing here may start a thread before the fork."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    draw, acknowledged = random.Random(3), 0
    for _ in range(num_kills):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            saving_process(root, write_end)
        os.close(write_end)
        for _ in range(draw.randrange(1, 4)):
            acknowledged = int(os.read(read_end, 7))
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while data := os.read(read_end, 7):
            acknowledged = int(data)
        os.close(read_end)
        path = find_latest(root)
        state = json.loads((path / "state.json").read_text())
        assert acknowledged <= state["step"] <= acknowledged + 1
        assert state["state"] == {"step": state["step"]} and path.name == f"step_{state['step']:07d}"


def test_killed_at_any_moment_the_last_finished_checkpoint_is_there(tmp_path):
    run_ranks(1, kill_worker, tmp_path, 8)
    assert len(list(tmp_path.glob("step_*"))) <= 3  # the two that are kept, and one that was about to go


@pytest.fixture(scope="module", autouse=True)
def lone_rank():
    parallel.initialize(ParallelLayout())
    yield
    parallel.shutdown()


def test_resumed_weights_equal_plain_adamw(tmp_path):
    """Against torch's AdamW on the full tensors, interruptions included, up to the rounding of fp32."""
    student = new_student()
    full = {name: torch.nn.Parameter(tensor.double()) for name, tensor in weights(student).items()}
    groups = [
        {"params": [p for p in full.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in full.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for name, _, size in hf_plan(FAMILY, SHAPE, torch.float32):
            full[name].grad = torch.randn(size, generator=generator).double()
        for group in reference.param_groups:
            group["lr"] = student.optimizer.param_groups[0]["lr"]
        reference.step()
        train(student, step, step + 1)
        save_student(tmp_path, student, step + 1)
        student = new_student(seed=step + 50)
        assert load_student(tmp_path, student).step == step + 1
    for name, tensor in weights(student).items():
        torch.testing.assert_close(tensor.double(), full[name].detach(), rtol=2e-5, atol=2e-6, msg=name)


def test_a_run_saved_before_its_first_step_resumes(tmp_path):
    student = new_student()
    save_student(tmp_path, student, 0)
    resumed = new_student(seed=5)
    assert load_student(tmp_path, resumed).step == 0
    assert set(adam(resumed)) == set(adam(student)) and all(not tensor.any() for tensor in adam(resumed).values())
    for one in (student, resumed):
        train(one, 0, 2)
    assert same(weights(student), weights(resumed))


def test_bf16_training_resumes_on_the_same_bits_through_its_master_weights(tmp_path):
    student = new_student(dtype=torch.bfloat16)
    train(student, 0, 2)
    path = save_student(tmp_path, student, 2)
    assert {tensor.dtype for tensor in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
    resumed = new_student(seed=5, dtype=torch.bfloat16)
    load_student(tmp_path, resumed)
    for one in (student, resumed):
        train(one, 2, 4)
    assert same(weights(student), weights(resumed)) and same(adam(student), adam(resumed))
    with pytest.raises(CheckpointError, match="this run has no fp32 master weights"):
        load_student(tmp_path, new_student())


class GroupStepAdam(torch.optim.Optimizer):
    """Counts steps in the parameter group, as the fused Adams of Apex and Transformer Engine do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                for kind, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
                    state[kind] = 0.9 * state.get(kind, 0) + 0.1 * parameter.detach() ** power
                parameter.data.sub_(group["lr"] / group["step"] * state["exp_avg"])


def test_optimizers_that_count_in_the_group_resume(tmp_path):
    def make(seed):
        chunks = build.build_model(SHAPE, ParallelLayout(), seed=seed, wrap_ddp=True)
        return chunks, GroupStepAdam([parameter for _, parameter in build.named_parameters(chunks)])

    (chunks, optimizer), (others, other) = make(1), make(2)
    optimizer.step()
    save(tmp_path, step=1, chunks=chunks, family=FAMILY, shape=SHAPE, optimizer=optimizer)
    load_latest(tmp_path, chunks=others, family=FAMILY, shape=SHAPE, optimizer=other)
    assert other.param_groups[0]["step"] == 1
    for one in (optimizer, other):
        one.step()
    assert same(dict(export_hf(chunks, FAMILY, SHAPE)), dict(export_hf(others, FAMILY, SHAPE)))


def test_a_foreign_optimizer_is_refused():
    student = new_student()
    with pytest.raises(ValueError, match="word_embeddings.weight is not in the optimizer"):
        AdamState(student.chunks, torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Steps 1 and 2 of one run, with a tokenizer file."""
    root = tmp_path_factory.mktemp("run")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text('{"any": "thing"}')
    (root / "tokenizer" / "config.json").write_text('{"eos_token_id": 7, "vocab_size": 1}')
    student = new_student()
    for step in (1, 2):
        train(student, step - 1, step)
        save_student(root / "save", student, step, tokenizer=root / "tokenizer", state={"curriculum": {"k": step}})
    return root / "save"


@pytest.fixture
def root(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints, tmp_path / "save")
    return tmp_path / "save"


def test_a_checkpoint_is_a_hugging_face_directory(root):
    import transformers

    path = root / "step_0000002"
    assert (path / "tokenizer.json").read_text() == '{"any": "thing"}'
    config = json.loads((path / "config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (7, SHAPE.vocab_size)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    stored = load_file(path / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())


def test_the_newest_is_loaded_and_nothing_there_is_none(root, tmp_path):
    assert (root / "latest").read_text() == "step_0000002\n"
    assert load_student(root, new_student()).state == {"curriculum": {"k": 2}}
    assert load_student(tmp_path / "absent", new_student()) is None
    (tmp_path / "empty").mkdir()
    assert load_student(tmp_path / "empty", new_student()) is None


SHARDED = ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"]
FILES = [*SHARDED, "config.json", "model.safetensors", "state.json", "tokenizer.json", "manifest.json"]


def test_damage_is_named_in_the_log_with_what_is_taken_instead(root, caplog):
    path = root / "step_0000002" / "__0_0.distcp"
    path.write_bytes(b"\x00" + path.read_bytes()[1:])
    with caplog.at_level(logging.WARNING):
        assert find_latest(root) == root / "step_0000001"
    assert "step_0000002 is not intact" in caplog.text and "__0_0.distcp has sha256" in caplog.text
    assert "falling back to checkpoint step_0000001" in caplog.text


def test_truncated_and_missing_files_are_found(root):
    newest = root / "step_0000002"
    draw = random.Random(1)
    for name in FILES:
        path = newest / name
        intact = path.read_bytes()
        for size in [0, len(intact) - 1, draw.randrange(len(intact))]:
            path.write_bytes(intact[:size])
            assert find_latest(root) == root / "step_0000001", (name, size)
        path.unlink()
        assert find_latest(root) == root / "step_0000001", name
        path.write_bytes(intact)
    assert load_student(root, new_student()).step == 2


def test_when_none_is_intact_each_reason_is_given(root):
    for step in (1, 2):
        (root / f"step_{step:07d}" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        load_student(root, new_student())
    for word in ("none of 2", "step_0000001", "step_0000002", "state.json", "restore"):
        assert word in str(caught.value)


def test_what_a_crash_leaves_behind_is_invisible_and_swept_up(root):
    shutil.copytree(root / "step_0000002", root / ".step_0000003.tmp")  # killed before the rename
    shutil.copytree(root / "step_0000002", root / ".step_0000000.gone")  # killed while removing an old one
    (root / ".latest.tmp").write_text("step_00000")  # killed while replacing the pointer
    shutil.copytree(root / "step_0000002", root / "step_0000004")
    (root / "step_0000004" / "manifest.json").unlink()  # not by us: a copy by hand that stopped half-way
    assert find_latest(root) == root / "step_0000002"
    student = new_student()
    assert load_student(root, student).step == 2
    train(student, 2, 3)
    save_student(root, student, 3)
    assert not list(root.glob(".step_*"))
    assert find_latest(root) == root / "step_0000003"


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(root, caplog):
    (root / "step_0000002").rename(root / ".step_0000002.old")  # set aside, and the new one not yet in place
    shutil.copytree(root / "step_0000001", root / ".step_0000002.tmp")
    student = new_student()
    assert load_student(root, student).step == 2
    assert "step_0000002: putting it back" in caplog.text
    save_student(root, student, 2, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_0000002"]


def test_a_damaged_step_ahead_is_not_kept_in_place_of_an_intact_one(root, caplog):
    student = new_student()
    load_student(root, student)
    save_student(root, student, 6)
    (root / "step_0000006" / "state.json").write_text("{}")
    assert load_student(root, student).step == 2
    save_student(root, student, 4)
    assert sorted(path.name for path in root.glob("step_*")) == ["step_0000002", "step_0000004"]
    assert "removing step_0000006: training has gone back behind them" in caplog.text


@pytest.mark.parametrize("text", ["", "step_0000009\n", "../elsewhere\n", "\x00\xff"])
def test_a_pointer_to_nothing_does_not_hide_the_checkpoints(root, text, caplog):
    (root / "latest").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert find_latest(root) == root / "step_0000002"
    assert "taking the newest" in caplog.text
    (root / "latest").unlink()
    assert find_latest(root) == root / "step_0000002"


def test_the_pointer_takes_a_run_back_and_saving_then_replaces_what_came_after(root):
    (root / "latest").write_text("step_0000001\n")
    student = new_student()
    assert load_student(root, student).step == 1
    before = load_file(root / "step_0000002" / "model.safetensors")
    save_student(root, student, 2, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_0000002"]
    assert not same(load_file(root / "step_0000002" / "model.safetensors"), before)
    assert find_latest(root) == root / "step_0000002"


def test_only_the_newest_are_kept_and_the_one_just_written_always(root):
    student = new_student()
    load_student(root, student)
    for step in (3, 4):
        save_student(root, student, step, keep=3)
    assert sorted(path.name for path in root.glob("step_*")) == ["step_0000002", "step_0000003", "step_0000004"]
    save_student(root, student, 1, keep=1)
    assert [path.name for path in root.glob("step_*")] == ["step_0000001"]
    with pytest.raises(ValueError, match="keep 0"):
        save_student(root, student, 5, keep=0)


def test_a_checkpoint_that_is_a_link_goes_without_what_it_leads_to(root, tmp_path):
    (root / "step_0000002").rename(tmp_path / "elsewhere")
    (root / "step_0000002").symlink_to(tmp_path / "elsewhere")
    student = new_student()
    assert load_student(root, student).step == 2
    save_student(root, student, 3, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_0000003"]
    assert (tmp_path / "elsewhere" / "state.json").is_file()


def test_a_save_that_fails_leaves_the_earlier_ones_and_no_trace(root):
    student = new_student()
    load_student(root, student)
    with pytest.raises(ValueError, match="state.json.*set"):
        save_student(root, student, 3, state={"seen": {1, 2}})
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_0000001", "step_0000002"]
    assert load_student(root, new_student()).step == 2


def test_a_checkpoint_of_another_model_is_refused_by_field(root):
    other = dataclasses.replace(SHAPE, num_layers=2, ffn_hidden_size=64)
    student = new_student(shape=other)
    before = weights(student, other)
    with pytest.raises(CheckpointError) as caught:
        load_student(root, student, shape=other)
    for word in ("another model", "ffn_hidden_size expected 64, got 48", "num_layers expected 2, got 4"):
        assert word in str(caught.value)
    assert same(weights(student, other), before)


def test_files_that_verify_but_are_of_another_model_are_refused(root):
    """Someone exchanged config.json and made the manifest anew."""
    path = root / "step_0000002"
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    checkpoint.write_manifest(path, {"step": 2})
    with pytest.raises(CheckpointError, match="config.json and state.json disagree"):
        load_student(root, new_student())


def test_shards_of_another_model_are_refused_by_tensor(root, tmp_path):
    """Someone exchanged the shards and made the manifest anew."""
    other = dataclasses.replace(SHAPE, ffn_hidden_size=64)
    foreign = save_student(tmp_path / "other", new_student(shape=other), 2, shape=other)
    path = root / "step_0000002"
    for name in SHARDED:
        shutil.copy(foreign / name, path / name)
    checkpoint.write_manifest(path, {"step": 2})
    with pytest.raises(ValueError, match=r"Global shape mismatch.*linear_fc1"):
        load_student(root, new_student())
    deeper = dataclasses.replace(SHAPE, num_layers=2)
    foreign = save_student(tmp_path / "shallow", new_student(shape=deeper), 2, shape=deeper)
    for name in SHARDED:
        shutil.copy(foreign / name, path / name)
    checkpoint.write_manifest(path, {"step": 2})
    with pytest.raises(ValueError, match="not in"):
        load_student(root, new_student())
