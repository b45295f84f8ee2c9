"""What the GPU benchmark runs, in which order, and what fits beside what.

A case is one implementation at one shape in one setting, and has a process of its own. Cases run in waves:
those of a wave are alive together and are timed in turns. The first wave of every shape comes before the
second of any, so that a budget that ends early has bought the comparisons that matter most. Each wave has
our main case in it, so that a ratio is always of times taken side by side.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_problem import PROBLEMS, Problem, recorded_shape

SHAPES = ("A", "B", "S", "C", "D")
MORE_SHAPES = ("S-k16", "S-k64", "S-k128", "S-k192")  # when asked for: they would not fit the budget
RECORDED = "+rows"  # after a shape's name: the same on recorded rows
CONTEXT_BYTES = 700 << 20  # what a process takes of the device's memory before it does anything
CHECK_BYTES = 6 << 30  # temporaries while a case is checked; one is at a time
STEP_S = 10.0  # most seconds for all rounds of a step; a stage or a graph gets less
PART_S = 4.0

OURS = (  # level, format, clip, encoder: the first is what the table calls ours
    (1, "split", "exact", "auto"),
    (1, "fp32", "exact", "auto"),
    (2, "split", "exact", "e1"),
    (2, "split", "exact", "e2"),
    (2, "split", "lag1", "auto"),
    (2, "split", "none", "auto"),
    (2, "bf16-moments", "lag1", "auto"),
    (2, "lazy", "lag1", "auto"),
)
OTHERS = (  # level, implementation, variant, rows
    (1, "trainer", "no dead", "fp32"),
    (1, "dense", "eager", "fp32"),
    (1, "sparsify", "as shipped", "bf16"),
    (2, "trainer", "1% dead", "fp32"),
    (2, "trainer", "10% dead", "fp32"),
    (3, "openai", "no syncs", "fp16"),
    (3, "sparsify", "no syncs", "bf16"),
    (3, "dictionary_learning", "as shipped", "bf16"),
    (3, "dictionary_learning", "no syncs", "bf16"),
    (3, "saelens", "as shipped", "fp32"),
    (3, "saelens", "no syncs", "fp32"),
    (4, "dense", "compiled", "bf16"),
    (4, "dense", "eager", "bf16"),
    (4, "sparsify", "no syncs", "fp32"),
    (4, "saelens", "no syncs", "bf16"),
)
IMPLEMENTATIONS = ("ours", *dict.fromkeys(impl for _, impl, _, _ in OTHERS))
LEVELS = (1, 2, 3, 4)

Case = dict[str, Any]


def problem(shape: str, rows: str = "") -> Problem:
    """The problem of a shape's name; with RECORDED after it, on the rows of a file."""
    if not shape.endswith(RECORDED):
        return PROBLEMS[shape]
    p = PROBLEMS[shape.removesuffix(RECORDED)]
    d = recorded_shape(Path(rows))[1][1] if p.name == "tiny" else p.d  # the interpreter's shape takes any
    return replace(p, name=shape, d=d, rows=rows)


def recorded_shapes(path: Path, shapes: list[str]) -> list[str]:
    """Those of the shapes, or R, whose width recorded rows have.

    Raises:
        ValueError: none has, or the file is not one of rows."""
    width = recorded_shape(path)[1][1]
    candidates = shapes if shapes == ["tiny"] else dict.fromkeys([*shapes, "R"])
    fits = [s for s in candidates if PROBLEMS[s].d == width or s == "tiny"]
    if not fits:
        widths = ", ".join(f"{s} {PROBLEMS[s].d}" for s in (*SHAPES, "R"))
        raise ValueError(f"{path} holds rows of width {width}: expected that of a shape, {widths}")
    return [s + RECORDED for s in fits]


