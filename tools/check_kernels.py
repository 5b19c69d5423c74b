"""Look at the machine code of the divergence kernels without a GPU, and end with 1 where it breaks a limit.

    python tools/check_kernels.py                          # Triton and CUDA kernels, sm_80, sm_90 and sm_100
    python tools/check_kernels.py --only triton --arch 90

Triton kernels are compiled ahead of time; CUDA kernels are compiled with nvcc, or without one taken from the built
megatron_tcod._C_cuda. Both are disassembled (nvdisasm and cuobjdump of the toolkit or of Triton), and one line a kernel
and architecture says what its main loop, the innermost one with 128-bit loads, costs for a pair of logits:

    registers | spills | 128-bit loads | barriers | instructions and MUFU operations a pair | ms

The milliseconds are a roofline, not a measurement: T = 8192 rows of V = 151,936 on an H200 at 1.98 GHz, from issue
slots (4 a clock and SM), from the MUFU unit (16 results a clock and SM) and from memory at a measured 4.3 TB/s.

Limits: no spills; loads of 128 bits in the main loop; no barrier, shuffle or atomic in it; on sm_90 neither issue nor
MUFU time above the memory's. Not here: running anything, cache and latency effects, the code of PTX for later devices.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHS = (80, 90, 100)
ROOFLINE_ARCH = 90
PAIRS = 8192 * 151_936
CLOCK = 132 * 1.98e9  # SM clocks a second of an H200
BANDWIDTH = 4.3e12
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DTYPES = ("fp32", "bf16", "fp16")
KINDS = ("reverse_kl", "forward_kl", "jsd", "nll")
SYNCHRONISING = ("BAR", "SHFL", "REDUX", "WARPSYNC", "VOTE", "ATOM", "ATOMG", "RED", "MEMBAR")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One compiled kernel. Example: Kernel(backend="cuda", name="partial_sums bf16", arch=90, ...)."""

    backend: str
    name: str
    arch: int
    operands: int
    """Rows of logits that it reads: 1 or 2."""
    item_bytes: int
    """Of one logit."""
    bytes_per_pair: float
    """Memory traffic, written elements included."""
    registers: int
    local_bytes: int
    sass: tuple[str, ...]
    """Instructions without their predicates, or `label:` where a branch can arrive."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the disassembly says about a kernel; times in ms on an H200."""

    spills: int
    wide_loads: int
    barriers: int
    instructions: float
    mufu: float
    issue_ms: float
    mufu_ms: float
    memory_ms: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("triton", "cuda"), help="leave the other backend's kernels out")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    args = parser.parse_args()
    num_kernels = num_broken = 0
    with tempfile.TemporaryDirectory() as directory:
        tools = Disassembler.find()
        if tools is None:
            print("skipped: neither the CUDA toolkit's nor Triton's nvdisasm and cuobjdump are here")
            return 1
        for backend, compiled in (("triton", triton_kernels), ("cuda", cuda_kernels)):
            if args.only not in (None, backend):
                continue
            for kernel in compiled(args.arch, Path(directory), tools):
                findings = examine(kernel)
                broken = limits_broken(kernel, findings)
                print(line_of(kernel, findings) + "".join(f" | LIMIT: {limit}" for limit in broken), flush=True)
                num_kernels += 1
                num_broken += bool(broken)
    print(f"{num_kernels} kernels, {num_broken} break a limit")
    return int(num_broken > 0 or num_kernels == 0)


def examine(kernel: Kernel) -> Findings:
    loop = main_loop(kernel.sass, kernel.operands * kernel.item_bytes)
    opcodes = [instruction.split()[0] for instruction in loop]
    wide_loads = sum(is_wide_load(opcode) for opcode in opcodes)
    pairs = max(wide_loads, 1) * 16 / (kernel.operands * kernel.item_bytes)
    instructions = len(opcodes) / pairs
    mufu = sum(opcode.startswith("MUFU") for opcode in opcodes) / pairs
    spilled = sum(entry.startswith(("STL", "LDL")) for entry in kernel.sass)
    return Findings(
        spills=spilled + kernel.local_bytes,
        wide_loads=wide_loads,
        barriers=sum(opcode.split(".")[0] in SYNCHRONISING for opcode in opcodes),
        instructions=instructions,
        mufu=mufu,
        issue_ms=1e3 * PAIRS * instructions / (4 * 32 * CLOCK),
        mufu_ms=1e3 * PAIRS * mufu / (16 * CLOCK),
        memory_ms=1e3 * PAIRS * kernel.bytes_per_pair / BANDWIDTH,
    )


