"""The native build under its settings, with compilers that fail; what it leaves behind and what it says."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the build reads, with CPU kernels that compile in a moment and one CUDA source."""
    tree = tmp_path / "tree"
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "cuda").mkdir()
    (tree / "megatron_tcod").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "megatron_tcod/__init__.py"):
        shutil.copy(ROOT / name, tree / name)
    module = (
        '#include <Python.h>\nstatic PyModuleDef def = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0, 0, 0, 0, 0};\n'
        'extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&def); }\n'
    )
    (tree / "csrc" / "bind_cpu.cpp").write_text(module)
    (tree / "csrc" / "bind_cuda.cpp").write_text("")
    (tree / "csrc" / "cuda" / "kernel.cu").write_text("")
    return tree


def _build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    cleared = {name: value for name, value in os.environ.items() if name not in ("TCOD_CUDA", "CUDA_HOME", "CXX", "CC")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=cleared | environment, capture_output=True, text=True, timeout=300)


def _info(tree: Path) -> dict:
    return json.loads((tree / "megatron_tcod" / "_build_info.json").read_text())


def _fake_nvcc(directory: Path, *, compile: str = "exit 0", archs: str = "sm_75 sm_80 sm_90") -> str:
    """A CUDA_HOME whose nvcc answers questions as a real one does and compiles by `compile`."""
    script = directory / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'  *--dryrun*) echo "#$ TOP={directory}" >&2 ;;\n'
        f"  *--list-gpu-code*) echo '{archs}' | tr ' ' '\\n' ;;\n"
        "  *--version*) echo 'Cuda compilation tools, release 12.4, V12.4.1' ;;\n"
        f"  *) {compile} ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return str(directory)


TOUCH_OUTPUT = 'while [ "$1" != -o ]; do shift; done; echo > "$2"'


def _has_working_module(tree: Path) -> bool:
    (module,) = (tree / "megatron_tcod").glob("_C.*")
    return _import(module, "m").returncode == 0


def _import(module: Path, expression: str) -> subprocess.CompletedProcess:
    """What `expression` says of the compiled module m, in an interpreter of its own."""
    code = (
        f"import importlib.util as util; spec = util.spec_from_file_location('_C', {str(module)!r}); "
        f"m = util.module_from_spec(spec); spec.loader.exec_module(m); print({expression})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_unknown_setting_is_refused(tree: Path):
    run = _build(tree, TCOD_CUDA="bogus")
    assert run.returncode != 0 and "error: TCOD_CUDA must be auto, 0 or 1, got 'bogus'" in run.stderr


def test_without_cuda_the_cpu_module_is_built_and_the_reason_recorded(tree: Path):
    run = _build(tree, TCOD_CUDA="0")
    assert run.returncode == 0, run.stderr
    info = _info(tree)
    assert _has_working_module(tree) and info["_C"]["built"] and not info["_C_cuda"]["built"]
    assert info["_C_cuda"]["reason"] == "TCOD_CUDA=0"


@pytest.mark.parametrize(
    "compile, reason",
    [
        ("echo 'kernel.cu(1): error: no such thing' >&2; exit 2", "exited with 2: kernel.cu(1): error: no such thing"),
        (
            f"case \"$*\" in *-shared*) echo 'ld: error: cannot find -lcudart_static' >&2; exit 1;; *) {TOUCH_OUTPUT};; esac",
            "exited with 1: ld: error: cannot find -lcudart_static",
        ),
        ("exit 3", "exited with 3: it said nothing"),
    ],
    ids=["compile", "link", "silent"],
)
def test_broken_toolkit_leaves_a_working_install_unless_cuda_was_demanded(tree: Path, compile: str, reason: str):
    home = _fake_nvcc(tree.parent / "cuda", compile=compile)
    stale = tree / "megatron_tcod" / f"_C_cuda{_suffix()}"
    stale.write_text("of an earlier build")
    run = _build(tree, CUDA_HOME=home)
    assert run.returncode == 0, run.stderr
    warnings = [line for line in run.stdout.splitlines() if line.startswith("warning: built without CUDA kernels")]
    assert len(warnings) == 1 and reason in warnings[0]
    assert _has_working_module(tree) and reason in _info(tree)["_C_cuda"]["reason"] and not stale.exists()
    demanded = _build(tree, CUDA_HOME=home, TCOD_CUDA="1")
    assert demanded.returncode != 0 and "TCOD_CUDA=1, but the CUDA kernels cannot be built" in demanded.stderr
    assert reason in demanded.stderr


def test_working_toolkit_compiles_for_the_architectures_it_knows(tree: Path):
    home = _fake_nvcc(tree.parent / "cuda", compile=f'echo "$*" >> {tree}/calls; {TOUCH_OUTPUT}')
    run = _build(tree, CUDA_HOME=home)
    assert run.returncode == 0, run.stderr
    expected = {"built": True, "reason": None, "archs": ["sm_80", "sm_90", "compute_90"], "toolkit": "12.4"}
    assert _info(tree)["_C_cuda"] == expected
    assert (tree / "megatron_tcod" / f"_C_cuda{_suffix()}").exists()
    bind, kernel, link = sorted(
        (tree / "calls").read_text().splitlines(), key=lambda call: ("-shared" in call, ".cu " in call)
    )
    assert "arch=compute_80,code=sm_80" in kernel and "arch=compute_90,code=compute_90" in kernel and "gencode" not in bind
    assert "-cudart=static" in link


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"CUDA_HOME": "/nowhere"}, "no nvcc in CUDA_HOME=/nowhere"),
        ({"PATH": "{path without nvcc}"}, "no nvcc on PATH, and CUDA_HOME is not set"),
    ],
)
def test_missing_toolkit_is_the_reason(tree: Path, environment: dict, reason: str):
    path = [place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place) / "nvcc").exists()]
    if shutil.which("g++", path=os.pathsep.join(path)) is None:
        pytest.skip("the compiler lies beside nvcc")
    run = _build(tree, **environment | ({"PATH": os.pathsep.join(path)} if "PATH" in environment else {}))
    assert run.returncode == 0 and _info(tree)["_C_cuda"]["reason"] == reason


