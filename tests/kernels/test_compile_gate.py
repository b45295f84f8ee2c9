"""Every kernel compiles for GPUs that are not here and fits them; and the gate that says so can fail.

By default every two choices of dtypes, formats, options and sizes are compiled together once; with
`-m slow` all that there are. That these are all that ops can launch is what test_launches.py checks.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import sae_kernels

pytestmark = pytest.mark.timeout(900)  # minutes on a machine that does something else as well
ROOT = Path(__file__).parents[2]
KERNEL_FOLDER = Path(sae_kernels.__file__).parent / "triton"
HEADER = """
import triton, triton.language as tl
from sae_kernels.triton.launch import Case
"""
POINTERS = '{"x": "*fp32", "y": "*fp32"}'
PLANTED = {
    # Each thread of the one warp keeps 512 or 1024 values until their sum is known: more than its registers.
    "spilling": f"""
@triton.jit
def spill(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(y + at, values * tl.sum(values))

def cases(shape):
    return [Case(spill, {POINTERS}, {{"SIZE": 32768}}, num_warps=1)]
""",
    # Promised to use matrix instructions, 16-byte loads and few registers, and keeps none of it.
    "slow": f"""
@triton.jit
def slow(x, y, stride):
    at = tl.arange(0, 128) * stride
    tl.store(y + at, tl.sum(tl.load(x + at)[:, None] * tl.load(y + at)[None, :], axis=1))

def cases(shape):
    types = {{**{POINTERS}, "stride": "i32"}}
    return [Case(slow, types, {{}}, tensor_cores=True, vector_loads=True, max_registers=8)]
""",
    "hungry": f"""
@triton.jit
def hungry(x, y, n, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, n, SIZE):
        total += tl.dot(tl.load(x + i * n + k + j), tl.load(y + (k + i) * n + j))
    tl.store(y + i * n + j, total)

def cases(shape):
    types = {{**{POINTERS}, "n": "i32"}}
    return [Case(hungry, types, {{"SIZE": 128}}, num_warps=8, num_stages=4)]
""",
    "unlisted": """
@triton.jit
def unlisted(x):
    tl.store(x, 1.0)
""",
    "forgotten": f"""
@triton.jit
def helper(x):
    return x + 1

@triton.jit
def listed(x, y):
    tl.store(y, helper(tl.load(x)))

@triton.jit
def forgotten(x):
    tl.store(x, 1.0)

def cases(shape):
    return [Case(listed, {POINTERS}, {{}})]
""",
    "broken": f"""
@triton.jit
def broken(x, y):
    tl.store(y, tl.load(x) + tl.arange(0, 3))

@triton.jit
def incomplete(x, y, n):
    tl.store(y, n)

def cases(shape):
    return [Case(broken, {POINTERS}, {{}}), Case(incomplete, {POINTERS}, {{}})]
""",
}


def run_gate(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), *sys.path])}
    command = [sys.executable, str(ROOT / "kernels" / "bench" / "compile_gate.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    "which",
    [["--each"], pytest.param(["--pairs"], marks=pytest.mark.slow), pytest.param([], marks=pytest.mark.slow)],
)
def test_every_kernel_compiles_for_every_target_within_its_budgets(which):
    out = run_gate(*which)
    assert out.returncode == 0, out.stdout[-5000:] + out.stderr[-2000:]
    names = [m.name for m in pkgutil.iter_modules([str(KERNEL_FOLDER)])]
    with_kernels = {name for name in names if "@triton.jit" in (KERNEL_FOLDER / f"{name}.py").read_text()}
    lines = re.findall(r"^(\w+)\.\w+ +\S+ +(sm_80|sm_90|gfx942) +\d", out.stdout, re.MULTILINE)
    assert {module for module, _ in lines} == with_kernels
    assert {arch for _, arch in lines} == {"sm_80", "sm_90", "gfx942"}


def test_every_two_choices_meet_in_one_of_few_combinations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels" / "bench"))
    covering = importlib.import_module("covering").covering
    names = ("rows", "format", "moments", "dead", "lazy")
    rows = [dict(zip(names, choice, strict=True)) for choice in product("ab", "abc", "ab", "ab", "ab")]
    rows = [row for row in rows if not (row["format"] == "c" and row["rows"] == "a")]  # some never meet
    few = [rows[i] for i in covering(rows)]
    assert len(few) <= 8 < len(rows) == 40  # there are 6 pairs of format and moments to begin with
    for one, other in combinations(names, 2):
        assert {(row[one], row[other]) for row in few} == {(row[one], row[other]) for row in rows}
    assert covering([{"only": 1}, {"only": 2}]) == [0, 1]
    assert covering([{}]) == [0]
    each = [rows[i] for i in covering(rows, 1)]
    assert len(each) == 3 and all({row[n] for row in each} == {row[n] for row in rows} for n in names)


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The last lines of a gate over planted kernels: what is wrong with them."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "planted").mkdir()
    (folder / "planted" / "__init__.py").touch()
    for name, code in PLANTED.items():
        (folder / "planted" / f"{name}.py").write_text(HEADER + code)
    out = run_gate("--package", "planted", "--archs", "sm_90", "gfx942", "--shapes", "B", path=folder)
    assert out.returncode == 1, out.stdout + out.stderr
    return out.stdout.splitlines()[-int(re.findall(r", (\d+) faults", out.stdout)[0]) :]


@pytest.mark.parametrize(
    ("kernel", "arch", "fault"),
    [
        ("spilling.spill", "sm_90", r"spills registers \(\d+\)"),
        ("spilling.spill", "gfx942", r"spills registers \(\d+\)"),
        ("slow.slow", "sm_90", "has no matrix instruction"),
        ("slow.slow", "gfx942", "has no matrix instruction"),
        ("slow.slow", "sm_90", "has no load of 16 bytes per thread"),
        ("slow.slow", "gfx942", "has no load of 16 bytes per thread"),
        ("slow.slow", "sm_90", r"takes \d+ registers of 8"),
        ("hungry.hungry", "sm_90", r"takes \d+ bytes of shared memory of 232448"),
        ("hungry.hungry", "gfx942", r"takes \d+ bytes of shared memory of 65536"),
        ("broken.broken", "sm_90", "does not compile: .*"),
        ("broken.incomplete", "gfx942", "does not compile: ValueError: .*'n'.*"),
    ],
)
def test_a_planted_kernel_is_refused_for_what_is_wrong_with_it(refused, kernel, arch, fault):
    line = re.compile(rf"{kernel} \(.*\) for {arch} at B: {fault}")
    assert any(line.match(text) for text in refused), "\n".join(refused)


def test_kernels_that_no_case_compiles_are_refused_and_their_helpers_are_not(refused):
    assert "planted.unlisted has kernels and no function `cases`" in refused
    assert "planted.forgotten.forgotten is compiled by no case, and no kernel calls it" in refused
    assert not any("helper" in text or "listed.listed" in text for text in refused)
