"""What is found of Transformer Engine and Apex, told right, and never by mistake. The libraries themselves are stand-ins:
modules of their names with nothing in them, which show the detection and not that anything accelerates."""

import importlib.util
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from megatron_tcod.model import accelerators
from megatron_tcod.model.accelerators import Found, Library

PROBE = """
import importlib, importlib.util, sys
# The file alone, without the package around it: Megatron would import the stand-ins too.
spec = importlib.util.spec_from_file_location("accelerators", sys.argv[1])
accelerators = sys.modules["accelerators"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(accelerators)
stand_ins = ("apex", "transformer_engine", accelerators.WGRAD_KERNEL)
for directory in sys.argv[2:]:
    for name in [name for name in sys.modules if name.split(".")[0] in stand_ins]:
        del sys.modules[name]
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    for library in (accelerators.find_transformer_engine(), accelerators.find_apex(), accelerators.find_wgrad_kernel()):
        print(library.name, library.is_usable, library.told, sep="|")
    sys.path.remove(directory)
"""
STAND_INS = {
    "nothing": {},
    "the index's apex": {"apex/__init__.py": "raise SystemExit('code of another project has run')"},
    "apex without kernels": {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": ""},
    "apex": {
        "apex/__init__.py": "",
        "apex/multi_tensor_apply/__init__.py": "",
        "apex/optimizers/__init__.py": "",
        "amp_C.py": "",
        "fused_weight_gradient_mlp_cuda.py": "",
    },
    "broken transformer engine": {
        "transformer_engine/__init__.py": "",
        "transformer_engine/pytorch/__init__.py": "raise OSError('libcudart.so.13: cannot open shared object file\\nmore')",
    },
    "transformer engine": {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": ""},
}
EXPECTED = {
    "nothing": ["False|not installed; on a GPU host", "False|not installed; it is built from", "False|not installed; it"],
    "the index's apex": ["False|not", "False|the Python index's apex, another project; pip uninstall", "False|not"],
    "apex without kernels": ["False|not", "False|NVIDIA's without its kernels (no amp_C)", "False|not"],
    "apex": ["False|not", "True|", "True|found"],
    "broken transformer engine": ["False|installed, but its PyTorch part does not import: OSError:", "False|", "False|"],
    "transformer engine": ["True|", "False|", "False|"],
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What a fresh interpreter finds with each set of stand-ins first on its path."""
    if any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")):
        pytest.skip("the libraries are installed here: stand-ins would not be alone")
    root = tmp_path_factory.mktemp("stand-ins")
    for name, files in STAND_INS.items():
        (root / name).mkdir()
        for path, text in files.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_text(text)
    command = [sys.executable, "-c", PROBE, accelerators.__file__, *(str(root / name) for name in STAND_INS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = iter(done.stdout.splitlines())
    return {name: [next(lines) for _ in range(3)] for name in STAND_INS}


@pytest.mark.parametrize("name", STAND_INS)
def test_each_library_is_told_from_what_is_not_it(reports, name):
    for line, expected in zip(reports[name], EXPECTED[name], strict=True):
        assert line.partition("|")[2].startswith(expected), line
        assert "\n" not in line


def found(*, engine=False, apex=False, kernel=False, cuda=True) -> Found:
    def library(name, is_usable):
        return Library(name=name, is_usable=is_usable, told="1.0" if is_usable else "not installed")

    return Found(
        transformer_engine=library("transformer_engine", engine),
        apex=library("apex", apex),
        wgrad_kernel=library("fused_weight_gradient_mlp_cuda", kernel),
        has_cuda=cuda,
    )


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_auto_takes_transformer_engine_only_with_a_device(engine, cuda):
    expected = "transformer_engine" if engine and cuda else "local"
    assert accelerators.choose("auto", found(engine=engine, cuda=cuda)) == expected
    assert accelerators.choose("local", found(engine=engine, cuda=cuda)) == "local"


def test_asking_for_what_is_not_there_is_one_message_with_the_fix():
    with pytest.raises(ValueError, match="transformer_engine: not installed; or set transformer_impl = local"):
        accelerators.choose("transformer_engine", found())
    with pytest.raises(ValueError, match="needs a CUDA device and torch sees none"):
        accelerators.choose("transformer_engine", found(engine=True, cuda=False))


def test_optimizer_and_accumulation_follow_what_megatron_can_import():
    assert [found(engine=True, apex=True).fused_adam, found(apex=True).fused_adam, found().fused_adam] == [
        "transformer_engine", "apex", "torch",
    ]  # fmt: skip
    assert accelerators.config_settings("local", found(kernel=True))["gradient_accumulation_fusion"]
    assert not accelerators.config_settings("local", found(kernel=True, cuda=False))["gradient_accumulation_fusion"]
    assert not accelerators.config_settings("transformer_engine", found(engine=True))["gradient_accumulation_fusion"]


def test_what_is_told_of_the_optimizer_is_what_megatron_took():
    import megatron.core.optimizer as megatron_optimizer

    assert megatron_optimizer.Adam.__module__.split(".")[0] == accelerators.find().fused_adam


def test_layers_of_either_implementation(monkeypatch):
    """Local stays what it was; Transformer Engine's modules take the places that have parameters."""
    before, after = (get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm") for _ in range(2))
    accelerators.fit_layer(after, "local")
    assert after == before
    names = SimpleNamespace(TENorm="norm", TEColumnParallelLinear="column", TERowParallelLinear="row")
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", names)
    accelerators.fit_layer(after, "transformer_engine")
    parts = after.submodules
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    assert (parts.input_layernorm, parts.pre_mlp_layernorm) == ("norm", "norm")
    assert (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2) == ("column", "row") * 2
    assert attention.core_attention is before.submodules.self_attention.submodules.core_attention


def test_the_choice_is_logged_once_with_the_reasons(caplog):
    accelerators._told.clear()
    with caplog.at_level(logging.INFO, logger="megatron_tcod"):
        for _ in range(2):
            accelerators.log_choice("local", found(apex=True))
    (line,) = caplog.messages
    assert line.startswith("layers: local; optimizer: Adam of apex; gradients added up after the product")
    assert "transformer_engine: not installed" in line


def test_doctor_explains_each():
    told = accelerators.describe(found(engine=True))
    assert [name for name, *_ in told] == ["transformer_engine", "apex", "fused_weight_gradient_mlp_cuda", "optimizer"]
    assert told[0][2] == "transformer_impl = auto takes it for the layers"
    assert "not used: no CUDA device" in accelerators.describe(found(engine=True, cuda=False))[0]
