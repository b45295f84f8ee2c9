"""What a run leaves for people: plots that show the data, tables that add up, a page nothing breaks into."""

import re
import shutil
import subprocess
import threading
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_train.report import plots
from sae_train.report.html import FeatureReport, MemberReport, ReportData, write_report
from sae_train.report.table import METRICS, about, complete, final_text, ordered, shown, time_table

NUMBERS = {
    "fvu": 0.1832,
    "fvu_all": 0.0123,
    "l0": 32.0,
    "dead": 0.012,
    "ce_clean": 3.2,
    "ce_sae": 3.4,
    "recovered_mean": 0.969,
}
RECORDS = [
    {
        "step": step,
        "tokens": 100 * step,
        "a/fvu": 1 / step,
        "a/lr": 1e-3,
        "a/loss": None if step == 3 else 1.0,
    }
    for step in range(1, 1500)
] + [{"step": 1500, "tokens": 150_000, "a/heldout/fvu": 0.1}]


def size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plots")
    fvu = {"train": "a/fvu", "held-out": "a/heldout/fvu"}
    return {
        "density": plots.density_histogram(torch.tensor([0.0, 1e-4, 0.02, 1.0]), folder / "density.png"),
        "fvu": plots.curves(RECORDS, fvu, folder / "fvu.png", "FVU"),
        "loss": plots.curves(RECORDS, ["a/loss"], folder / "loss.png", "loss", log_y=True),
        "lr": plots.lr_curve(RECORDS, folder / "lr.png", ["a/lr"]),
        "l0": plots.l0_distribution(torch.tensor([1, 5, 3]), folder / "l0.png"),
        "time": plots.time_share({"model forward": 3.0, "SAE step": 1.0}, folder / "time.png"),
        "shares": plots.share_histogram(torch.rand(64), ("a", "b"), folder / "shares.png"),
        "scatter": plots.density_vs_activation([0.0, 0.1, 0.2], [0.0, 1.0, 2.0], folder / "scatter.png"),
    }


def test_every_plot_is_a_png_wide_enough_for_a_readme(drawn: dict[str, Path]) -> None:
    for kind, path in drawn.items():
        assert size(path)[0] == 960, kind
        assert path.stat().st_size < 200_000, kind


