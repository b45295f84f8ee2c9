"""Compile every Triton kernel for GPUs that are not here, and refuse what would be slow or not start there.

    python kernels/bench/compile_gate.py [--archs sm_90 gfx942] [--shapes A B] [--kernel REGEX] [--pairs]

Every module of sae_kernels.triton says in `cases` in which ways its kernels are launched at the shapes that
count: dtypes, formats, options and tile sizes, in every combination (tests/kernels/test_launches.py sees to
that). This takes some minutes; with --pairs it is enough that every two choices meet in one compilation,
with --each that every choice is in one.
Each is taken to machine code for NVIDIA's A100 (sm_80) and H100/H200 (sm_90) and AMD's
MI300 (gfx942) with the assemblers that Triton ships, so that no GPU is needed. What is over budget fails:
spilled registers, registers, shared memory, matrix or wide load instructions that should be there and are
not. So does a module with kernels and no `cases`, and a kernel that no case compiles.
"""

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel is not compiled

import triton
from covering import covering
from sae_kernels.triton.launch import SHAPES, Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes one block can have
MAX_VGPRS = 512  # a wave's, AGPRs included
# Of NVIDIA's, in PTX: these go to machine code one by one, and disassembling it takes longer than compiling.
MATRIX = {"sm_80": r"\bmma\.sync\b", "sm_90": r"\bwgmma\.mma_async\b", "gfx942": r"\bv_mfma_"}
_PTX_WIDE = r"\bld\.global[\w.:]*\.(v4\.\w32|v2\.\w64)\b|\bcp\.async\.c[ga]\.[^;]*, *(0x10|16)\b"
WIDE_LOAD = {
    "sm_80": _PTX_WIDE,
    "sm_90": rf"{_PTX_WIDE}|\bcp\.async\.bulk\.tensor\b",
    "gfx942": r"\b(global|buffer)_load_dwordx4\b",
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Job:
    """One compilation, and the shapes that share it."""

    case: Case
    arch: str
    shapes: list[str] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        return f"{self.case.kernel.__module__.rpartition('.')[2]}.{self.case.kernel.__name__}"


@dataclass(frozen=True)
class Built:
    """What machine code needs of the machine."""

    registers: int
    spills: int
    """NVIDIA: bytes of stack per thread. AMD: spilled registers, or bytes of scratch memory."""
    shared: int
    matrix: int
    wide_loads: int
    seconds: float


def compile_case(case: Case, arch: str) -> Built:
    """Machine code of one case, measured."""
    start = time.perf_counter()
    kernel, names = case.kernel, case.kernel.arg_names
    unknown = [name for name in (*case.types, *case.constants, *case.odd) if name not in names]
    missing = [name for name in names if name not in case.types and name not in case.constants]
    if unknown or missing:
        raise ValueError(
            f"its case has no {missing or 'missing arguments'}, and {unknown or 'none'} too many"
        )
    aligned = [name for name, kind in case.types.items() if kind[0] == "*" or kind == "i32"]
    source = ASTSource(
        kernel,
        {name: case.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in case.odd},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.register_limit is not None and not arch.startswith("gfx"):
        options["maxnreg"] = case.register_limit
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    read = _read_amd if arch.startswith("gfx") else _read_nvidia
    registers, spills, code = read(compiled.asm)
    matrix, wide = (sum(1 for _ in re.finditer(pattern[arch], code)) for pattern in (MATRIX, WIDE_LOAD))
    return Built(registers, spills, compiled.metadata.shared, matrix, wide, time.perf_counter() - start)


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers, bytes of stack, instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2]), asm["ptx"]


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers, spills (or bytes of scratch memory, where there is some without spills), instructions."""
    code = asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    found = [re.search(rf"\.{name}:\s*(\d+)", code) for name in names]
    registers, spilled, scratch = (int(match[1]) for match in found if match)
    return registers, spilled or scratch, code


def faults(job: Job, built: Built) -> list[str]:
    """What is over budget, in words."""
    case, arch = job.case, job.arch
    budget = MAX_VGPRS if arch.startswith("gfx") else case.max_registers
    checks = [
        (built.spills > 0, f"spills registers ({built.spills})"),
        (built.registers > budget, f"takes {built.registers} registers of {budget}"),
        (
            built.shared > MAX_SHARED[arch],
            f"takes {built.shared} bytes of shared memory of {MAX_SHARED[arch]}",
        ),
        (case.tensor_cores and not built.matrix, f"has no matrix instruction ({MATRIX[arch]})"),
        (case.vector_loads and not built.wide_loads, "has no load of 16 bytes per thread"),
    ]
    return [text for wrong, text in checks if wrong]


def find_modules(package: str) -> list[ModuleType]:
    root = importlib.import_module(package)
    return [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(root.__path__)]


def kernels_of(module: ModuleType) -> dict[str, JITFunction]:
    """Functions of Triton that are defined in a module, helpers of kernels included."""
    members = vars(module).items()
    return {k: v for k, v in members if isinstance(v, JITFunction) and v.__module__ == module.__name__}


def find_jobs(modules: list[ModuleType], archs: list[str], shapes: list[str]) -> tuple[list[Job], list[str]]:
    """Distinct compilations, and what is wrong with the modules' lists of them."""
    jobs: dict[str, Job] = {}
    wrong: list[str] = []
    compiled: set[tuple[str, str]] = set()
    for module in modules:
        if not hasattr(module, "cases"):
            if kernels_of(module):
                wrong.append(f"{module.__name__} has kernels and no function `cases`")
            continue
        for shape in SHAPES:
            if shape.name not in shapes:
                continue
            for case in module.cases(shape):
                compiled.add((case.kernel.__module__, case.kernel.__name__))
                for arch in archs:
                    if arch in case.archs:
                        job = jobs.setdefault(f"{case!r} {arch}", Job(case, arch))
                        job.shapes += [shape.name] if shape.name not in job.shapes else []
    sources = {(m.__name__, name): fn.src for m in modules for name, fn in kernels_of(m).items()}
    for module, name in sources.keys() - compiled:
        called = rf"\b{name}\("
        if not any(re.search(called, src) for key, src in sources.items() if key != (module, name)):
            wrong.append(f"{module}.{name} is compiled by no case, and no kernel calls it")
    return list(jobs.values()), sorted(wrong)


