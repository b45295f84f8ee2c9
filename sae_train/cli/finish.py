"""The end of a run: judge every member, write what can be published, draw the report, print the table."""

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from sae_train import stop
from sae_train.cli.artifacts import artifacts
from sae_train.cli.wire import Wired
from sae_train.config import Config, as_tree
from sae_train.evaluate import HeldOut, Splice, StandIn, evaluate
from sae_train.files import write_json
from sae_train.log import MetricLog, read_metrics
from sae_train.metrics.base import Metric
from sae_train.metrics.density import Density
from sae_train.metrics.l0 import L0
from sae_train.metrics.sharing import decoder_shares
from sae_train.metrics.twins import COSINE, twins
from sae_train.ranks import Ranks
from sae_train.report import plots
from sae_train.report.card import describe, write_card
from sae_train.report.html import MemberReport, ReportData, write_report
from sae_train.report.table import final_table, final_text, time_table
from sae_train.sae.io import save_sae
from sae_train.stats import FeatureStats, write_features
from sae_train.train.clock import Clock, time_shares
from sae_train.train.members import Member, WholeMember, judged_together
from sae_train.train.record import RunRecord
from sae_train.train.state import TrainState

T = TypeVar("T")

TWINS = 0.01
"""Share of latents that may be another's twin before the report says so."""


def finish(
    config: Config,
    folder: Path,
    record: RunRecord,
    wired: Wired,
    state: TrainState,
    heldout: HeldOut,
    clock: Clock,
    log: MetricLog | None,
    ranks: Ranks,
) -> None:
    """Write RUN/saes/NAME for every member and RUN/report.html, and print the final table.

    Each process judges and publishes its own members; the lead, which has the log, does what is left.
    """
    own: dict[str, dict[str, float]] = {}
    found: dict[str, list[Metric]] = {}
    alike: list[str] = []
    for wholes in judged_together(state.members):
        with clock.phase("evaluation"):
            judged = evaluate(
                [(whole.sae, whole.places) for whole in wholes],
                heldout,
                config.eval,
                timed(wired.splice, clock),
                config.eval.ce_tokens,
            )
        own |= {
            whole.name: numbers | {"dead": whole.dead()}
            for whole, (numbers, _) in zip(wholes, judged, strict=True)
        }
        found |= {whole.name: metrics for whole, (_, metrics) in zip(wholes, judged, strict=True)}
        alike += [line for whole in wholes for line in same_latents(whole)]
    results = in_order(ranks.gather(own), record)
    if log is not None:
        for name, numbers in results.items():
            log.write(state.step, state.tokens, {f"{name}/heldout/{key}": x for key, x in numbers.items()})
    ranks.any(False)  # the log is written
    records = read_metrics(folder)
    parts: dict[str, MemberReport] = {}
    for member in state.members:
        stop.check()
        if (whole := member.whole()) is None:
            continue
        with clock.phase("report"):
            parts[member.name] = publish(
                folder / "saes" / member.name,
                whole,
                own[member.name],
                found[member.name],
                wired,
                state,
                records,
            )
    told = {
        name: (part.description, {title: str(path) for title, path in part.plots.items()})
        for name, part in parts.items()
    }
    reports = [
        MemberReport(name, description, results[name], {title: Path(path) for title, path in drawn.items()})
        for name, (description, drawn) in in_order(ranks.gather(told), record).items()
    ]
    several = len({(m["hook"], m["target"]) for m in record.config["members"].values()}) > 1
    points = in_order(ranks.gather(legends(state.members, several)), record)
    problems = [line for lines in ranks.gather(skipped_steps(state) + alike) for line in lines]
    if log is None:
        return
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
    if len(results) > 1:
        series: dict[str, dict[str, tuple[float, float]]] = {}
        for name, legend in points.items():
            point = (results[name].get("l0", math.nan), results[name].get("fvu", math.nan))
            series.setdefault(legend, {})[name] = point
        drawn["pareto"] = plots.pareto(series, folder / "plots" / "pareto.png")
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
            warnings=problems + warnings(config, state, wired),
            summary=summary,
            plots=drawn,
        ),
    )
    if config.logger.wandb:
        log.keep(artifacts(config, folder, list(results)))
    print_results(results)
    for name, spent, share in time_table(seconds):
        print(f"  {name:<18} {spent:8.1f} s  {share:6.1%}")
    print(f"  ({waited:.1f} s waiting for rows, shown as what was done meanwhile)")
    print(
        f"{state.tokens:,} tokens in {wall:,.0f} s ({state.tokens / wall:,.0f} tokens/s), "
        f"peak memory {rss_bytes / 2**30:.2f} GiB"
    )
    print(f"report: {report}")


def in_order(parts: list[dict[str, T]], record: RunRecord) -> dict[str, T]:
    """What processes said of their members, in the order of the run's."""
    said = {name: value for part in parts for name, value in part.items()}
    return {name: said[name] for name in record.config["members"] if name in said}


def legends(members: list[Member], several: bool) -> dict[str, str]:
    """name -> what it is drawn as: SAEs of one kind at one place are in a line."""
    found = {}
    for member in members:
        config = member.config.sae
        legend = f"{config.name}, {config.activation.name}, {member.sae.d_sae:,} latents"
        found[member.name] = legend + (f", {'+'.join(member.places.outputs)}" if several else "")
    return found


def timed(splice: Splice | None, clock: Clock) -> Splice | None:
    """The same measurement with its time counted as the model's: it is nearly all forward passes."""
    if splice is None:
        return None

    def measure(stand_ins: Sequence[StandIn], tokens: int) -> list[dict[str, float]]:
        with clock.phase("model forward"):
            return splice(stand_ins, tokens)

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
    member: WholeMember,
    numbers: dict[str, float],
    metrics: list[Metric],
    wired: Wired,
    state: TrainState,
    records: list[dict[str, Any]],
) -> MemberReport:
    """Write one member's publishable folder and return what the report says about it."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    sae = member.sae
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
    folder: Path, member: WholeMember, metrics: list[Metric], records: list[dict[str, Any]]
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
    terms = {key for record in records for key in record if key.startswith(f"{name}/loss/")}
    losses = [f"{name}/loss", *sorted(terms)]
    plots.curves(records, {key.removeprefix(f"{name}/"): key for key in losses}, drawn["loss"], "loss")
    plots.curves(records, {"lr": f"{name}/lr"}, drawn["lr"], "learning rate")
    for metric in metrics:
        if isinstance(metric, L0):
            drawn["l0"] = folder / "l0.png"
            plots.l0_distribution(metric.histogram, drawn["l0"])
    return drawn


def same_latents(member: WholeMember) -> list[str]:
    same, seen = twins(member.sae, member.stats.counts > 0)
    if same <= TWINS * seen:
        return []
    point = f"{same} point where another one does (cosine above {COSINE})"
    return [f"{member.name}: of {seen} latents that fire, {point}."]


def skipped_steps(state: TrainState) -> list[str]:
    return [
        f"{member.name}: {skipped} steps were left out, {int(member.spikes.spikes)} of them because "
        "their loss was a spike, the others because gradients were not finite."
        for member in state.members
        if member.split.lead and (skipped := int(member.skipped))
    ]


def warnings(config: Config, state: TrainState, wired: Wired) -> list[str]:
    """What a reader of the report should know before believing its numbers."""
    out = []
    if wired.splice is None:
        out.append(
            "Cross-entropy was not measured: there is no language model in this run, or eval.ce_tokens is 0."
        )
    if state.step < config.train.steps:
        out.append(
            f"The data ended at step {state.step} of {config.train.steps}; the learning rate did not reach 0."
        )
    return out
