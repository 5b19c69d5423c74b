import importlib
import subprocess
import sys

import megatron.core
import pytest
import torch

from megatron_tcod.model import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is nothing to retarget")


def test_another_megatron_core_is_refused_with_the_version_found_the_one_expected_and_the_fix():
    cpu.check_version(megatron.core.__version__)
    expected = r"megatron-core 0\.15\.3 .*tested with 0\.16\.1; .*pip install megatron-core==0\.16\.1"
    with pytest.raises(ValueError, match=expected):
        cpu.check_version("0.15.3")


def test_install_leaves_torch_itself_alone_and_may_be_repeated():
    before = {name: getattr(torch, name) for name in ("empty", "zeros", "ones", "tensor")}
    current_device = torch.cuda.current_device
    assert cpu.install() and cpu.install()
    assert before == {name: getattr(torch, name) for name in before}
    assert torch.cuda.current_device is current_device
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_every_listed_module_sees_the_cpu_and_no_other_module_does():
    cpu.install()
    for site in cpu.SITES:
        module = importlib.import_module(f"megatron.core.{site}")
        assert module.torch.zeros(2, device="cuda").device.type == "cpu"
        assert module.torch.empty(2, device=module.torch.cuda.current_device()).device.type == "cpu"
        assert module.torch.nn is torch.nn
    retargeted = {
        name.removeprefix("megatron.core.")
        for name, module in sys.modules.items()
        if name.startswith("megatron.core.") and getattr(getattr(module, "torch", None), "cuda", torch.cuda) is not torch.cuda
    }
    assert retargeted == set(cpu.SITES)


def test_tensor_methods_are_restored_even_after_an_error():
    cuda, type_name = torch.Tensor.cuda, torch.Tensor.type
    tensor = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(KeyError), cpu.tensor_cuda_is_identity(), cpu.tensor_type_names_cuda():
        assert tensor.cuda() is tensor
        assert tensor.type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float32).dtype is torch.float32
        raise KeyError
    assert (torch.Tensor.cuda, torch.Tensor.type) == (cuda, type_name)


def test_with_cuda_available_nothing_is_touched():
    code = """
import importlib, torch
torch.cuda.is_available = lambda: True
from megatron_tcod.model import cpu
method = torch.Tensor.cuda
assert cpu.install() is False
with cpu.tensor_cuda_is_identity(), cpu.tensor_type_names_cuda():
    assert torch.Tensor.cuda is method and torch.ones(1).type() == "torch.FloatTensor"
for site in cpu.SITES:
    assert importlib.import_module(f"megatron.core.{site}").torch is torch, site
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
