"""Package build: Python, `megatron_tcod._C` (C++, always) and `megatron_tcod._C_cuda` (where there is a CUDA toolkit).

    pip install .                      # or -e .
    TCOD_CUDA=0 pip install .          # no CUDA kernels;  1: fail rather than go without;  auto (default): as it comes

A C++17 compiler is needed. The toolkit is that of $CUDA_HOME/bin/nvcc, else of the nvcc on PATH. What was built, and why
something was not, goes to megatron_tcod/_build_info.json, which `python -m megatron_tcod.doctor` reads.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "megatron_tcod/__init__.py").read_text()).group(1)
PACKAGE = "megatron_tcod"
BUILD_INFO = "_build_info.json"

CUDA_ARCHS = (80, 90, 100)
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
# Some versions of GCC find uninitialised values in their own headers of vector intrinsics.
QUIET_FLAGS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
NO_COMPILER = (
    "megatron_tcod needs a C++17 compiler to build its CPU kernels, and {compiler} did not compile a test file:\n{output}\n"
    "Install one (Debian, Ubuntu: apt-get install g++; Fedora, RHEL: dnf install gcc-c++; conda: conda install "
    "cxx-compiler) or set CXX to one, and install again."
)


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cuda_mode() -> str:
    mode = os.environ.get("TCOD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"error: TCOD_CUDA must be auto, 0 or 1, got {mode!r}")
    return mode


class CudaBuildFailed(Exception):
    """Its message is one line, for the log and for _build_info.json."""


class BuildNative(build_ext):
    """Builds both modules and records what came of it."""

    def run(self) -> None:
        self.info = {}
        self.package_directories = [pathlib.Path(self.build_lib) / PACKAGE]
        if self.inplace or getattr(self, "editable_mode", False):
            self.package_directories.append(ROOT / PACKAGE)
        super().run()
        text = json.dumps(self.info, indent=2) + "\n"
        for directory in self.package_directories:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / BUILD_INFO).write_text(text)

    def build_extension(self, extension: Extension) -> None:
        import pybind11

        extension.include_dirs += ["csrc", "csrc/include", pybind11.get_include()]
        if extension.name.endswith("_cuda"):
            self._build_cuda(extension)
        else:
            self._build_cpu(extension)

    def _build_cpu(self, extension: Extension) -> None:
        is_cxx, output = self._compiles("int main() { return __cplusplus < 201703L; }\n", [])
        if not is_cxx:
            raise SystemExit("error: " + NO_COMPILER.format(compiler=shlex.join(self._cxx()), output=output))
        has_openmp, _ = self._compiles("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n", ["-fopenmp"])
        if not has_openmp:
            print("warning: the compiler has no OpenMP; the CPU kernels will use one thread")
        openmp = ["-fopenmp"] if has_openmp else []
        extension.extra_compile_args = [*CXX_FLAGS, *QUIET_FLAGS, *openmp]
        extension.extra_link_args = openmp
        super().build_extension(extension)
        self.info["_C"] = {"built": True, "reason": None, "openmp": has_openmp, "compiler": self._cxx_version()}

    def _build_cuda(self, extension: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(extension.name)).absolute()
        try:
            self.info["_C_cuda"] = build_cuda(extension, target, pathlib.Path(self.build_temp).absolute())
        except CudaBuildFailed as failure:
            if cuda_mode() == "1":
                raise SystemExit(f"error: TCOD_CUDA=1, but the CUDA kernels cannot be built: {failure}") from None
            print(f"warning: built without CUDA kernels: {failure}")
            self.info["_C_cuda"] = {"built": False, "reason": str(failure), "archs": []}
            for directory in self.package_directories:  # one of an earlier build would not match the record
                (directory / target.name).unlink(missing_ok=True)

    def _cxx(self) -> list[str]:
        return list(getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)

    def _cxx_version(self) -> str:
        run = subprocess.run([self._cxx()[0], "--version"], capture_output=True, text=True)
        return run.stdout.split("\n")[0]

    def _compiles(self, source: str, flags: list[str]) -> tuple[bool, str]:
        """Whether a program compiles and links, and what the compiler said."""
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory) / "test.cpp"
            path.write_text(source)
            command = [*self._cxx(), "-std=c++17", *flags, str(path), "-o", str(path.with_suffix(""))]
            try:
                run = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                return False, str(error)
        return run.returncode == 0, run.stderr.strip()


def build_cuda(extension: Extension, target: pathlib.Path, temporary: pathlib.Path) -> dict:
    """Compiles and links with nvcc; the record for _build_info.json. Raises CudaBuildFailed."""
    if cuda_mode() == "0":
        raise CudaBuildFailed("TCOD_CUDA=0")
    if not any(source.endswith(".cu") for source in extension.sources):
        raise CudaBuildFailed("csrc/cuda holds no kernels")
    nvcc = find_nvcc()
    toolkit = toolkit_root(nvcc)
    archs = known_archs(nvcc)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    include = [f"-I{path}" for path in [*extension.include_dirs, sysconfig.get_path("include")]]
    shared = [nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0", *include]
    objects = []
    for source in extension.sources:
        objects.append(str(temporary / pathlib.Path(source).with_suffix(".o")))
        pathlib.Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
        run_nvcc([*shared, *(codes if source.endswith(".cu") else []), "-c", source, "-o", objects[-1]])
    libraries = [f"-L{path}" for path in (toolkit / "lib64", toolkit / "lib") if path.is_dir()]
    target.parent.mkdir(parents=True, exist_ok=True)
    run_nvcc([nvcc, "-shared", "-cudart=static", *libraries, *objects, "-o", str(target)])
    version = re.search(r"release ([\d.]+)", run_nvcc([nvcc, "--version"]).stdout)
    return {
        "built": True,
        "reason": None,
        "archs": [*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"],
        "toolkit": version.group(1) if version else "unknown",
    }


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH, and CUDA_HOME is not set"
        raise CudaBuildFailed(f"no nvcc {where}")
    return found


def toolkit_root(nvcc: str) -> pathlib.Path:
    """As nvcc itself sees it: the one on PATH may be a script that calls another."""
    output = run_nvcc([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]).stderr
    top = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    if top is None:
        raise CudaBuildFailed(f"{nvcc} --dryrun does not say where its toolkit is (no TOP=)")
    return pathlib.Path(top.group(1).strip()).resolve()


def known_archs(nvcc: str) -> list[int]:
    known = set(re.findall(r"sm_(\d+)\b", run_nvcc([nvcc, "--list-gpu-code"]).stdout))
    archs = [arch for arch in CUDA_ARCHS if str(arch) in known]
    if not archs:
        raise CudaBuildFailed(f"{nvcc} compiles for none of {', '.join(f'sm_{arch}' for arch in CUDA_ARCHS)}")
    return archs


def run_nvcc(command: list[str]) -> subprocess.CompletedProcess:
    print(shlex.join(command))
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        raise CudaBuildFailed(f"{command[0]}: {error.strerror}") from None
    if run.returncode:
        said = (run.stderr.strip() or run.stdout.strip() or "it said nothing").split("\n")
        print("\n".join(said))
        errors = [line for line in said if "error" in line.lower()]
        raise CudaBuildFailed(f"{command[0]} exited with {run.returncode}: {(errors or said)[0].strip()}")
    return run


EXTENSIONS = [
    Extension(
        f"{PACKAGE}._C",
        sources=files("csrc/bind_cpu.cpp", "csrc/cpu/*.cpp"),
        depends=files("csrc/include/*.h", "csrc/cpu/*.h", "csrc/cpu/*.inc"),
        language="c++",
    ),
    Extension(
        f"{PACKAGE}._C_cuda",
        sources=files("csrc/bind_cuda.cpp", "csrc/cuda/*.cu"),
        depends=files("csrc/include/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh"),
        language="c++",
        optional=cuda_mode() != "1",
    ),
]

setup(
    version=VERSION,
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={"megatron_tcod.report": ["assets/*"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildNative},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",
        "transformers>=5.12",
        "tokenizers",
        "safetensors",
        "jinja2",
        "msgspec",
        "numpy",
        "psutil",
        "pydantic>=2.10",
        "rich",
        "tyro>=1.0",
    ],
    extras_require={
        "alfworld": ["alfworld==0.4.2", "textworld==1.7.0", "fast_downward_textworld"],
        "bridge": ["megatron-bridge>=0.3.1"],  # needs CUDA and Transformer Engine
        "scienceworld": ["scienceworld==1.2.3"],  # and Java, 8 or newer
        "tensorboard": ["tensorboard"],
        "triton": ["triton>=3.6,<3.8; platform_system == 'Linux'"],  # a CUDA build of torch brings its own
        "sglang": ["aiohttp"],  # to talk to servers, which have an environment of their own
        "dev": [
            *("aiohttp", "hypothesis", "pybind11>=2.12", "ruff", "scipy", "setuptools>=77"),
            *("pytest", "pytest-timeout", "pytest-xdist"),
        ],
    },
)