def few(jobs: list[Job], together: int) -> list[Job]:
    """Jobs such that any so many choices that a kernel is given are in one together; the target is one."""
    kernels: dict[str, list[Job]] = {}
    for job in jobs:
        kernels.setdefault(job.kernel, []).append(job)
    found = []
    for group in kernels.values():
        choices = [
            {**j.case.types, **j.case.constants, "warps": j.case.num_warps, "arch": j.arch} for j in group
        ]
        found += [group[number] for number in covering(choices, together)]
    return found


_jobs: list[Job] = []  # inherited by the workers: a kernel cannot be pickled


def _work(number: int) -> Built | str:
    job = _jobs[number]
    try:
        return compile_case(job.case, job.arch)
    except Exception as error:  # whatever a compiler raises is the finding
        return f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:500]}"


def build_all(jobs: list[Job], workers: int) -> list[Built | str]:
    """What each job needs, or why it has no machine code; in a cache of its own that is removed."""
    global _jobs
    _jobs = jobs
    with tempfile.TemporaryDirectory(prefix="compile-gate-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, mp_context=fork) as pool:
            # Those that are likely to take longest first: the last to end is then a short one.
            order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i].case.kernel.src))
            futures = {i: pool.submit(_work, i) for i in order}
            results: list[Built | str] = []
            for i in range(len(jobs)):
                try:
                    results.append(futures[i].result())
                except BrokenProcessPool:
                    results.append("the compiler crashed on this one or on one compiled beside it")
    return results


def variants(jobs: list[Job]) -> list[str]:
    """What tells compilations of one kernel apart: constants that differ between them."""
    texts = []
    for job in jobs:
        same = [other.case for other in jobs if other.kernel == job.kernel]
        values = {**job.case.types, **job.case.constants}
        differing = [k for k in values if len({repr({**c.types, **c.constants}.get(k)) for c in same}) > 1]
        texts.append(" ".join(f"{name}={values[name]}" for name in differing))
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--archs", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in SHAPES])
    parser.add_argument("--kernel", default="", help="only kernels whose module.name this finds")
    parser.add_argument("--package", default="sae_kernels.triton", help="the package of modules with kernels")
    parser.add_argument(
        "--pairs", action="store_true", help="a few compilations in which every two choices meet"
    )
    parser.add_argument("--each", action="store_true", help="fewer still, in which every choice is made once")
    parser.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 2))
    a = parser.parse_args()
    start = time.perf_counter()
    jobs, wrong = find_jobs(find_modules(a.package), a.archs, a.shapes)
    jobs = sorted(
        (j for j in jobs if re.search(a.kernel, j.kernel)), key=lambda j: (j.kernel, j.shapes, j.arch)
    )
    jobs = few(jobs, 1) if a.each else few(jobs, 2) if a.pairs else jobs
    results = build_all(jobs, a.workers)
    print(f"Triton {triton.__version__}; registers per thread, spilled registers, shared memory in KiB,")
    print("matrix instructions, loads of 16 bytes per thread, seconds to compile; warps and stages")
    width = max((len(job.kernel) for job in jobs), default=0)
    for job, built, variant in zip(jobs, results, variants(jobs), strict=True):
        head = f"{job.kernel:{width}}  {','.join(job.shapes):8} {job.arch:7}"
        if isinstance(built, str):
            found, numbers = [built], f"{'-':>4}"
        else:
            found = faults(job, built)
            numbers = f"{built.registers:4}{built.spills:4}{built.shared / 1024:7.1f}{built.matrix:5}"
            numbers += f"{built.wide_loads:5}{built.seconds:6.1f}"
        how = f"{job.case.num_warps}w{job.case.num_stages}s {variant}{'  FAILS' if found else ''}"
        print(f"{head}{numbers}  {how}")
        where = f"{job.kernel} ({variant}) for {job.arch} at {','.join(job.shapes)}"
        wrong += [f"{where}: {text}" for text in found]
    print(f"{len(jobs)} compilations in {time.perf_counter() - start:.0f} s, {len(wrong)} faults")
    for text in wrong:
        print(text)
    return 1 if wrong or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
