"""What `bench_divergence.py` compares with: the ways in which a divergence of two logits is computed elsewhere.

    step = logits_peers("cpu")["eager"]()              # step(student, teacher, kind), or why it cannot run
    step = hidden_peers("cuda", "jsd")["compile"]()    # step(student_hidden, student_head, teacher_hidden, teacher_head)

A step of the logits path returns the loss [T] and the gradient of its sum [T, V]; one of the hidden path makes the mean
over rows and returns the gradients of the student's hidden states and head. Beta of `jsd` is 1/2 throughout.

    eager          upcast, log_softmax, the definition, autograd
    compile        the same definition under torch.compile, static shapes
    megatron-ce    Megatron's vocab-parallel cross entropy: one model only, so what a divergence cannot beat by much
    naive-triton   one program a row that reduces every block before it takes the next
    liger-fused, liger-chunked      Liger's fused_linear_jsd and its chunked JSD loss, on a device

Not here: this project's own ways, timing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

LogitsStep = Callable[[torch.Tensor, torch.Tensor, str], tuple[torch.Tensor, torch.Tensor]]
HiddenStep = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def logits_peers(device: str) -> dict[str, Callable[[], LogitsStep | str]]:
    return {
        "eager": lambda: functools.partial(_logits_step, row_loss),
        "compile": lambda: functools.partial(_logits_step, _compiled(row_loss)),
        "megatron-ce": _megatron_cross_entropy,
        "naive-triton": lambda: _naive_triton() if device == "cuda" else "it needs a CUDA device",
    }


def hidden_peers(device: str, kind: str) -> dict[str, Callable[[], HiddenStep | str]]:
    return {
        "eager": lambda: functools.partial(_hidden_step, _mean_loss, kind),
        "compile": lambda: functools.partial(_hidden_step, _compiled(_mean_loss), kind),
        "liger-fused": lambda: _liger_obstacle(device, kind) or _liger_fused(kind),
        "liger-chunked": lambda: _liger_obstacle(device, kind) or _liger_chunked(kind),
    }


def leave_world() -> None:
    """End the process group that Megatron's loss needs."""
    if torch.distributed.is_initialized():
        from megatron_tcod.model import parallel

        parallel.shutdown()


def row_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Logits [T, V] -> [T], in fp32, as one writes it."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)  # [T, V] each
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    p, q = log_p.exp(), log_q.exp()  # [T, V] each
    log_m = (0.5 * (p + q)).log()  # [T, V]
    return 0.5 * ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1))


def _logits_step(
    loss_of: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    student = student.detach().requires_grad_()
    loss = loss_of(student, teacher, kind)  # [T]
    loss.sum().backward()
    return loss.detach(), student.grad


def _compiled(loss_of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """With static shapes, and with those of former rows forgotten, which would turn them into dynamic ones."""
    torch._dynamo.reset()
    return torch.compile(loss_of, dynamic=False)


def _mean_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    return row_loss(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, kind).mean()


def _hidden_step(
    mean_loss: Callable[..., torch.Tensor],
    kind: str,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, head = student_hidden.detach().requires_grad_(), student_head.detach().requires_grad_()
    mean_loss(hidden, head, teacher_hidden, teacher_head, kind).backward()
    return hidden.grad, head.grad


def _megatron_cross_entropy() -> LogitsStep | str:
    if importlib.util.find_spec("megatron.core") is None:
        return "megatron-core is not installed"
    from megatron_tcod.model import parallel

    if not torch.distributed.is_initialized():
        parallel.initialize(parallel.ParallelLayout())
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    def step(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        student = student.detach().requires_grad_()
        targets = torch.arange(len(student), device=student.device) % student.shape[1]  # [T]
        loss = vocab_parallel_cross_entropy(student[:, None], targets[:, None])[:, 0]  # [T]
        loss.sum().backward()
        return loss.detach(), student.grad

    return step


def _liger_obstacle(device: str, kind: str) -> str:
    if kind != "jsd":
        return "it has no reverse KL of this form"
    if device != "cuda":
        return "its kernels need a CUDA device"
    return "" if importlib.util.find_spec("liger_kernel") else "liger_kernel is not installed"


def _liger_fused(kind: str) -> HiddenStep:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.5)
    return functools.partial(_hidden_step, lambda *models: loss(*models[:4], None), kind)


def _liger_chunked(kind: str) -> HiddenStep:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)

    def mean_loss(*models: torch.Tensor | str) -> torch.Tensor:
        targets = torch.zeros(len(models[0]), dtype=torch.int64, device=models[0].device)  # [T] of the unused hard loss
        return loss(*models[:4], targets, None, None)

    return functools.partial(_hidden_step, mean_loss, kind)


def _naive_triton() -> LogitsStep | str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton
    import triton.language as tl

    @triton.jit
    def reverse_kl_kernel(student, teacher, loss, stride, columns, block: tl.constexpr):
        """Running maximum, total and gap are scalars, so each block ends in five reductions and their barriers."""
        row = tl.program_id(0).to(tl.int64)
        student += row * stride
        teacher += row * stride
        max_s = -float("inf")
        max_t = -float("inf")
        total_s = 0.0
        total_t = 0.0
        gap = 0.0  # sum of e^(s - max_s) (s - t)
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            is_real = at < columns
            s = tl.load(student + at, mask=is_real, other=-float("inf")).to(tl.float32)
            t = tl.load(teacher + at, mask=is_real, other=-float("inf")).to(tl.float32)
            new_s = tl.maximum(max_s, tl.max(s, 0))
            new_t = tl.maximum(max_t, tl.max(t, 0))
            weight = tl.exp(s - new_s)
            gap = gap * tl.exp(max_s - new_s) + tl.sum(tl.where(is_real, weight * (s - t), 0.0), 0)
            total_s = total_s * tl.exp(max_s - new_s) + tl.sum(weight, 0)
            total_t = total_t * tl.exp(max_t - new_t) + tl.sum(tl.exp(t - new_t), 0)
            max_s = new_s
            max_t = new_t
        lse_s = max_s + tl.log(total_s)
        lse_t = max_t + tl.log(total_t)
        kl = gap / total_s - lse_s + lse_t
        tl.store(loss + row, kl)
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            is_real = at < columns
            s = tl.load(student + at, mask=is_real, other=0.0).to(tl.float32) - lse_s
            t = tl.load(teacher + at, mask=is_real, other=0.0).to(tl.float32) - lse_t
            tl.store(student + at, (tl.exp(s) * (s - t - kl)).to(student.dtype.element_ty), mask=is_real)

    def step(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert kind == "reverse_kl", kind
        loss = torch.empty(len(student), device=student.device)  # [T]
        reverse_kl_kernel[(len(student),)](
            student, teacher, loss, student.stride(0), student.shape[1], block=4096, num_warps=8
        )
        return loss, student

    return step