def limits_broken(kernel: Kernel, findings: Findings) -> list[str]:
    broken = []
    if findings.spills:
        broken.append("registers spill")
    if not findings.wide_loads:
        broken.append("no loop with 128-bit loads")
    if findings.barriers:
        broken.append("the main loop synchronises")
    if kernel.arch == ROOFLINE_ARCH and max(findings.issue_ms, findings.mufu_ms) > findings.memory_ms:
        broken.append("slower than memory")
    return broken


def line_of(kernel: Kernel, findings: Findings) -> str:
    line = (
        f"{kernel.backend:6} {kernel.name:32} sm_{kernel.arch:<3} | {kernel.registers:3} registers"
        f" | {findings.spills} spills | {findings.wide_loads} wide loads | {findings.barriers} barriers"
        f" | {findings.instructions:4.1f} SASS {findings.mufu:3.1f} MUFU a pair"
    )
    if kernel.arch != ROOFLINE_ARCH:
        return line
    return line + f" | issue {findings.issue_ms:.2f} MUFU {findings.mufu_ms:.2f} memory {findings.memory_ms:.2f} ms"


def main_loop(sass: tuple[str, ...], bytes_per_pair: int) -> list[str]:
    """The innermost loop with 128-bit loads and exponentials that costs least a pair; empty where there is none."""
    starts, loops, position = {}, [], 0
    instructions = [entry for entry in sass if not entry.endswith(":")]
    for entry in sass:
        if entry.endswith(":"):
            starts[entry[:-1]] = position
            continue
        target = re.search(r"\.L_x_\d+", entry) if entry.startswith("BRA") else None
        if target and target.group() in starts:
            loops.append((starts[target.group()], position + 1))
        position += 1
    candidates = []
    for first, last in loops:
        is_innermost = not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
        num_wide = sum(is_wide_load(instruction) for instruction in instructions[first:last])
        has_mufu = any(instruction.startswith("MUFU") for instruction in instructions[first:last])
        if is_innermost and num_wide and has_mufu:
            candidates.append(((last - first) * bytes_per_pair / num_wide, instructions[first:last]))
    return min(candidates)[1] if candidates else []


def is_wide_load(instruction: str) -> bool:
    opcode = instruction.split()[0]
    return opcode.startswith("LDG") and ".128" in opcode


@dataclass(frozen=True)
class Disassembler:
    nvdisasm: str
    cuobjdump: str

    @classmethod
    def find(cls) -> Disassembler | None:
        """Triton's, which are there without a toolkit, or those on PATH."""
        directories = [os.environ.get("PATH", "")]
        try:
            import triton

            directories.insert(0, str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
        except ImportError:
            pass
        path = os.pathsep.join(directories)
        found = [shutil.which(name, path=path) for name in ("nvdisasm", "cuobjdump")]
        return cls(*found) if all(found) else None

    def kernels(self, cubin: Path) -> Iterator[tuple[str, dict[str, int], tuple[str, ...]]]:
        """(symbol, resources, instructions) of each kernel in a cubin."""
        usage = self._run(self.cuobjdump, "-res-usage", str(cubin))
        resources = {}
        for symbol, listed in re.findall(r"Function ([^\s:]+):\s*\n?\s*(REG:.*)", usage):
            resources[symbol] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", listed)}
        sections = re.split(r"\n\s*\.section\s+\.text\.", self._run(self.nvdisasm, "-c", str(cubin)))
        for section in sections[1:]:
            symbol = re.match(r'[^,"\s]+', section).group()
            yield symbol, resources[symbol], tuple(_instructions(section))

    @staticmethod
    def _run(*command: str) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(section: str) -> Iterator[str]:
    for line in section.splitlines():
        label = re.match(r"(\.L_x_\d+):", line)
        if label:
            yield label.group(1) + ":"
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line)
        if instruction:
            yield instruction.group(1)


def cuda_kernels(archs: list[int], directory: Path, tools: Disassembler) -> Iterator[Kernel]:
    for cubin, arch in _cuda_cubins(archs, directory, tools):
        for symbol, resources, sass in tools.kernels(cubin):
            mangled = re.search(r"(partial_sums|mixture_sums|logits_gradient)_kernelI((?:L[ib]\d+E)+)E", symbol)
            function, arguments = mangled.groups()
            dtype, *flags = (int(value) for value in re.findall(r"L[ib](\d+)E", arguments))
            yield _kernel("cuda", function, DTYPES[dtype], flags, arch, resources, sass)


