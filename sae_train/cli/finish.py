"""The end of a run: judge every member, write what can be published, draw the report, print the table."""

import math
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from sae_train import stop
from sae_train.cli.artifacts import artifacts
from sae_train.cli.wire import Wired
from sae_train.config import Config, as_tree
from sae_train.evaluate import HeldOut, Splice, evaluate
from sae_train.files import write_json
from sae_train.log import MetricLog, read_metrics
from sae_train.metrics.base import Metric
from sae_train.metrics.density import Density
from sae_train.metrics.l0 import L0
from sae_train.metrics.sharing import decoder_shares
from sae_train.places import Places
from sae_train.report import plots
from sae_train.report.card import describe, write_card
from sae_train.report.html import MemberReport, ReportData, write_report
from sae_train.report.table import final_table, final_text, time_table
from sae_train.sae.io import save_sae
from sae_train.stats import FeatureStats, write_features
from sae_train.train.clock import Clock, time_shares
from sae_train.train.members import Member
from sae_train.train.record import RunRecord
from sae_train.train.state import TrainState


def finish(
    config: Config,
    folder: Path,
    record: RunRecord,
    wired: Wired,
    state: TrainState,
    heldout: HeldOut,
    clock: Clock,
    log: MetricLog,
) -> None:
    """Write RUN/saes/NAME for every member and RUN/report.html, and print the final table."""
    results: dict[str, dict[str, float]] = {}
    found: dict[str, list[Metric]] = {}
    for member in state.members:
        with clock.phase("evaluation"):
            results[member.name], found[member.name] = evaluate(
                member.trained(),
                member.places,
                heldout,
                config.eval,
                timed(wired.splice, clock),
                config.eval.ce_tokens,
            )
        results[member.name]["dead"] = float(member.stats.dead(member.dead_after_tokens).double().mean())
        log.write(
            state.step,
            state.tokens,
            {f"{member.name}/heldout/{key}": value for key, value in results[member.name].items()},
        )
    records = read_metrics(folder)
    reports = []
    for member in state.members:
        stop.check()
        with clock.phase("report"):
            reports.append(
                publish(
                    folder / "saes" / member.name,
                    member,
                    results[member.name],
                    found[member.name],
                    wired,
                    state,
                    records,
                )
            )
    seconds = time_shares(clock.state_dict(), wired.source.seconds)
    wall, waited = sum(seconds.values()), clock.seconds.get("rows", 0.0)
    rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    summary: dict[str, Any] = {
        "tokens": state.tokens,
        "steps": state.step,
        "wall_s": wall,
        "tokens_per_s": state.tokens / wall,
        "peak_rss_bytes": rss_bytes,
        "seconds": seconds,
        "waited_s": waited,
        "rows": dict(wired.source.counts),
        "row_ledger": state.ledger.hex(),
    }
    write_json(
        folder / "summary.json", {"members": {name: finite(r) for name, r in results.items()}} | summary
    )
    (folder / "plots").mkdir(exist_ok=True)
    drawn = {"time": plots.time_share(seconds, folder / "plots" / "time.png")}
    if len(state.members) > 1:
        drawn["pareto"] = plots.pareto(trade_offs(state.members, results), folder / "plots" / "pareto.png")
    report = folder / "report.html"
    write_report(
        report,
        ReportData(
            title=config.run.name,
            run=as_tree(config),
            members=reports,
            time=time_table(seconds),
            filters=dict(wired.source.counts),
            command=record.command,
            versions=record.versions,
            warnings=warnings(config, state, wired),
            summary=summary,
            plots=drawn,
        ),
    )
    if config.logger.wandb:
        log.keep(artifacts(config, folder, [member.name for member in state.members]))
    print_results(results)
    for name, spent, share in time_table(seconds):
        print(f"  {name:<18} {spent:8.1f} s  {share:6.1%}")
    print(f"  ({waited:.1f} s waiting for rows, shown as what was done meanwhile)")
    print(
        f"{state.tokens:,} tokens in {wall:,.0f} s ({state.tokens / wall:,.0f} tokens/s), "
        f"peak memory {rss_bytes / 2**30:.2f} GiB"
    )
    print(f"report: {report}")