def cases(shape: str, quick: bool, only: list[str] | None) -> list[list[Case]]:
    """The cases of a shape, by level; every level begins with our main case, unless ours is not wanted."""
    wanted = only or IMPLEMENTATIONS
    ours: list[tuple[int, Case]] = []
    for number, (level, fmt, clip, encoder) in enumerate(OURS[:1] if quick else OURS):
        trials = "full" if number == 0 else "encoder" if encoder != "auto" else ""
        settings = {
            "format": fmt,
            "clip": clip,
            "encoder": encoder,
            "stages": level == 1 or encoder != "auto",
        }
        ours.append((level, {"impl": "ours", "shape": shape, **settings, "adversarial": trials}))
    others = [
        (level, {"impl": impl, "shape": shape, "variant": variant, "rows": rows})
        for level, impl, variant, rows in OTHERS
        if not quick or (impl, variant, rows) == ("dense", "eager", "fp32")
    ]
    recorded_levels = LEVELS[:1] if shape.endswith(RECORDED) else LEVELS
    found = [
        [c for at, c in (*ours, *others) if at == level and c["impl"] in wanted] for level in recorded_levels
    ]
    main = ours[0][1] | {"checked": True, "stages": False, "adversarial": "", "anchor": True}
    again = [main] if "ours" in wanted else []
    return [found[0], *([*again, *level] if level else [] for level in found[1:])]


def is_main(case: Case) -> bool:
    """Whether it is what the table calls ours."""
    return case["impl"] == "ours" and (case["format"], case["clip"], case["encoder"]) == OURS[0][1:]


def name(case: Case) -> str:
    """As the table has it."""
    if case["impl"] == "ours":
        return " ".join(("ours", case["format"], case["clip"], case["encoder"]))
    return f"{case['impl']}, {case['variant']}, {case['rows']} rows"


def held_bytes(p: Problem, case: Case) -> int:
    """About what a case holds of the device's memory when it is ready."""
    rows = 4 * p.n * p.d * 4 + CONTEXT_BYTES
    if case["impl"] == "ours":
        return p.parameter_bytes(case["format"]) + rows + 6 * p.n * p.d * 2 + (1 << 30)
    if case["impl"] == "trainer":
        return 28 * p.f * p.d + rows + (2 << 30)
    wide = {"dense": 16, "sparsify": 8, "openai": 8}.get(case["impl"], 24) * p.n * p.f
    gathered = 8 * p.n * p.k * p.d if case["impl"] == "sparsify" else 0  # what its backward pass makes
    return 36 * p.f * p.d + rows + wide + gathered


def least_bytes(p: Problem, case: Case) -> int:
    """Parameters, moments and gradients alone: a case that cannot have these is not tried."""
    if case["impl"] == "ours":
        return p.parameter_bytes(case["format"])
    return (28 if case["impl"] == "trainer" else 32) * p.f * p.d


def waves(p: Problem, level: list[Case], free: float) -> list[list[Case]]:
    """Cases in groups that fit the memory together, each with the first case of `level` if that fits too."""
    room = 0.92 * free
    found: list[list[Case]] = []
    anchor = (
        [level[0] | {"checked": True, "stages": False, "anchor": True}] if level[0]["impl"] == "ours" else []
    )
    for case in level:
        fits = found and sum(held_bytes(p, c) for c in (*found[-1], case)) + CHECK_BYTES <= room
        if fits:
            found[-1].append(case)
            continue
        beside = (
            anchor if found and sum(held_bytes(p, c) for c in (*anchor, case)) + CHECK_BYTES <= room else []
        )
        found.append([*beside, case])
    return [wave for wave in found if not all(c.get("anchor") for c in wave)]


def estimated_s(p: Problem, case: Case, repeats: int) -> float:
    """Seconds that a case will take of a GPU's time, preparation included; a guess with room."""
    step = p.gemm_flops / 600e12 * {"ours": 3.5, "trainer": 5.0}.get(case["impl"], 14.0)
    prepare = 90.0 if case.get("variant") == "compiled" else 1.0 if case.get("checked") else 5.0
    # The first of a shape compiles what the others find compiled.
    prepare += {"full": 20.0, "encoder": 5.0}.get(case.get("adversarial", ""), 0.0) + step * 30
    parts = 4 * bool(case.get("stages")) + (case["impl"] == "ours")  # stages, the graph
    return prepare + min(STEP_S, step * repeats) + parts * min(PART_S, step * repeats)
