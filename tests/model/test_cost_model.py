"""The plan's bytes, traffic and arithmetic are those of real models, as far as a CPU can tell."""

import json
from pathlib import Path

import pytest
import torch
from cost_worlds import (
    CHUNKED,
    CHUNKED_ROWS,
    IN_FLIGHT_CHUNKS,
    IN_FLIGHT_MICROBATCHES,
    SHAPES,
    TOKENS,
    backward,
    divergence_peak,
    held_bytes,
    one_row,
    report_ranks,
)
from gloo_world import run_ranks
from tiny_models import tiny_shape
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_tcod import cost_model, plan
from megatron_tcod.cost_model import DEVICES, Layout, Numerics, Serving, Workload
from megatron_tcod.model import build, parallel
from megatron_tcod.model.parallel import ParallelLayout
from megatron_tcod.model.student import OptimizerSettings, Student
from megatron_tcod.model.teacher import Teacher

ROOT = Path(__file__).parents[2]


def use_of(shape, layout, numerics=None, workload=None, **serving):
    return cost_model.rank_memory(
        shape,
        None,
        layout,
        numerics or Numerics(),
        workload or Workload(episodes=layout.dp, microbatch_tokens=1),
        Serving(servers=1, **serving),
        kind="cpu",
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks of a world report of both of its layouts."""
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(2, report_ranks, str(directory))
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", SHAPES)
def test_weights_gradients_and_optimizer_of_every_rank_are_exact(ranks, name, tp, pp):
    shape, largest = SHAPES[name], use_of(SHAPES[name], Layout(tp=tp, pp=pp))
    reports = [rank[f"{name} {tp} {pp}"] for rank in ranks]
    for report in reports:
        parameters = cost_model.stage_parameters(shape, tp, pp, report["stage"])
        assert report["held"] == {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}
    for key in ("weights", "gradients", "optimizer"):
        assert getattr(largest, key) == max(report["held"][key] for report in reports), "the plan tells the fullest stage"


def test_a_rank_holds_its_share_of_the_experts_and_a_sharded_optimizer_keeps_each_number_once(ranks):
    shape = SHAPES["experts"]
    use = use_of(shape, Layout(dp=2, ep=2))
    for rank in ranks:
        held = rank["experts ep 2"]["held"]
        assert held == {"weights": use.weights, "gradients": use.gradients, "optimizer": use.optimizer}
    sharded = use_of(shape, Layout(dp=4, ep=2), Numerics(is_optimizer_sharded=True))
    assert sharded.optimizer * 4 == 8 * cost_model.num_parameters(shape)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.experts is None])
def test_traffic_of_tensor_parallelism_is_what_the_ranks_reduce(ranks, name):
    """The embedding's all-reduce, one more beside two for each layer and direction, is the plan's omission."""
    sent = 2 * cost_model.layer_traffic(SHAPES[name], Layout(tp=2), Numerics(), TOKENS)
    for rank in ranks:
        reduced = rank[f"{name} 2 1"]["reduced"] * 2 * (2 - 1) / 2  # a ring of two sends as much as it reduces
        assert sent <= reduced <= 1.15 * sent
        assert rank[f"{name} 1 2"]["reduced"] == 0


@pytest.mark.parametrize("name", CHUNKED_ROWS)
def test_chunks_of_the_divergence_are_within_a_tenth(ranks, name):
    """Of what torch allocates at a time, with one shard of the vocabulary and with two, the fuller of which is planned."""
    rows = CHUNKED_ROWS[name]
    for tp, measured in ((1, divergence_peak(rows, 1)), (2, max(rank["peaks"][name] for rank in ranks))):
        planned = cost_model.chunk_bytes(CHUNKED, tp, rows, has_teacher=True, kind="cpu")
        assert 0.9 * measured < planned <= measured, tp


@pytest.fixture
def student():
    """Makes a student in a world of one."""
    layout = ParallelLayout()
    parallel.initialize(layout, seed=0)
    yield lambda shape, **settings: Student(shape, layout, OptimizerSettings(lr=1e-3), seed=0, **settings)
    parallel.shutdown()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_held_in_either_precision(student, dtype, width):
    for shape in SHAPES.values():
        use = use_of(shape, Layout(), Numerics(weight_bytes=width))
        held = held_bytes(student(shape, dtype=dtype))
        assert held == {"weights": use.weights, "gradients": use.gradients, "optimizer": use.optimizer}


@pytest.mark.parametrize("name", SHAPES)
def test_a_teacher_holds_its_weights_and_the_hidden_states_of_a_step(student, name):
    shape, row = SHAPES[name], one_row()
    student(tiny_shape())  # the world of one
    teacher = Teacher(shape, ParallelLayout(), seed=0)
    teacher.align_vocabulary(shape)
    (target,) = teacher.score([row])
    weights = sum(one.numel() * one.element_size() for chunk in teacher.chunks for one in chunk.parameters())
    held = weights + target.hidden.numel() * target.hidden.element_size()
    trained = len(row.positions)
    workload = Workload(episodes=1, turns=1, prompt_tokens=TOKENS - trained, observation_tokens=0, response_tokens=trained)
    use = cost_model.rank_memory(tiny_shape(), shape, Layout(), Numerics(), workload, Serving(servers=1), kind="cpu")
    assert use.teacher == held


@pytest.mark.parametrize("name", SHAPES)
def test_kept_activations_are_within_a_tenth(student, name):
    """Of what autograd saves: tensors that are not weights, each storage once."""
    shape, kept = SHAPES[name], {}
    one = student(shape)
    weights = {parameter.untyped_storage().data_ptr() for parameter in one.chunks[0].parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(one)
    measured = sum(size for size, _ in kept.values())
    workload = Workload(episodes=1, turns=0, prompt_tokens=TOKENS, microbatch_tokens=TOKENS)
    planned = cost_model.activation_bytes(shape, Layout(), Numerics(), workload.microbatch(Layout()), in_flight=1, stage=0)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("chunks", IN_FLIGHT_CHUNKS)
def test_as_many_passes_wait_for_their_backward_pass_as_the_schedules_keep(ranks, chunks):
    for stage, rank in enumerate(ranks):
        measured = rank["in flight"][IN_FLIGHT_CHUNKS.index(chunks)]
        assert cost_model.most_in_flight(Layout(pp=2, chunks=chunks), stage, IN_FLIGHT_MICROBATCHES) == measured
    assert cost_model.most_in_flight(Layout(pp=4, chunks=2), 0, 2) == 8, "two microbatches are filled up to four"


def test_activations_shrink_as_the_settings_say():
    shape = tiny_shape()
    whole = cost_model.layer_activations(shape, 1)
    assert cost_model.layer_activations(shape, 1, recompute="full") == shape.hidden_size
    assert cost_model.layer_activations(shape, 2, sequence_parallel=True) == whole / 2
    assert whole / 2 < cost_model.layer_activations(shape, 2) < whole


@pytest.mark.parametrize("name", SHAPES)
def test_forward_arithmetic_is_what_torch_counts(student, name):
    shape, one = SHAPES[name], student(SHAPES[name])
    plain = sdpa_kernel(SDPBackend.MATH)  # two products, which torch counts; it does not count the fused one of a CPU
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        build.forward_hidden(one.chunks[0], one_row())
    norms = 2 * TOKENS * shape.num_layers * (2 * shape.hidden_size + (2 * shape.kv_channels if shape.qk_layernorm else 0))
    bias = 2 * TOKENS * shape.num_layers * (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
    visible = 2 * shape.num_layers * shape.num_attention_heads * shape.kv_channels * TOKENS * TOKENS
    planned = cost_model.forward_flops(shape, TOKENS, TOKENS) - norms - (bias if shape.add_qkv_bias else 0) + visible
    assert planned == counter.get_total_flops(), "torch counts the masked half of the attention too, and products alone"


def test_kv_of_a_token_is_what_the_engine_keeps():
    from megatron_tcod.rollout.decoder import DecoderShape
    from megatron_tcod.rollout.kv_slots import KVSlots

    shape = tiny_shape()
    config = {
        "model_type": "qwen2", "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size, "head_dim": shape.kv_channels,
        "intermediate_size": shape.ffn_hidden_size, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_query_groups,
    }  # fmt: skip
    slots = KVSlots(DecoderShape.from_hf(config), num_rows=3, num_positions=31, dtype=torch.float32)
    held = slots.keys.numel() * 4 + slots.values.numel() * 4
    assert held == 3 * 32 * cost_model.kv_token_bytes(shape, 4)


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_the_chosen_layout_fits_and_none_that_fits_is_faster(gpus):
    question = scaling_question()
    best = plan.choose(question, gpus)
    assert best.fits and best.layout.world == gpus
    others = [plan.answer(question, layout) for layout in plan.layouts(question, gpus)]
    assert min(one.seconds for one in others if one.fits) >= best.seconds / 1.01
    assert any(not one.fits for one in others) or gpus > 8


def scaling_question(*flags):
    options, rest = plan.parse([str(ROOT / "examples/scaling/run.toml"), "--gpus", "8", *flags])
    config = plan.load_config(["--config", options.config, *rest, *model_flags()])
    return plan.question_of(config, options)[0]


def model_flags():
    return ["--student", str(ROOT / "examples/scaling/student"), "--teacher", str(ROOT / "examples/scaling/teacher")]


def test_a_teacher_of_its_own_layout_is_planned_in_it():
    question = scaling_question()
    same, own = (plan.answer(question, Layout(tp=2, pp=1, dp=4, teacher_tp=tp)) for tp in (2, 8))
    head = 2 * cost_model.padded_vocab_size(question.teacher.vocab_size, 2) // 2 * question.teacher.hidden_size
    whole, eighth = (cost_model.stage_parameters(question.teacher, tp, 1, 0) for tp in (2, 8))
    cut = 2 * (whole - eighth)
    assert same.memory.teacher - own.memory.teacher == cut - head, "an eighth of the weights, and the head as the student's"
    assert own.phases["teacher"].sent > same.phases["teacher"].sent


def test_a_teachers_stages_are_whole_where_the_students_are_interleaved():
    question = scaling_question()
    whole, cut = (plan.answer(question, Layout(tp=2, pp=2, dp=2, chunks=chunks)) for chunks in (1, 2))
    assert cut.phases["teacher"] == whole.phases["teacher"] and cut.memory.teacher == whole.memory.teacher
    assert cut.memory.activations > whole.memory.activations and cut.phases["train"].sent > whole.phases["train"].sent
    assert cut.layout.told.startswith("tp 2, pp 2 x virtual 2, ") and "teacher" not in cut.layout.told


def test_context_parallelism_and_wider_teachers_are_among_the_layouts_that_are_tried():
    question = scaling_question()
    tried = list(plan.layouts(question, 8))
    assert {layout.cp for layout in tried} == {1, 2, 4, 8} and {layout.teacher_tp for layout in tried} == {None, 2, 4, 8}
    assert {layout.chunks for layout in tried} == {1, 2}, "28 layers fill no eight chunks"
    assert all(layout.world == 8 and layout.tp * layout.cp <= 8 for layout in tried)
    best = plan.choose(question, 8)
    narrow = [plan.answer(question, layout) for layout in tried if layout.teacher_tp is None]
    assert best.seconds < min(one.seconds for one in narrow if one.fits), "here a wider teacher leaves the servers more room"


@pytest.mark.parametrize("flag", ["--turns=0", "--turns=-1", "--response-tokens=inf", "--memory-gib=nan", "--memory-gib=-5"])
def test_a_number_that_nobody_plans_with_is_refused_by_its_flag(flag, capsys):
    with pytest.raises(SystemExit):
        scaling_question(flag)
    assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--virtual-pipeline-model-parallel-size", "2"], "virtual_pipeline_model_parallel_size 2 needs at least 2 chunks"),
        (["--sequence-parallel"], "sequence_parallel cuts tokens over the tensor-parallel ranks"),
        (["--recompute-num-layers", "99"], "recompute_num_layers 99"),
        (["--expert-model-parallel-size", "2"], "expert_model_parallel_size 2 shares out experts"),
        (["--teacher-expert-model-parallel-size", "2"], "shares out experts and the teacher has none"),
    ],
)
def test_the_plan_prices_no_layout_that_training_refuses(flags, message):
    options, _ = plan.parse([str(ROOT / "examples/scaling/run.toml"), "--gpus", "8"])
    config = plan.load_config(["--config", options.config, *model_flags(), *flags])
    told = plan.configured(config, plan.question_of(config, options)[0], 8)
    assert isinstance(told, str) and message in told


def test_nothing_fits_where_nothing_can():
    assert plan.choose(scaling_question("--memory-gib", "4"), 8) is None


def test_more_ranks_never_make_a_step_slower_and_memory_never_grows():
    question = scaling_question()
    answers = [plan.choose(question, gpus) for gpus in (16, 64, 256, 1024)]
    seconds = [one.seconds for one in answers]
    assert seconds == sorted(seconds, reverse=True)
    bounds = [question.workload.tokens / one.seconds for one in answers]
    assert all(later < 4.1 * earlier for earlier, later in zip(bounds, bounds[1:], strict=False)), "no faster than linear"


def test_the_table_of_the_documentation_is_what_the_model_says():
    page = (ROOT / "docs" / "scaling.md").read_text()
    counts = (8, 16, 32, 64, 128, 256, 512, 1024)
    for line in plan.table(scaling_question(), counts):
        assert line in page, "run the command that docs/scaling.md names and paste its table"


def test_the_plan_takes_the_work_from_the_run_once_it_has_made_steps(single_process, run_flags, tmp_path, capsys):
    from megatron_tcod.train import main

    assert main([*run_flags, "--train-iters", "2", "--no-eval-at-end"]) == 0
    assert plan.main([str(tmp_path / "run" / "config.toml"), "--gpus", "1", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(one["tokens/packed"] for one in records) / sum(one["rollout/episodes"] for one in records)
    assert f"3 episodes of 5.0 turns and {tokens:.0f} tokens" in told and "from the run's metrics.jsonl" in told
    assert "a model, not a measurement" in told and ": fits" in told


def test_a_plan_without_a_number_of_ranks_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--gpus none: expected a number of ranks"):
        plan.main([str(ROOT / "examples/scaling/run.toml"), "--gpus", "none"])


def test_a_shorter_network_or_a_slower_device_costs_time():
    question = scaling_question()
    layout = Layout(tp=8, pp=2, dp=4)
    fast = plan.answer(question, layout)
    slow = DEVICES["a100"]
    phases = cost_model.step_phases(
        question.student, question.teacher, layout, question.numerics, question.workload, fast.serving, slow
    )
    for name, phase in fast.phases.items():
        assert phases[name].seconds > phase.seconds and phases[name].flops == phase.flops
