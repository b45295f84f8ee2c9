"""The report of the GPU benchmark for people, and the shares of what the device can do."""

from statistics import fmean
from typing import Any

import gpu_plan
from gpu_problem import Problem

COLUMNS = ("median", "p10", "p90")


def floors(p: Problem, fmt: str, clip: str, active: float, top: dict[str, float]) -> dict[str, float]:
    """Milliseconds that each stage would take at this device's measured ceilings."""
    slots = p.n * p.k * p.d * 2  # bytes of gathered bf16 rows
    gathers = 2 * (2 if clip == "exact" else 1)  # x and residual, once more for the norm of this very step
    return {
        "encode": p.gemm_flops / top[f"gemm_{p.name}_tflops"] / 1e9,
        "decode": slots / top[f"gather_w_{p.name}_gb_s"] / 1e6,
        "update": p.adam_traffic(fmt, active) / top["copy_gb_s"] / 1e6
        + gathers * slots / top[f"gather_x_{p.name}_gb_s"] / 1e6,
    }


def add_shares(result: dict[str, Any], p: Problem, top: dict[str, float]) -> None:
    """Rows per second, multiples of the encoder's product, and shares of what the device can do."""
    if "ms" not in result:
        return
    ms = result["ms"]["median"]
    result["rows_per_s"] = p.n / ms * 1e3
    result["times_gemm"] = ms / (p.gemm_flops / top[f"gemm_{p.name}_tflops"] / 1e9)
    if result["impl"] == "ours":
        floor = floors(p, result["format"], result["clip"], result["active"], top)
        result["share_of_ceiling"] = sum(floor.values()) / ms
        result["stage_shares"] = {k: floor[k] / t["median"] for k, t in result.get("stages", {}).items()}


def mean_ceilings(measured: list[dict[str, float]]) -> dict[str, float]:
    """What shares refer to: of those measured before, and after if they are known."""
    names = measured[0] if measured else ()
    return {name: fmean(each[name] for each in measured) for name in names}


def table(report: dict[str, Any]) -> str:
    about, ceilings = report["about"], report["ceilings"]
    lines = [", ".join(f"{k} {v}" for k, v in about.items())]
    lines.append(f"{report['elapsed_s']:.0f} s of {report['budget_s']:.0f} s; {report['rounds']} rounds")
    lines.append(
        "wave: its cases were alive together and timed in turns; x ours: median over rounds, beside ours; "
        "host: ms to enqueue;\nloss, grad: errors of the first step beside float64; bits: of two runs"
    )
    for when, top in ceilings.items():
        lines.append(f"ceilings {when}: " + ", ".join(f"{k} {_short(v)}" for k, v in top.items()))
    for shape in report["shapes"]:
        p = report["problems"][shape]
        rows = f"recorded rows of {p['rows']}" if p["rows"] else "synthetic rows"
        lines.append(f"\nshape {shape}: N={p['n']} D={p['d']} F={p['f']} k={p['k']}; {rows}; {about['unit']}")
        lines.append(
            f"{'':46}{'median':>9}{'p10':>9}{'p90':>9}{'x ours':>8}{'host':>9}{'rows/s':>11}{'x GEMM':>8}"
            f"{'ceiling':>8}{'peak GB':>8}{'loss':>8}{'grad':>8}  bits   wave"
        )
        for result in (r for r in report["results"] if r.get("shape") == shape):
            lines += _lines(result)
    lines += _states(report["results"])
    if curve := report.get("curve"):
        lines += ["", _curve(curve)]
    if together := report.get("together"):
        lines += ["", _together(together)]
    return "\n".join(lines)


def _lines(r: dict[str, Any]) -> list[str]:
    name = gpu_plan.name(r)
    if "failed" in r:
        return [f"{name:46} {r['failed']}"]
    first = r.get("first_step", {})
    peak = f"{r['peak_bytes'] / 1e9:8.2f}" if r.get("peak_bytes") is not None else f"{'-':>8}"
    line = f"{name:46}" + "".join(f"{r['ms'][k]:9.3f}" for k in COLUMNS)
    line += f"{r['times_ours']:8.2f}" if "times_ours" in r else f"{'-':>8}"
    line += f"{r['host_ms']:9.3f}"
    line += f"{r['rows_per_s']:11.0f}{r['times_gemm']:8.2f}" if "rows_per_s" in r else f"{'':19}"
    line += f"{r['share_of_ceiling']:8.0%}" if "share_of_ceiling" in r else f"{'':8}"
    line += peak + "".join(f"{first[k]:8.0e}" if k in first else f"{'-':>8}" for k in ("loss", "gradient"))
    lines = [line + f"  {r['bits']:6} {r['wave']}"]
    for stage, t in r.get("stages", {}).items():
        share = f"{r['stage_shares'][stage]:8.0%}" if "stage_shares" in r else ""
        lines.append(f"    {stage:42}" + "".join(f"{t[k]:9.3f}" for k in COLUMNS) + f"{'':36}{share}")
    graph = r.get("graph_ms")
    if graph is not None or r.get("graph", "captured") != "captured":
        said = f"{graph['median']:.3f} ms" if graph is not None else r["graph"]
        lines.append(f"    replayed from a graph: {said}")
    if r.get("host_waits"):
        lines.append(f"    the host waits for the device: {r['host_waits']}")
    if r["bits"] == "differ":
        lines.append(f"    after three steps two runs differ by {r['runs_differ_by']:.0e} of their weights")
    if r["impl"] == "ours":
        errors = {f"{op} {k}": v for op, found in r["errors"].items() for k, v in found.items()}
        worst = sorted(errors.items(), key=lambda e: -e[1])[:3]
        shown = ", ".join(f"{k} {v:.1e}" for k, v in worst)
        rows = f"{r['fallback_rows']} rows encoded again"
        lines.append(
            f"    active {r['active']:.1%}, busiest latent {r['busiest']} rows, {rows}; errors: {shown}"
        )
        if r["adversarial"]:
            shown = ", ".join(f"{k} {_short(v)}" for k, v in r["adversarial"].items())
            lines.append(f"    adversarial: {shown}")
    return lines


def _states(results: list[dict[str, Any]]) -> list[str]:
    """Each implementation's formats once."""
    found = {gpu_plan.name(r): r["state"] for r in results if "state" in r}
    return ["", "state"] + [
        f"{name:46} " + "; ".join(f"{k} {v}" for k, v in state.items()) for name, state in found.items()
    ]


def _curve(curve: dict[str, Any]) -> str:
    if "failed" in curve:
        return f"loss curve: {curve['failed']}"
    ends = curve["held_out_fvu"]
    verdict = curve.get("wrong", "agree")
    return (
        f"loss curve, {curve['steps']} steps of {curve['problem']}: held-out FVU ours {ends['ours']:.5f}, "
        f"dense float32 {ends['dense']:.5f}, {curve['off']:.3%} apart: {verdict}"
    )


def _together(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"SAEs together: {found['failed']}"
    turns, together = (
        f"{found['ms'][way]:.3f} (host {found['host_ms'][way]:.3f})" for way in ("turns", "together")
    )
    verdict = found.get("wrong", f"weights agree to {found['off']:.0e}")
    return f"{found['saes']} SAEs of {found['problem']}: {turns} in turns, {together} together: {verdict}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