def test_kernels_for_no_architecture_are_not_built(tree: Path):
    run = _build(tree, CUDA_HOME=_fake_nvcc(tree.parent / "cuda", archs="sm_50 sm_52"))
    assert run.returncode == 0 and "compiles for none of sm_80, sm_90, sm_100" in _info(tree)["_C_cuda"]["reason"]


def test_missing_compiler_is_named_with_the_way_to_get_one(tree: Path):
    run = _build(tree, TCOD_CUDA="0", CXX="/nowhere/g++", CC="/nowhere/gcc")
    assert run.returncode != 0
    for part in ("needs a C++17 compiler", "/nowhere/g++", "apt-get install g++", "or set CXX to one"):
        assert part in run.stderr


@pytest.mark.slow
def test_sdist_builds_a_wheel_with_the_kernels_and_nothing_of_a_build(tmp_path):
    """Without isolation, so that no index is asked."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "tests", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    script = "import setuptools.build_meta as backend, sys; getattr(backend, 'build_' + sys.argv[1])('out')"
    subprocess.run([sys.executable, "-c", script, "sdist"], cwd=source, check=True, capture_output=True)
    (archive,) = (source / "out").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    contents = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    assert {"csrc/include/divergence_api.h", "csrc/cpu/rows.inc", "csrc/bind_cpu.cpp"} <= contents
    assert not [name for name in contents if name.endswith((".so", "_build_info.json"))]
    environment = os.environ | {"TCOD_CUDA": "0"}
    subprocess.run([sys.executable, "-c", script, "wheel"], cwd=unpacked, check=True, capture_output=True, env=environment)
    (wheel,) = (unpacked / "out").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "wheel", format="zip")
    assert (tmp_path / "wheel" / "megatron_tcod" / "_build_info.json").exists()
    (module,) = (tmp_path / "wheel" / "megatron_tcod").glob("_C.*")
    assert "portable" in _import(module, "m.isas()").stdout


def _suffix() -> str:
    return sysconfig.get_config_var("EXT_SUFFIX")
