"""Experts shared out over ranks: which rank holds which, weights and checkpoints from layout to layout, and what is refused.

That a step does not depend on the layout is shown in `test_layout_invariance.py`, beside the other layouts.
"""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_content import tensors_of
from gloo_world import run_ranks
from safetensors.torch import load_file
from test_checkpoint import EXPERTS, LAYOUTS, SETTINGS, check_chain, load_student, same, save_student, train, weights
from tiny_models import pack_rows, random_rows, tiny_shape

from megatron_tcod.model import build, parallel
from megatron_tcod.model.experts import check_experts, check_trainable
from megatron_tcod.model.families import find_family
from megatron_tcod.model.mapping import export_hf, load_hf, save_hf
from megatron_tcod.model.parallel import ParallelLayout, check_world_size
from megatron_tcod.model.schedule import run_schedule
from megatron_tcod.model.student import Student

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402

FAMILY = find_family("qwen3_moe")
EP2 = dict(expert_model_parallel_size=2)
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2)
HELD_IN = {
    "ep2": ParallelLayout(**EP2),
    "ep4": ParallelLayout(expert_model_parallel_size=4),
    "tp2_ep2": ParallelLayout(**TP2, **EP2),
    "pp2_ep2": ParallelLayout(**PP2, **EP2),
    "cp2_ep4": ParallelLayout(context_parallel_size=2, expert_model_parallel_size=4),
    "pp2_vpp2_ep2": ParallelLayout(**PP2, **EP2, virtual_pipeline_model_parallel_size=2),
}
LAYOUTS.update(HELD_IN)  # for `check_chain`
DISTRIBUTED = dataclasses.replace(SETTINGS, use_distributed_optimizer=True)


def worker(root):
    check_every_rank_holds_its_experts_and_exports_the_whole_model(root)
    check_replicas_without_work_take_part_in_the_others_layers()
    check_chain(root / "chain", EXPERTS, ("ep2", "dp", "ep4", "tp2_ep2"))
    check_the_distributed_optimizer_saves_and_resumes(root)
    check_bf16_resumes_through_its_master_weights(root)
    parallel.shutdown()