def _kernel(backend, function, dtype, flags, arch, resources, sass) -> Kernel:
    """`flags` are the template arguments after the dtype in csrc/cuda, by which Triton's are named as well."""
    item, name, operands, written = ITEM_BYTES[dtype], f"{function} {dtype}", 2, 0
    if function == "partial_sums":
        has_teacher, is_packing = flags
        operands, written = 1 + has_teacher, 4 * is_packing
        name += ("" if has_teacher else " student alone") + (" packing" if is_packing else "")
    elif function == "mixture_sums":
        name += " packed" if flags[0] else ""
    else:
        is_packed, kind = flags
        operands, written = 1 if KINDS[kind] == "nll" else 2, item
        name = f"gradient {dtype} {KINDS[kind]}" + (" packed" if is_packed else "")
    return Kernel(
        backend=backend,
        name=name,
        arch=arch,
        operands=operands,
        item_bytes=item,
        bytes_per_pair=operands * item + written,
        registers=resources["REG"],
        local_bytes=resources["LOCAL"],
        sass=sass,
    )


def _cuda_cubins(archs: list[int], directory: Path, tools: Disassembler) -> Iterator[tuple[Path, int]]:
    nvcc = shutil.which("nvcc")
    sources = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in path.read_text())
    for arch in archs if nvcc else ():
        for source in sources:
            cubin = directory / f"{source.stem}.sm_{arch}.cubin"
            command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc' / 'include'}", "-cubin"]
            subprocess.run([*command, str(source), "-o", str(cubin)], check=True)
            yield cubin, arch
    if nvcc:
        return
    built = list((ROOT / "megatron_tcod").glob("_C_cuda*.so"))
    if not built:
        print("skipped cuda: no nvcc on PATH, and megatron_tcod._C_cuda is not built")
        return
    subprocess.run([tools.cuobjdump, "-xelf", "all", str(built[0])], check=True, cwd=directory, capture_output=True)
    for cubin in sorted(directory.glob("*.cubin")):
        arch = int(re.search(r"sm_(\d+)", cubin.name).group(1))
        if arch in archs:
            yield cubin, arch


def triton_kernels(archs: list[int], directory: Path, tools: Disassembler) -> Iterator[Kernel]:
    os.environ.setdefault("TRITON_CACHE_DIR", str(directory / "triton"))
    try:
        import triton
        from triton.backends.compiler import GPUTarget
    except ImportError:
        print("skipped triton: it is not installed")
        return
    from megatron_tcod.ops.triton_chunk import WARPS

    for arch in archs:
        for function, dtype, flags, source in _triton_sources():
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": WARPS})
            cubin = directory / "triton.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            for _, resources, sass in tools.kernels(cubin):
                yield _kernel("triton", function, dtype, flags, arch, resources, sass)


def _triton_sources() -> Iterator[tuple]:
    """What `ops/triton_chunk.py` would compile for rows that begin at multiples of 16 elements."""
    from megatron_tcod.ops import triton_kernels as kernels
    from megatron_tcod.ops.triton_chunk import GRADIENT_BLOCK, LANES

    for dtype in ("fp32", "bf16"):
        is_fp32, logits = dtype == "fp32", {"student": f"*{dtype}", "teacher": f"*{dtype}", "out": f"*{dtype}"}
        tile = {"HAS_SERIES": is_fp32, "LANES": LANES, "VECTOR": 16 // ITEM_BYTES[dtype]}
        halves = {"packed_student": "*fp16", "packed_gap": "*fp16"}
        for is_packing in (False, True):
            constants = tile | {"HAS_TEACHER": True, "HAS_COLUMN": True, "IS_PACKING": is_packing}
            types = logits | (halves if is_packing else {})
            yield "partial_sums", dtype, [1, is_packing], _source(kernels.partial_sums_kernel, types, constants)
        constants = tile | {"IS_PACKED": False, "HAS_FAST_LOG": True}
        yield "mixture_sums", dtype, [0], _source(kernels.mixture_sums_kernel, logits, constants)
        for number, kind in enumerate(KINDS):
            constants = {"KIND": kind, "IS_PACKED": False, "HAS_SERIES": is_fp32, "HAS_FAST_LOG": not is_fp32}
            constants["BLOCK"] = GRADIENT_BLOCK
            yield "logits_gradient", dtype, [0, number], _source(kernels.logits_gradient_kernel, logits, constants)


def _source(kernel, types: dict[str, str], constants: dict):
    """Pointers and strides as multiples of 16, arguments of no type here that are no constants as None."""
    from triton.compiler import ASTSource

    types = types | {"column": "*i64", "sums": "*fp64", "table": "*fp64", "row_scale": "*fp32", "columns": "i32"}
    types |= {name: "i32" for name in kernel.arg_names if name.endswith("_stride")}
    types |= {"student_scale": "fp32", "teacher_scale": "fp32", "beta": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    names = [name for name, kind in signature.items() if kind == "constexpr"]
    divisible = [i for i, kind in enumerate(signature.values()) if kind == "i32" or kind.startswith("*")]
    return ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): constants.get(name) for name in names},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )


if __name__ == "__main__":
    sys.exit(main())
