"""The op over vocabulary shards: four gloo processes, started once, against the unsharded float64 reference.

The processes play every case at tp 4 and, as two groups, at tp 2, and leave what they got in files; tests read those.
"""

import contextlib
import functools
import json
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from megatron_tcod.ops import reference
from megatron_tcod.ops.divergence import KINDS, align_head, linear_divergence, linear_logprob

STATISTICS = (
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
    "top1_agreement",
)


@dataclass(frozen=True)
class Case:
    kind: str
    rows: int = 13
    vocab: int = 507
    padded: int = 512
    dtype: torch.dtype = torch.float64
    beta: float = 0.5
    temperatures: tuple[float, float] = (1.0, 1.0)
    scale: float = 1.0
    """Multiplies the student's hidden states."""
    edit: str = ""
    mode: str = "rows"
    """`total` gives the weights to the op, `rows` puts them on the row losses."""

    def operands(self) -> dict[str, torch.Tensor]:
        """Whole, unsharded; the same on each rank."""
        generator = torch.Generator().manual_seed(self.rows * 7919 + self.vocab)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        operands = {
            "student_hidden": self.scale * draw(self.rows, 24),
            "student_head": draw(self.padded, 24) / 3,
            "teacher_hidden": draw(self.rows, 40),
            "teacher_head": draw(self.padded, 40) / 3,
        }
        for side in ("student", "teacher"):
            operands[f"{side}_head"][self.vocab :] = torch.nan  # whoever reads padding shows it
        if self.edit == "nan_row":
            operands["student_hidden"][1, 3] = torch.nan
        if self.edit.endswith("minus_inf_shard"):
            sides = ("student",) if self.edit.startswith("student") else ("student", "teacher")
            for side in sides:
                operands[f"{side}_hidden"][:, 0] = 1
                operands[f"{side}_head"][self.padded // 4 : self.padded // 2, 0] = -torch.inf
        operands = {name: tensor.to(self.dtype) for name, tensor in operands.items()}
        target_ids = torch.randint(self.vocab // 4, (self.rows,), generator=generator) + self.vocab // 2
        return operands | {"target_ids": target_ids}

    def weight(self) -> torch.Tensor:
        return torch.linspace(0.3, 1.0, self.rows, dtype=self.dtype)


CASES = {
    **{f"{kind}-odd": Case(kind) for kind in KINDS},
    **{f"{kind}-fp32": Case(kind, dtype=torch.float32) for kind in KINDS},
    **{f"{kind}-large": Case(kind, rows=5, vocab=32000, padded=32256) for kind in KINDS},
    **{f"{kind}-qwen": Case(kind, rows=3, vocab=151_669, padded=151_936, dtype=torch.float32) for kind in KINDS},
    **{f"{kind}-one-row": Case(kind, rows=1) for kind in KINDS},
    **{f"{kind}-no-rows": Case(kind, rows=0) for kind in KINDS},
    **{f"{kind}-pad-only": Case(kind, padded=2048) for kind in KINDS},
    **{f"{kind}-tau": Case(kind, temperatures=(0.5, 2.0)) for kind in KINDS},
    **{f"{kind}-huge": Case(kind, scale=1e4) for kind in KINDS},
    "jsd-beta-0.1": Case("jsd", beta=0.1),
    "jsd-beta-0.9": Case("jsd", beta=0.9, temperatures=(2.0, 1.0)),
}
CASES |= {f"{name}-total": replace(case, mode="total") for name, case in CASES.items() if case.vocab < 32000}
"""Cases with a finite reference, at which value and gradient are compared."""

SURFACING = {
    "nan": Case("reverse_kl", edit="nan_row"),
    "nan-jsd": Case("jsd", edit="nan_row"),
    **{f"{kind}-absent": Case(kind, edit="minus_inf_shard") for kind in KINDS},
    "absent-in-student": Case("reverse_kl", edit="student_minus_inf_shard"),
}

CHUNK_SIZE = 4
"""Rows; 13 rows are four chunks."""

ALIGNMENTS = {"grow": (507, 512, 640), "shrink": (507, 640, 512), "gather": (100, 104, 512), "spread": (100, 512, 100)}
"""vocab_size, padded size before, padded size after."""


COUNTED = [name for name in CASES if name.removesuffix("-total").endswith(("-odd", "-no-rows"))]
"""Cases whose collectives are counted, which takes longer than to play them."""


@contextlib.contextmanager
def _collectives(is_counted: bool) -> Iterator[list[str]]:
    """The collectives of torch.distributed in the body, in order."""
    names: list[str] = []
    if not is_counted:
        yield names
        return
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield names
    names += [event.name.removeprefix("c10d::") for event in recorded.events() if event.name.startswith("c10d::")]


def _shard(head: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    return head if group is None else head.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


def _play(
    case: Case, group: dist.ProcessGroup | None, *, is_counted: bool = False
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    operands = case.operands()
    hidden = operands["student_hidden"].requires_grad_()
    head = _shard(operands["student_head"], group).requires_grad_()
    with _collectives(is_counted) as forward:
        out = linear_divergence(
            hidden,
            head,
            operands["teacher_hidden"],
            _shard(operands["teacher_head"], group),
            kind=case.kind,
            beta=case.beta,
            vocab_size=case.vocab,
            student_temperature=case.temperatures[0],
            teacher_temperature=case.temperatures[1],
            target_ids=operands["target_ids"],
            tp_group=group,
            chunk_size=CHUNK_SIZE,
            loss_weight=case.weight() if case.mode == "total" else None,
        )
    with _collectives(is_counted) as backward:
        ((out.loss * case.weight()).sum() if out.total is None else out.total).backward()
    tensors = {name: getattr(out, name).detach().clone() for name in ("loss", *STATISTICS)}
    return tensors | {"hidden_grad": hidden.grad, "head_grad": head.grad}, forward, backward


def _play_logprob(case: Case, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    operands = case.operands()
    hidden = operands["student_hidden"].requires_grad_()
    head = _shard(operands["student_head"], group).requires_grad_()
    read = linear_logprob(hidden, head, operands["target_ids"], vocab_size=case.vocab, tp_group=group, chunk_size=4)
    (read.logprob * case.weight()).sum().backward()
    return {
        "logprob": read.logprob.detach(),
        "entropy": read.entropy,
        "hidden_grad": hidden.grad,
        "head_grad": head.grad,
    }


def _align(vocab: int, before: int, after: int, group: dist.ProcessGroup) -> torch.Tensor:
    head = torch.arange(before * 3, dtype=torch.float32).view(before, 3).bfloat16()
    return align_head(_shard(head, group), vocab, after, group)


def _refusal(group: dist.ProcessGroup) -> str:
    """What a rank is told about shards of unequal size."""
    operands = Case("reverse_kl").operands()
    heads = _shard(operands["student_head"], group), _shard(torch.zeros(576, 40, dtype=torch.float64), group)
    try:
        linear_divergence(
            operands["student_hidden"],
            heads[0],
            operands["teacher_hidden"],
            heads[1],
            kind="reverse_kl",
            vocab_size=507,
            tp_group=group,
        )
    except ValueError as error:
        return str(error)
    return ""


def _unequal_pads(group: dist.ProcessGroup) -> torch.Tensor:
    """Loss with the teacher padded to 576 and aligned to the student's 512."""
    operands = Case("reverse_kl").operands()
    teacher_head = torch.cat([operands["teacher_head"], torch.full((64, 40), torch.nan, dtype=torch.float64)])
    aligned = align_head(_shard(teacher_head, group), 507, 512, group)
    return linear_divergence(
        operands["student_hidden"],
        _shard(operands["student_head"], group),
        operands["teacher_hidden"],
        aligned,
        kind="reverse_kl",
        vocab_size=507,
        tp_group=group,
    ).loss


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for tp_size, group in ((2, pairs[rank // 2]), (4, dist.group.WORLD)):
        tensors, notes = {}, {}
        for name, case in (CASES | SURFACING).items():
            values, *notes[name] = _play(case, group, is_counted=name in COUNTED)
            tensors |= {f"{name}/{key}": value for key, value in values.items()}
        tensors |= {f"logprob/{key}": value for key, value in _play_logprob(CASES["nll-odd"], group).items()}
        tensors |= {f"align/{name}": _align(*sizes, group) for name, sizes in ALIGNMENTS.items()}
        tensors["unequal/loss"] = _unequal_pads(group)
        notes["refusal"] = _refusal(group)
        save_file({key: value.contiguous() for key, value in tensors.items()}, f"{folder}/{tp_size}-{rank}.safetensors")
        Path(f"{folder}/{tp_size}-{rank}.json").write_text(json.dumps(notes))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> dict[int, tuple[list[dict[str, torch.Tensor]], list[dict]]]:
    """tp size -> tensors by rank, notes by rank; at tp 2 the ranks of the first pair."""
    folder = tmp_path_factory.mktemp("gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, str(folder)), nprocs=4)
    return {
        size: (
            [load_file(folder / f"{size}-{rank}.safetensors") for rank in range(size)],
            [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)],
        )
        for size in (2, 4)
    }


@functools.cache
def _truth(case: Case) -> dict[str, torch.Tensor]:
    operands = {name: x.double() if x.is_floating_point() else x for name, x in case.operands().items()}
    hidden = operands["student_hidden"].clone().requires_grad_()
    head = operands["student_head"][: case.vocab].clone().requires_grad_()
    student, teacher = hidden @ head.T, operands["teacher_hidden"] @ operands["teacher_head"][: case.vocab].T
    tau_s, tau_t = case.temperatures
    both = {"student_temperature": tau_s, "teacher_temperature": tau_t}
    truth = {
        "reverse_kl": reference.reverse_kl(student, teacher, **both),
        "forward_kl": reference.forward_kl(student, teacher, **both),
        "student_entropy": reference.entropy(student, temperature=tau_s),
        "teacher_entropy": reference.entropy(teacher, temperature=tau_t),
        "student_logprob": reference.logprob(student, operands["target_ids"], temperature=tau_s),
        "teacher_logprob": reference.logprob(teacher, operands["target_ids"], temperature=tau_t),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    jsd = reference.jsd(student, teacher, beta=case.beta, **both) if case.kind == "jsd" else None
    truth["loss"] = {"jsd": jsd, "nll": -truth["student_logprob"]}.get(case.kind, truth.get(case.kind))
    (truth["loss"] * case.weight().double()).sum().backward()
    truth["hidden_grad"] = hidden.grad
    truth["head_grad"] = torch.cat([head.grad, head.grad.new_zeros(case.padded - case.vocab, 24)])
    return {name: tensor.detach() for name, tensor in truth.items()}


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_unsharded_value_and_gradient(played, tp_size: int, name: str):
    case, (ranks, _) = CASES[name], played[tp_size]
    truth = _truth(case)
    tolerance = 1e-10 if case.dtype == torch.float64 else 3e-6
    for key in ("loss", *STATISTICS, "hidden_grad"):
        torch.testing.assert_close(
            ranks[0][f"{name}/{key}"].double(),
            truth[key],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, k=key: f"{k}: {m}",
        )
    head_grad = torch.cat([rank[f"{name}/head_grad"] for rank in ranks]).double()
    torch.testing.assert_close(head_grad, truth["head_grad"], rtol=tolerance, atol=tolerance * max(case.scale, 1))
    assert torch.equal(head_grad[case.vocab :], torch.zeros(case.padded - case.vocab, 24, dtype=torch.float64))


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_gradient_is_not_scaled_by_the_group_size(played, tp_size: int, name: str):
    ranks, (truth, _, _) = played[tp_size][0], _play(CASES[name], None)
    head_grad = torch.cat([rank[f"{name}/head_grad"] for rank in ranks])
    for grad, expected in ((ranks[0][f"{name}/hidden_grad"], truth["hidden_grad"]), (head_grad, truth["head_grad"])):
        ratio = (grad * expected).double().sum() / expected.double().square().sum()
        assert ratio.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_are_bit_identical(played, tp_size: int):
    ranks, _ = played[tp_size]
    for name in CASES | SURFACING:
        for key in ("loss", *STATISTICS, "hidden_grad"):
            first = ranks[0][f"{name}/{key}"]
            for rank in ranks[1:]:
                torch.testing.assert_close(rank[f"{name}/{key}"], first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_one_packed_gather_a_read_and_one_reduction_with_the_gradient(played, tp_size: int):
    for rank in played[tp_size][1]:
        for name, case in ((name, CASES[name]) for name in COUNTED):
            forward, backward = rank[name]
            gathers, reductions = forward.count("_allgather_base_"), [*forward, *backward].count("allreduce_")
            assert len(forward) + len(backward) == gathers + reductions
            num_chunks = math.ceil(case.rows / CHUNK_SIZE) if case.mode == "total" else min(case.rows, 1)
            assert gathers == num_chunks * (2 if case.kind == "jsd" else 1)
            assert reductions == min(case.rows, 1)
            assert case.mode == "rows" or not backward


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ["nan", "nan-jsd"])
def test_nan_surfaces_on_every_rank(played, tp_size: int, name: str):
    for rank in played[tp_size][0]:
        is_nan = torch.arange(13) == 1
        for key in ("loss", "reverse_kl", "forward_kl", "student_entropy", "student_logprob"):
            assert torch.equal(rank[f"{name}/{key}"].isnan(), is_nan), key
        assert torch.equal(rank[f"{name}/hidden_grad"].isnan().all(-1), is_nan)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shard_of_minus_infinity_counts_as_absent(played, tp_size: int, kind: str):
    """No gradient of the hidden states here: a zero times a head row of -inf has none, in the reference neither."""
    case, (ranks, _) = SURFACING[f"{kind}-absent"], played[tp_size]
    truth = _truth(case)
    for key in ("loss", *STATISTICS):
        torch.testing.assert_close(ranks[0][f"{kind}-absent/{key}"], truth[key], rtol=1e-10, atol=1e-10)
    head_grad = torch.cat([rank[f"{kind}-absent/head_grad"] for rank in ranks])
    torch.testing.assert_close(head_grad, truth["head_grad"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_shard_without_student_mass_makes_forward_kl_infinite(played, tp_size: int):
    case, (ranks, _) = SURFACING["absent-in-student"], played[tp_size]
    assert ranks[0]["absent-in-student/forward_kl"].tolist() == [math.inf] * 13
    torch.testing.assert_close(ranks[0]["absent-in-student/loss"], _truth(case)["loss"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_linear_logprob_over_shards_equals_the_reference(played, tp_size: int):
    ranks, truth = played[tp_size][0], _truth(CASES["nll-odd"])
    torch.testing.assert_close(ranks[-1]["logprob/logprob"], truth["student_logprob"], rtol=1e-12, atol=0)
    torch.testing.assert_close(ranks[-1]["logprob/entropy"], truth["student_entropy"], rtol=1e-12, atol=0)
    torch.testing.assert_close(ranks[-1]["logprob/hidden_grad"], -truth["hidden_grad"], rtol=1e-10, atol=1e-12)
    head_grad = torch.cat([rank["logprob/head_grad"] for rank in ranks])
    torch.testing.assert_close(head_grad, -truth["head_grad"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ALIGNMENTS)
def test_align_head_moves_each_token_to_its_new_owner(played, tp_size: int, name: str):
    vocab, before, after = ALIGNMENTS[name]
    whole = torch.cat([rank[f"align/{name}"] for rank in played[tp_size][0]])
    expected = torch.arange(before * 3, dtype=torch.float32).view(before, 3).bfloat16()[:vocab]
    assert torch.equal(whole[:vocab], expected)
    assert torch.equal(whole[vocab:], torch.zeros(after - vocab, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("tp_size", [2, 4])
def test_unequal_padding_is_refused_until_the_teacher_is_aligned(played, tp_size: int):
    ranks, notes = played[tp_size]
    for rank, note in enumerate(notes):
        assert f"rank {rank} of {tp_size} would compare different tokens" in note["refusal"]
        assert "align_head(teacher_head, vocab_size, 512, tp_group)" in note["refusal"]
    expected = _truth(CASES["reverse_kl-odd"])["loss"]
    torch.testing.assert_close(ranks[0]["unequal/loss"], expected, rtol=1e-12, atol=0)