def check_every_rank_holds_its_experts_and_exports_the_whole_model(root):
    original = load_file(root / "hf" / "model.safetensors")
    for name, layout in HELD_IN.items():
        parallel.initialize(layout)
        chunks = build.build_model(EXPERTS, layout, seed=None, wrap_ddp=False)
        for _, parameter in build.named_parameters(chunks):
            parameter.fill_(float("nan"))
        load_hf(chunks, root / "hf", FAMILY, EXPERTS)
        exported = {key: tensor.clone() for key, tensor in export_hf(chunks, FAMILY, EXPERTS)}
        assert list(exported) == [key for slot in FAMILY.slots(EXPERTS) for key in slot.hf], name
        assert same(exported, original), name
        if layout.virtual_pipeline_model_parallel_size is None:
            ep, ranks = layout.expert_model_parallel_size, (parallel.tp_rank(), parallel.pp_rank(), parallel.ep_rank())
            stored = load_file(root / shards_of(layout) / "tp_{:02d}_pp_{:02d}_ep_{:02d}.safetensors".format(*ranks))
            held = dict(build.unwrap(chunks[0]).named_parameters())
            assert same(stored, held), (name, "the converter writes what a rank holds")
            counted = {int(key.split(".local_experts.")[1].split(".")[0]) for key in held if ".local_experts." in key}
            assert counted == set(range(EXPERTS.experts.num_experts // ep)), name
        save_hf(root / f"saved_{name}", chunks, FAMILY, EXPERTS)
        assert same(load_file(root / f"saved_{name}" / "model.safetensors"), original), name


def shards_of(layout):
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    return f"tp{tp}_pp{pp}_ep{layout.expert_model_parallel_size}"


def check_replicas_without_work_take_part_in_the_others_layers():
    """Replica r brings r microbatches: the hidden states are those of a world of replicas that hold everything."""
    rows = [pack_rows(random_rows([5 + 3 * index], seed=index)) for index in range(3)]
    found = []
    for layout in (ParallelLayout(), HELD_IN["ep2"], HELD_IN["ep4"]):
        parallel.initialize(layout)
        chunks = build.build_model(EXPERTS, layout, seed=4, wrap_ddp=False)
        hidden = {}

        def on_hidden(index, states, hidden=hidden):
            hidden[index] = states
            return states.sum()

        with torch.no_grad():
            run_schedule(chunks, layout, rows[: parallel.dp_rank()], on_hidden, forward_only=True)
        found.append(hidden)
    assert all(len(hidden) == parallel.dp_rank() for hidden in found)
    for shared in found[1:]:
        for index, states in found[0].items():
            torch.testing.assert_close(shared[index], states, rtol=1e-5, atol=1e-5)


def check_the_distributed_optimizer_saves_and_resumes(root):
    """What it files is what the plain optimizer files; both resume from it, at another size too, on the same bits."""
    for name, settings in (("plain", SETTINGS), ("cut", DISTRIBUTED)):
        student = new_student("ep2", settings)
        train(student, 0, 3, EXPERTS)
        path = save_student(root / name, student, 3, shape=EXPERTS, with_hf_weights=False)
    kept = weights(student, EXPERTS)
    train(student, 3, 5, EXPERTS)
    uninterrupted = weights(student, EXPERTS)
    if parallel.rank() == 0:
        one, other = tensors_of(root / "plain" / path.name), tensors_of(path)
        assert same(one, other)
        assert sum(".experts." in key and key.startswith("optimizer.state.") for key in one) == 2 * 2 * EXPERTS.num_layers
    for layout, settings in (("ep2", DISTRIBUTED), ("pp2_ep2", SETTINGS)):
        student = new_student(layout, settings, seed=9)
        assert load_student(root / "cut", student, shape=EXPERTS).step == 3
        assert same(weights(student, EXPERTS), kept), layout
        train(student, 3, 5, EXPERTS)
        resumed = weights(student, EXPERTS)
        if layout == "ep2":
            assert same(resumed, uninterrupted)
        for key, tensor in resumed.items():
            torch.testing.assert_close(tensor, uninterrupted[key], rtol=1e-6, atol=1e-7, msg=f"{layout} {key}")


def check_bf16_resumes_through_its_master_weights(root):
    student = new_student("ep2", DISTRIBUTED, dtype=torch.bfloat16)
    train(student, 0, 3, EXPERTS)
    save_student(root / "bf16", student, 3, shape=EXPERTS, with_hf_weights=False)
    train(student, 3, 5, EXPERTS)
    resumed = new_student("ep2", DISTRIBUTED, seed=9, dtype=torch.bfloat16)
    load_student(root / "bf16", resumed, shape=EXPERTS)
    train(resumed, 3, 5, EXPERTS)
    assert same(weights(resumed, EXPERTS), weights(student, EXPERTS))


def new_student(layout, settings, *, seed=1, dtype=torch.float32):
    parallel.initialize(LAYOUTS[layout])
    return Student(EXPERTS, LAYOUTS[layout], settings, seed=seed, dtype=dtype)


def test_weights_and_optimizer_keep_every_bit_over_expert_parallel_layouts(tmp_path):
    parallel.initialize(ParallelLayout())
    save_hf(tmp_path / "hf", build.build_model(EXPERTS, ParallelLayout(), seed=3, wrap_ddp=False), FAMILY, EXPERTS)
    parallel.shutdown()
    for layout in HELD_IN.values():
        tp, pp, ep = (getattr(layout, f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert"))
        if not (tmp_path / shards_of(layout)).exists():
            grid = convert_checkpoint.RankGrid(tp=tp, pp=pp, ep=ep)
            convert_checkpoint.hf_to_megatron(tmp_path / "hf", tmp_path / shards_of(layout), grid)
    run_ranks(4, worker, tmp_path)


def test_experts_are_shared_by_ranks_that_hold_the_same_weights():
    assert check_world_size(ParallelLayout(**TP2, **EP2), 8) == 4
    assert check_world_size(ParallelLayout(context_parallel_size=2, expert_model_parallel_size=4), 4) == 2
    for layout, world, words in (
        (ParallelLayout(expert_model_parallel_size=4), 2, "does not divide the 2 ranks of the world of 2"),
        (ParallelLayout(**TP2, expert_model_parallel_size=4), 4, r"\(cp 1 \* dp 2\); .* a multiple of 8 processes"),
        (ParallelLayout(**PP2, expert_model_parallel_size=3), 4, "expert_model_parallel_size 3 does not divide the 2"),
    ):
        with pytest.raises(ValueError, match=words):
            check_world_size(layout, world)
    with pytest.raises(ValueError, match="expert_model_parallel_size must be at least 1, got 0"):
        ParallelLayout(expert_model_parallel_size=0)


def test_experts_that_expert_parallelism_does_not_divide_are_refused_and_a_dense_model_is_not_trained_so():
    layout = ParallelLayout(expert_model_parallel_size=3)
    with pytest.raises(ValueError, match="3 does not divide the teacher's 4 experts of a layer; choose a divisor"):
        check_experts(EXPERTS, layout, whose="the teacher's")
    check_experts(tiny_shape(), layout)  # a dense teacher beside a student with experts
    with pytest.raises(ValueError, match="3 shares out experts and the trained model has none"):
        check_trainable(tiny_shape(), layout)