def trade_offs(
    members: list[Member], results: dict[str, dict[str, float]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """What to draw of a set: SAEs of one kind at one place in a line, name -> (L0, FVU)."""
    several = len({member.places for member in members}) > 1
    series: dict[str, dict[str, tuple[float, float]]] = {}
    for member in members:
        config, numbers = member.config.sae, results[member.name]
        legend = f"{config.name}, {config.activation.name}, {member.sae.d_sae:,} latents"
        if several:
            legend += f", {'+'.join(member.places.outputs)}"
        point = (numbers.get("l0", math.nan), numbers.get("fvu", math.nan))
        series.setdefault(legend, {})[member.name] = point
    return series


def timed(splice: Splice | None, clock: Clock) -> Splice | None:
    """The same measurement with its time counted as the model's: it is nearly all forward passes."""
    if splice is None:
        return None

    def measure(
        places: Places, reconstruct: Callable[[Tensor], Tensor], means: list[Tensor], tokens: int
    ) -> dict[str, float]:
        with clock.phase("model forward"):
            return splice(places, reconstruct, means, tokens)

    return measure


def finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """The numbers as JSON can hold them: null for NaN and infinities."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def print_results(results: dict[str, dict[str, float]]) -> None:
    """The final table: drawn on a terminal, plain and as wide as it needs to be elsewhere."""
    console = Console(file=sys.stdout)
    if console.is_terminal:
        console.print(final_table(results))
    else:
        print(final_text(results))


def publish(
    folder: Path,
    member: Member,
    numbers: dict[str, float],
    metrics: list[Metric],
    wired: Wired,
    state: TrainState,
    records: list[dict[str, Any]],
) -> MemberReport:
    """Write one member's publishable folder and return what the report says about it."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    sae = member.trained()
    meta = wired.description | {"hook": "+".join(member.places.inputs), "tokens": state.tokens}
    meta["seed"] = member.config.seed
    heldout: FeatureStats | None = next((m.stats for m in metrics if isinstance(m, Density)), None)
    if member.places.targets:
        meta["target"] = "+".join(member.places.targets)
    save_sae(sae, folder, meta)
    scale = float(sae.code_scale)
    hooks = member.places.outputs
    more = {"decoder_shares": decoder_shares(sae)} if len(hooks) > 1 else {}
    features = folder / "features.safetensors"
    write_features(features, member.stats, heldout, scale, member.dead_after_tokens, more)
    write_json(folder / "metrics.json", finite(numbers))
    drawn = draw(folder / "plots", member, metrics, records)
    if len(hooks) == 2:
        drawn["shares"] = folder / "plots" / "shares.png"
        firing = more["decoder_shares"][member.stats.counts > 0, 1].cpu()
        plots.share_histogram(firing, (hooks[0], hooks[1]), drawn["shares"])
    description = describe(asdict(sae.config) | {"d_sae": sae.d_sae}, meta, sae.d_in, sae.d_out)
    write_card(folder / "README.md", description, numbers, meta)
    return MemberReport(name=member.name, description=description, metrics=numbers, plots=drawn)


def draw(
    folder: Path, member: Member, metrics: list[Metric], records: list[dict[str, Any]]
) -> dict[str, Path]:
    """The member's plots, by title."""
    name = member.name
    drawn = {title: folder / f"{title}.png" for title in ("density", "scatter", "fvu", "loss", "lr")}
    density = member.stats.density().cpu()
    plots.density_histogram(density, drawn["density"])
    plots.density_vs_activation(density, member.stats.mean_activation().cpu(), drawn["scatter"])
    plots.curves(
        records,
        {"train": f"{name}/fvu", "held-out": f"{name}/heldout/fvu"},
        drawn["fvu"],
        "fraction of variance unexplained",
    )
    losses = sorted({key for record in records for key in record if key.startswith(f"{name}/loss")})
    plots.curves(records, {key.removeprefix(f"{name}/"): key for key in losses}, drawn["loss"], "loss")
    plots.curves(records, {"lr": f"{name}/lr"}, drawn["lr"], "learning rate")
    for metric in metrics:
        if isinstance(metric, L0):
            drawn["l0"] = folder / "l0.png"
            plots.l0_distribution(metric.histogram, drawn["l0"])
    return drawn


def warnings(config: Config, state: TrainState, wired: Wired) -> list[str]:
    """What a reader of the report should know before believing its numbers."""
    out = []
    for member in state.members:
        if skipped := int(member.skipped):
            out.append(
                f"{member.name}: {skipped} steps were left out, {int(member.spikes.spikes)} of them because "
                "their loss was a spike, the others because gradients were not finite."
            )
    if wired.splice is None:
        out.append(
            "Cross-entropy was not measured: there is no language model in this run, or eval.ce_tokens is 0."
        )
    if state.step < config.train.steps:
        out.append(
            f"The data ended at step {state.step} of {config.train.steps}; the learning rate did not reach 0."
        )
    return out