AWKWARD = {
    "none fired": lambda path: plots.density_histogram([0.0, 0.0], path),
    "all always": lambda path: plots.density_histogram([1.0, 1.0], path),
    "no records": lambda path: plots.curves([], ["fvu"], path),
    "one record": lambda path: plots.curves([{"tokens": 5, "fvu": 1.0}], ["fvu"], path),
    "nothing positive": lambda path: plots.curves([{"tokens": 5, "fvu": 0.0}], ["fvu"], path, log_y=True),
    "no tokens": lambda path: plots.l0_distribution([0, 0, 0], path),
    "always the same": lambda path: plots.l0_distribution([0, 0, 7], path),
    "wide": lambda path: plots.l0_distribution(np.ones(5000), path),
    "no time": lambda path: plots.time_share({}, path),
    "no latents": lambda path: plots.share_histogram([], ("a", "b$"), path),
    "nothing fires": lambda path: plots.density_vs_activation([0.0], [0.0], path),
    "markup in names": lambda path: plots.curves(
        RECORDS, {"_a $\\frac{": "a/fvu", "b\x1b\n": "a/lr"}, path, "$x_{"
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", AWKWARD)
def test_plots_of_awkward_data_are_drawn_without_a_warning(case: str, tmp_path: Path) -> None:
    assert size(AWKWARD[case](tmp_path / "plot.png")) > (0, 0)


def test_a_long_record_is_thinned_to_means_of_all_its_points() -> None:
    tokens, values = np.arange(10_007.0), np.random.default_rng(0).normal(size=10_007)
    few_tokens, few = plots._thinned(tokens, values)
    assert len(few) == plots.MAX_POINTS
    weights = np.diff(np.append(np.linspace(0, 10_007, plots.MAX_POINTS, endpoint=False).astype(int), 10_007))
    # float64 sums of 1e4 terms of order 1: rounding below 1e4 * 2^-53 relative to their absolute sum
    assert (few * weights).sum() == pytest.approx(values.sum(), abs=1e4 * 2**-53 * np.abs(values).sum())
    assert (np.diff(few_tokens) > 0).all()


def test_shares_of_time_add_up_and_name_what_is_not_accounted_for() -> None:
    rows = time_table({"SAE step": 2.0, "model forward": 5.0}, wall_s=10.0)
    assert rows == [("model forward", 5.0, 0.5), ("unaccounted", 3.0, 0.3), ("SAE step", 2.0, 0.2)]
    assert time_table({"a": 1.0, "b": 3.0}) == [("b", 3.0, 0.75), ("a", 1.0, 0.25)]
    assert time_table({}) == []
    with pytest.raises(ValueError, match="do not fit"):
        time_table({"a": 11.0}, wall_s=10.0)


def test_the_increase_of_cross_entropy_follows_from_its_parts() -> None:
    assert complete(NUMBERS)["ce_increase"] == pytest.approx(0.2, abs=4 * 2**-53)
    assert "ce_increase" not in complete({"fvu": 0.1})


def test_numbers_of_hooks_and_of_a_second_model_stand_beside_the_first_ones() -> None:
    given = [
        "mine",
        "fvu_first/144",
        "other/kl_sae",
        "fvu/resid_post.1",
        "kl_sae",
        "other/mine",
        "fvu",
        "recovery/mcc",
    ]
    expected = [
        "fvu_first/144",
        "fvu/resid_post.1",
        "fvu",
        "other/kl_sae",
        "kl_sae",
        "recovery/mcc",
        "mine",
        "other/mine",
    ]
    assert ordered(given) == expected
    labels = {name: known.label for name in given if (known := about(name)) is not None}
    assert labels == {
        "other/kl_sae": "KL, second model",
        "fvu/resid_post.1": "FVU of resid_post.1",
        "fvu_first/144": "FVU of the first 144",
        "kl_sae": "KL",
        "fvu": "FVU",
        "recovery/mcc": "true features matched",
    }
    assert shown("other/dead", 0.5) == "50.0 %" and shown("mine", 0.5) == "0.5"


def test_the_plain_table_has_a_row_per_sae_and_no_control_characters() -> None:
    text = final_text({"narrow": NUMBERS, "wi\x1b[2Jde[red]": {"fvu": float("nan")}})
    assert [number for number in ("0.1832", "1.2 %", "0.200") if number not in text] == []
    (row,) = (line for line in text.splitlines() if r"wi\x1b[2Jde[red]" in line)
    assert "not finite" in row
    assert "\x1b" not in text


def data(drawn: dict[str, Path]) -> ReportData:
    feature = FeatureReport(7, 0.01, 2.0, [[("The", 0.0), (" President", 2.0), ("\n", 0.5)]])
    return ReportData(
        title="a run",
        run={"run": {"seed": 0}, "sae": {"activation": {"k": 32}}},
        members=[
            MemberReport(
                "narrow", "topk on layer 12", NUMBERS, {k: drawn[k] for k in ("lr", "fvu")}, [feature]
            ),
            MemberReport("wide", "topk on layer 13", {"fvu": 0.5, "own_metric": 0.25}, {"l0": drawn["l0"]}),
        ],
        time=time_table({"model forward": 3.0, "SAE step": 1.0}),
        filters={"seen": 1000, "kept": 900, "sink": 90, "own_rule": 10},
        command="sae-train train experiment=demo",
        versions={"torch": "2.13.0"},
        warnings=["the data ended early"],
        summary={"tokens": 204800, "tokens_per_s": 1003.4, "wall_s": 204.0, "peak_rss_bytes": 3 * 2**30},
        plots={"time": drawn["time"]},
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_everything_it_was_given(tmp_path: Path, drawn: dict[str, Path]) -> None:
    page = Page(write_report(tmp_path / "report.html", data(drawn)).read_text())
    told = [
        "a run",
        "narrow",
        "wide",
        "0.1832",
        "0.200",
        "0.969",
        "1.2 %",
        "204,800",
        "1,003",
        "3.4 min",
        "3.00 GiB",
    ]
    told += [
        "model forward",
        "75.0 %",
        "rows kept",
        "90.00 %",
        "own_rule",
        "own_metric",
        "0.25",
        "k: 32",
    ]
    told += [
        "sae-train train experiment=demo",
        "torch 2.13.0",
        "the data ended early",
        " President",
        METRICS["fvu"].meaning,
    ]
    assert [text for text in told if text not in page.text] == []
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(source.startswith("data:image/png;base64,iVBORw0KGgo") for source in images)


def test_the_page_is_self_contained_and_forbids_everything_else(
    tmp_path: Path, drawn: dict[str, Path]
) -> None:
    page = Page(write_report(tmp_path / "report.html", data(drawn)).read_text())
    policies = [
        attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    assert not [
        attrs for _, attrs in page.tags if "href" in attrs or any(name.startswith("on") for name in attrs)
    ]


def hostile(drawn: dict[str, Path], payload: str) -> ReportData:
    """A report with the payload in every string that a user, a corpus or a hub can put there."""
    clean = data(drawn)
    member = MemberReport(
        payload,
        payload,
        NUMBERS | {payload: 1.0},
        {payload: drawn["fvu"]},
        [FeatureReport(1, 0.1, 1.0, [[(payload, 1.0)]])],
    )
    return replace(
        clean,
        title=payload,
        run={payload: {payload: [payload, Path("a")]}},
        members=[member, member],
        time=[(payload, 1.0, 1.0)],
        filters={payload: 1},
        command=payload,
        versions={payload: payload},
        warnings=[payload],
        plots={payload: drawn["time"]},
    )


PAYLOADS = [
    "</script><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(1)>",
    "</title></style></pre><script>alert(1)</script>",
    "{{ 7 * 191 }}{% for x in y %}<!--",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_markup_in_any_string_stays_text(payload: str, tmp_path: Path, drawn: dict[str, Path]) -> None:
    want = Page(write_report(tmp_path / "harmless.html", hostile(drawn, "harmless")).read_text())
    got = Page(write_report(tmp_path / "report.html", hostile(drawn, payload)).read_text())
    assert [tag for tag, _ in got.tags] == [tag for tag, _ in want.tags]
    assert [set(attrs) for _, attrs in got.tags] == [set(attrs) for _, attrs in want.tags]
    # the configuration is YAML, which quotes keys and values of its own accord; the rest is verbatim
    assert got.text.count(payload) >= want.text.count("harmless") - 3 > 10
    assert "1337" not in got.text


def test_secrets_and_control_characters_do_not_reach_the_page(
    tmp_path: Path, drawn: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "canary-5f3e9a7b1c")
    text = write_report(
        tmp_path / "report.html", hostile(drawn, "x canary-5f3e9a7b1c \x1b[2J\u202e")
    ).read_text()
    assert "canary" not in text
    assert "***" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_a_missing_plot_is_an_error_and_leaves_the_old_page(tmp_path: Path, drawn: dict[str, Path]) -> None:
    path = write_report(tmp_path / "report.html", data(drawn))
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        write_report(path, replace(data(drawn), plots={"time": tmp_path / "gone.png"}))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is checked as text only")
def test_a_browser_runs_nothing_and_asks_for_nothing(tmp_path: Path, drawn: dict[str, Path]) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    run = f"document.title='owned';fetch('{here}/fetch')"
    payload = f"</title></script><img src='{here}/img' onerror=\"{run}\"><script>{run}</script>"
    path = write_report(tmp_path / "report.html", hostile(drawn, payload))
    trap = tmp_path / "trap.html"
    trap.write_text(f"<title>x</title><img src='{here}/trap'>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    assert CHROMIUM is not None
    try:
        page, control = (
            subprocess.run(
                [CHROMIUM, *flags, f"file://{file}"], capture_output=True, text=True, timeout=60
            ).stdout
            for file in (path, trap)
        )
    finally:
        server.shutdown()
        server.server_close()
    assert "<title>x</title>" in control and "/trap" in asked, (
        "the browser works and would have been seen asking"
    )
    assert "&lt;/title&gt;&lt;/script&gt;" in page
    assert "<title>owned" not in page
    assert "<script" not in page
    assert [path for path in asked if path in ("/img", "/fetch")] == []


def test_labels_of_numbers_that_lie_close_together_do_not_touch():
    close = [16.0, 15.9, 16.3, 31.7, 32.0, 32.6, 64.0, 62.8, 65.0]
    assert plots._apart(close) == [15.9, 31.7, 62.8]
    assert plots._apart([4.0]) == [4.0]
    assert plots._apart([1.0, 2.0, 4.0, 8.0]) == [1.0, 2.0, 4.0, 8.0]
