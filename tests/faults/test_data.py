"""Text that is odd, damaged, gone for a while or changed: what a run does about it, end to end.

Rows D1 to D11 of the fault matrix. Outages are those of a real web server on this machine (`http_faults`);
what belongs to reading one file is in tests/unit/test_corpus.py and test_corpus_outages.py.
"""

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from sae_train.cli import language_model
from sae_train.cli.main import main
from sae_train.errors import InputError
from sae_train.harvest import corpus as corpus_module
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.retries import Retry
from sae_train.harvest.windows import WindowStream
from sae_train.stop import Interrupted

sys.path.insert(0, str(Path(__file__).parent))
from http_faults import FaultServer

RECIPE = [
    "hook=resid_post.1", "corpus.context_length=16", "corpus.holdout=0.25", "source.shard_tokens=256",
    "source.lanes=2", "sae.d_sae=48", "sae.activation.k=4", "train.batch_tokens=32", "eval.tokens=64",
    "eval.ce_tokens=0", "eval.every=0", "logger.every=5", "checkpoint.every=5", "run.threads=1",
    "corpus.shuffle_windows=8", "corpus.retry_wait_s=0.01",
]  # fmt: skip
QUICK = Retry(attempts=4, initial_s=0.01, max_s=0.02)


def words(count: int, seed: int) -> str:
    """That many words of the tiny tokenizer, some much commoner than others."""
    odds = 1.0 / torch.arange(1, 125)
    drawn = torch.multinomial(odds, count, replacement=True, generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{word}" for word in drawn.tolist())


TEXTS = [words(20 + i, i) for i in range(60)]
ENDLESS = ("train.tokens=64000",)
"""More than the text gives: the run ends, saved, where the text does, without evaluation and report."""


def jsonl(texts: list[Any], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=7)
    return buffer.getvalue()


def packed(name: str, texts: list[str]) -> bytes:
    """The texts in the format that a file name stands for."""
    if name.endswith(".parquet"):
        return parquet(texts)
    plain = jsonl(texts) if ".jsonl" in name else "".join(f"{text}\n" for text in texts).encode()
    return gzip.compress(plain, mtime=0) if name.endswith(".gz") else plain


@pytest.fixture
def train(
    tiny_model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str], no_pictures: None
) -> Callable[..., Any]:
    """Run `train` on a corpus; asserts the exit code, and that a failure is one line without a traceback."""

    def run(corpus: object, folder: Path, *overrides: str, code: int = 0, says: tuple[str, ...] = ()) -> str:
        capsys.readouterr()  # what other runs of the test said
        args = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={corpus}", *RECIPE]
        got = main(["train", *args, f"run.dir={folder}", *overrides])
        err = capsys.readouterr().err
        assert got == code, (got, err)
        assert "Traceback" not in err
        if code:
            lines = [line for line in err.splitlines() if line.startswith("sae-train train: ")]
            assert len(lines) == 1, err
            assert all(word in lines[0] for word in says), (says, lines[0])
            return lines[0]
        return err

    return run


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def assert_same_end(one: Path, two: Path) -> None:
    """The same last checkpoint, bit for bit: weights, moments, statistics, generators and the ledger of every
    row that was trained on, in its order."""
    assert steps_saved(one)[-1] == steps_saved(two)[-1] > 0
    last = f"checkpoints/step-{steps_saved(one)[-1]:08d}"
    rest = [json.loads((run / last / "state.json").read_text()) for run in (one, two)]
    assert rest[0].keys() == rest[1].keys() >= {"rng", "source", "members"}
    for name in rest[0].keys() - {"extra"}:  # clock and log: they do tell of an outage
        assert rest[0][name] == rest[1][name], name
    a, b = (load_file(run / last / "state.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and any("ledger" in name for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# -- D1, D2: nothing, or hardly anything, to train on ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("blank.jsonl", jsonl(["", "  ", "\n"]), "all 3 documents are empty"),
        ("blank.txt", b" \n\n \n", "documents are empty"),
        ("none.jsonl", b"\n\n", "documents are empty"),
        ("none.parquet", parquet([]), "corpus.name"),
        ("special.jsonl", jsonl(["<eos> " * i for i in range(1, 40)]), "special tokens"),
        ("one.jsonl", jsonl(["w1"]), "training windows of 16 tokens"),
        ("short.jsonl", jsonl(["w1 w2", "w3", "w4 w5 w6", "w7"]), "training windows of 16 tokens"),
    ],
)
def test_a_corpus_without_enough_text_is_refused_before_weights_load_and_never_a_run_of_no_steps(
    train, tmp_path, monkeypatch, name, content, says
):
    monkeypatch.setattr(language_model, "load_model", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / name).write_bytes(content)
    run = tmp_path / "run"
    train(tmp_path / name, run, "train.tokens=64", code=2, says=(says,))
    assert not (run / "saes").exists() and not (run / "summary.json").exists()


def test_a_share_that_holds_out_every_document_is_refused(train, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:4]))
    args = ("train.tokens=64", "corpus.holdout=0.999999")
    train(tmp_path / "a.jsonl", tmp_path / "run", *args, code=2, says=("corpus.holdout", "4 documents"))


def test_documents_of_a_single_word_train(train, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"w{i % 124}" for i in range(1500)]))
    train(tmp_path / "a.jsonl", tmp_path / "run", *ENDLESS, code=2, says=("train.tokens",))
    assert steps_saved(tmp_path / "run")[-1] >= 20


# -- D3, D4: odd text --------------------------------------------------------------------------------

ODD = [
    b'{"text": "\xef\xbb\xbfw1 bom w2"}',
    b'{"text": "w3 \xff\xfe\xfa w4"}',
    rb'{"text": "w5 \ud800 w6 \udfff"}',
    rb'{"text": "w7 nul\u0000 w8"}',
    '{"text": "w9 שלום עולم عربي \u202e w10"}'.encode(),
    b'{"text": "w11 \\u001b[31m w12"}',
]


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt"])
def test_odd_characters_are_kept_or_replaced_and_the_run_goes_on(train, tmp_path, ending):
    lines = b"\xef\xbb\xbf" + b"\n".join([*ODD, *jsonl(TEXTS).splitlines()]) + b"\n"
    (tmp_path / f"a.{ending}").write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
    train(
        tmp_path / f"a.{ending}",
        tmp_path / "run",
        *(*ENDLESS, "corpus.documents=line"),
        code=2,
        says=("train.tokens",),
    )
    assert steps_saved(tmp_path / "run")[-1] >= 20


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz"])
def test_packed_text_is_decoded_by_the_rules_of_plain_text(tmp_path, ending):
    from bz2 import compress as bz2
    from lzma import compress as xz

    text = b"\xef\xbb\xbfbom \xff\xfe bad\x00nul\r\nline\r\n" + "שלום".encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / f"b.txt.{ending}").write_bytes({"gz": gzip.compress, "bz2": bz2, "xz": xz}[ending](text))
    read = [
        Documents(CorpusConfig(name=str(tmp_path / name), holdout=0.0))
        for name in ("a.txt", f"b.txt.{ending}")
    ]
    assert [document.text for document in read[0]] == [document.text for document in read[1]]
    assert read[0].counts == read[1].counts
    assert read[1].counts["replaced_characters"] == 2


def model_with_regex(source: Path, target: Path) -> Path:
    """The tiny model with a tokenizer that panics on a long run of one letter: its regular expression engine
    gives up after too many retries."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    tree = json.loads(path.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, pattern]}
    path.write_text(json.dumps(tree))
    return target


def test_a_document_on_which_the_tokenizer_panics_is_left_out_of_the_run_and_said(
    train, tmp_path, tiny_model_dir
):
    model = model_with_regex(tiny_model_dir("llama"), tmp_path / "model")
    for name, texts in (("with", [*TEXTS[:30], "a" * 5000 + "b", *TEXTS[30:]]), ("without", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(texts))
        args = (*ENDLESS, f"model.name={model}")
        train(tmp_path / f"{name}.jsonl", tmp_path / name, *args, code=2, says=("train.tokens",))
    log = (tmp_path / "with/train.log").read_text()
    assert "skipped document 30 of" in log and "the tokenizer failed on it" in log
    assert_same_end(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Interrupted, MemoryError])
def test_what_ends_a_process_is_not_taken_for_a_tokenizers_panic(
    tmp_path, tiny_tokenizer, monkeypatch, error
):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    config = CorpusConfig(name=str(tmp_path / "a.jsonl"), holdout=0.0, context_length=16)
    stream = WindowStream(Documents(config), tiny_tokenizer, config)

    class Backend:
        def encode_batch_fast(self, *_: object, **__: object) -> None:
            raise error

    monkeypatch.setattr(stream, "_backend", Backend)
    with pytest.raises(error):
        stream.take(1)
    assert stream.counts["skipped_documents"] == 0


LONG = """
import resource, sys, time
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.windows import WindowStream

backend = Tokenizer(models.BPE())
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
texts = ["the cat sat on the mat " * 20, "^^^^ ^^^^^^^^ ^^" * 20]
backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

def drain(name):
    config = CorpusConfig(name=name, holdout=0.0, context_length=64, shuffle_windows=1)
    stream = WindowStream(Documents(config), tokenizer, config)
    while stream.take(512) is not None:
        pass
    return stream.counts["tokens"]

drain(sys.argv[1])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
tokens = drain(sys.argv[2])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(tokens, grown // 1024, round(time.perf_counter() - start, 2))
"""


def test_documents_of_a_million_characters_take_bounded_time_and_memory(tmp_path):
    (tmp_path / "small.jsonl").write_bytes(jsonl(["the cat sat"] * 10))
    # With and without white space to cut at, and one that looks for a worst case of a merge.
    long = ["the cat sat " * 90_000, "^" * 10**6, "^" * 999_999 + " x", "ab" * 500_000]
    (tmp_path / "long.jsonl").write_bytes(jsonl(long))
    command = [sys.executable, "-c", LONG, str(tmp_path / "small.jsonl"), str(tmp_path / "long.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, grown_mb, seconds = (float(field) for field in done.stdout.split())
    assert tokens > 200_000
    assert grown_mb < 300, grown_mb  # above what importing took; measured 0
    assert seconds < 60, seconds


def test_a_corpus_of_many_copies_is_warned_of_once_and_one_of_few_is_not(tmp_path, caplog, monkeypatch):
    for texts, warned in ((TEXTS + TEXTS[:3], 0), (TEXTS + TEXTS[:20], 1), ([TEXTS[0]] * 40, 1)):
        caplog.clear()
        (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
        config = CorpusConfig(name=str(tmp_path / "a.jsonl"), holdout=0.0, epochs=3)
        assert len(list(Documents(config))) == 3 * len(texts)
        assert caplog.text.count("exact copies") == warned, texts[0]
    assert "39 of the first 40 training documents are exact copies of others" in caplog.text
    monkeypatch.setattr(corpus_module, "REPEATS_SAMPLE", 10)
    caplog.clear()
    list(Documents(config))
    assert "9 of the first 10" in caplog.text and caplog.text.count("exact copies") == 1


# -- D5, D6: the text goes away ----------------------------------------------------------------------


def read(url: str, retry: Retry = QUICK, timeout_s: float = 0.3, **config: Any) -> list[str]:
    settings = {"holdout": 0.0, "documents": "line", "timeout_s": timeout_s} | config
    return [document.text for document in Documents(CorpusConfig(name=url, **settings), retry=retry)]


@pytest.mark.parametrize("name", ["x.jsonl?v=1*", "x.txt.gz", "x.parquet"])
@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "refuse", "cut:0", "cut:100", "stall", "short", "long"]
)
def test_a_server_that_fails_once_at_any_request_gives_the_same_rows_and_the_failure_is_logged(
    name, fault, caplog
):
    with FaultServer({name: packed(name.partition("?")[0], TEXTS)}) as server:
        assert read(server.url(name)) == TEXTS
        clean = server.gets()
        for place in range(clean):
            server.requests.clear()
            caplog.clear()
            server.plan[:] = ["well"] * place + [fault]
            assert read(server.url(name)) == TEXTS, place
            assert server.faults() == [fault]
            # The first request asks what there is; the head of the answer says it, whatever follows.
            harmless = fault == "long" or (place == 0 and fault in ("cut:0", "cut:100", "short"))
            assert (server.gets() == clean) if harmless else (server.gets() == clean + 1), place
            logged = re.findall(r"(opening|reading) http\S* failed \(attempt 1 of 4\)", caplog.text)
            assert len(logged) == (0 if harmless else 1), place


def test_every_second_block_of_a_long_file_may_fail_and_only_that_block_is_asked_for_again(caplog):
    texts = [f"{i} " + "x" * 11_000 for i in range(1200)]
    with FaultServer({"long.jsonl": jsonl(texts)}) as server:
        assert read(server.url("long.jsonl"), timeout_s=5) == texts
        clean = server.gets()
        assert clean >= 4, "the file is no longer read in several blocks"
        server.requests.clear()
        server.plan[:] = ["503", "well", "cut:1000", "well", "refuse", "well"] * clean
        assert read(server.url("long.jsonl"), timeout_s=5) == texts
        assert len(server.faults()) == clean and server.gets() == 2 * clean


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_url_that_a_server_refuses_is_the_users_error_at_once(train, tmp_path, monkeypatch, code):
    monkeypatch.setattr(language_model, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with FaultServer({"x.jsonl": jsonl(TEXTS)}) as server:
        server.always = str(code)
        train(server.url("x.jsonl"), tmp_path / "run", code=2, says=("corpus.name", f"answers {code}"))
        assert server.gets() == 1


def test_an_empty_file_on_a_server_is_the_users_error():
    with (
        FaultServer({"x.jsonl": b""}) as server,
        pytest.raises(InputError, match="this one is empty"),
    ):
        read(server.url("x.jsonl"))


def test_a_server_that_gives_no_parts_of_files_is_named_with_what_to_do():
    with (
        FaultServer({"x.jsonl": jsonl(TEXTS)}, ranges=False) as server,
        pytest.raises(InputError, match="download it and name the local file"),
    ):
        read(server.url("x.jsonl"))


def test_a_damaged_file_on_a_server_is_named_and_not_asked_for_again():
    whole = packed("x.txt.gz", TEXTS)
    with FaultServer({"x.txt.gz": whole[:-20], "x.txt": "wide".encode("utf-16") * 40}) as server:
        with pytest.raises(InputError, match=r"corpus.name=.*well-formed text data"):
            read(server.url("x.txt.gz"))
        gets = server.gets()
        with pytest.raises(InputError, match="byte-order mark of UTF-16"):
            read(server.url("x.txt"))
        assert gets <= 6 and server.gets() - gets <= 3


SHORT = TEXTS[:16]
PASSES = (*ENDLESS, "corpus.epochs=20")
"""The file is opened, and asked for, anew for each pass."""
LATE = 8
"""Requests before the last: training is under way then."""


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, int]]:
    """File name -> a whole run on that file from a server that never fails, and how many requests it took."""
    done: dict[str, tuple[Path, int]] = {}

    def run(name: str) -> tuple[Path, int]:
        if name not in done:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            args = [f"model.name={tiny_model_dir('llama')}", *RECIPE, *PASSES, f"run.dir={folder}"]
            with FaultServer({name: packed(name, SHORT)}) as server:
                assert main(["train", f"corpus.name={server.url(name)}", *args]) == 2
                done[name] = folder, server.gets()
        return done[name]

    return run


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_run_survives_a_short_outage_with_the_same_rows_and_says_how_often_it_tried(
    train, tmp_path, undisturbed, name
):
    whole, gets = undisturbed(name)
    with FaultServer({name: packed(name, SHORT)}) as server:
        # At the edge of two passes, where the file is opened again.
        server.plan += ["well"] * (gets - LATE) + ["503", "refuse", "cut:10", "stall"]
        train(
            server.url(name),
            tmp_path / "run",
            *(*PASSES, "corpus.timeout_s=0.3"),
            code=2,
            says=("train.tokens",),
        )
        assert server.faults() == ["503", "refuse", "cut:10", "stall"]
    log = (tmp_path / "run/train.log").read_text()
    for attempt in (1, 2, 3, 4):
        assert log.count(f"failed (attempt {attempt} of 5)") == 1
    assert_same_end(tmp_path / "run", whole)


def test_a_long_outage_is_saved_and_retryable_and_the_run_ends_with_the_same_bits(
    train, tmp_path, undisturbed
):
    run, (whole, gets) = tmp_path / "run", undisturbed("x.jsonl")
    with FaultServer({"x.jsonl": packed("x.jsonl", SHORT)}) as server:
        again = (*PASSES, "corpus.attempts=3")
        server.plan += ["well"] * (gets - LATE) + ["503"] * 1000
        says = ("corpus.name", "could not be read in 3 attempts", "503")
        train(server.url("x.jsonl"), run, *again, code=75, says=says)
        saved = steps_saved(run)
        assert 0 < saved[-1] < steps_saved(whole)[-1]
        # Still away: nothing is lost by trying.
        server.plan.clear()
        server.always = "refuse"
        train(server.url("x.jsonl"), run, *again, code=75, says=("3 attempts", "when opening it"))
        assert steps_saved(run) == saved
        # Back, and away a second time. A resumed run reads its block of documents, five passes, again.
        server.always = None
        server.plan += ["well"] * (gets - 20 + 13) + ["cut:10"] * 1000
        train(server.url("x.jsonl"), run, *again, code=75, says=("3 attempts", "at byte"))
        assert steps_saved(run)[-1] > saved[-1]
        server.plan.clear()
        train(server.url("x.jsonl"), run, *again, code=2, says=("train.tokens",))
    assert_same_end(run, whole)
    continued = re.findall(r"continuing from step (\d+) of", (run / "train.log").read_text())
    assert len(continued) == 2 and all(int(step) > 0 for step in continued)


def test_waiting_for_a_server_ends_when_the_process_is_asked_to_stop(monkeypatch):
    from sae_train import stop

    with FaultServer({"x.jsonl": jsonl(TEXTS)}) as server:
        server.always = "503"
        stop.request("asked to")
        try:
            with pytest.raises(Interrupted):
                read(server.url("x.jsonl"), Retry(attempts=5, initial_s=3600.0, max_s=3600.0))
        finally:
            stop.clear()
        assert server.gets() == 1


def test_a_corpus_that_is_away_from_the_start_is_retryable_and_leaves_nothing_behind(train, tmp_path):
    with FaultServer({"x.jsonl": jsonl(TEXTS)}) as server:
        server.always = "503"
        train(server.url("x.jsonl"), tmp_path / "run", "corpus.attempts=2", code=75, says=("2 attempts",))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("wrong", ["corpus.attempts=0", "corpus.retry_wait_s=0", "corpus.timeout_s=-1"])
def test_settings_of_retries_that_cannot_work_are_refused(train, tmp_path, wrong):
    train(tmp_path / "x.jsonl", tmp_path / "run", wrong, code=2, says=(wrong.partition("=")[0],))


# -- D7, D8: rows that hold no text ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": 5}, "a number"),
        ({"body": "w1"}, "one of the columns body"),
    ],
)
def test_a_later_row_without_text_ends_the_run_by_name_and_what_was_trained_is_saved(
    train, tmp_path, row, says
):
    rows = [{"text": words(20, i)} for i in range(700)]
    rows[600] = row
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = train(
        tmp_path / "a.jsonl", tmp_path / "run", *ENDLESS, code=2, says=("text_column", "row 601", says)
    )
    assert "corpus.text_column='text'" in line
    assert steps_saved(tmp_path / "run")[-1] > 0


def test_token_ids_in_place_of_text_are_refused_before_weights_load(train, tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "load_model", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "a.jsonl").write_bytes(jsonl([[1, 2, 900]] * 50, column="input_ids"))
    column = "corpus.text_column=input_ids"
    train(tmp_path / "a.jsonl", tmp_path / "run", column, code=2, says=("input_ids", "a list ([1, 2, 900])"))
    train(tmp_path / "a.jsonl", tmp_path / "run", code=2, says=("text_column", "input_ids"))


# -- D9: something else than when the run was started ------------------------------------------------


@pytest.mark.parametrize(
    ("tells", "change"),
    [
        ({"ETag", "Last-Modified"}, "byte"),
        ({"Last-Modified"}, "date"),
        (set(), "length"),
    ],
)
def test_a_file_that_changed_on_its_server_is_not_continued_with(train, tmp_path, tells, change):
    run, data = tmp_path / "run", jsonl(TEXTS)
    with FaultServer({"x.jsonl": data}) as server:
        server.tells = tells | {"Content-Length"}
        train(server.url("x.jsonl"), run, *ENDLESS, code=2, says=("train.tokens",))
        saved = steps_saved(run)
        if change == "byte":
            server.files["x.jsonl"] = data.replace(b"w1 ", b"w2 ", 1)
        elif change == "date":
            server.modified = "Tue, 06 Jan 2026 10:00:00 GMT"
        else:
            server.files["x.jsonl"] = data + jsonl(["w1"])
        train(server.url("x.jsonl"), run, *ENDLESS, code=2, says=("corpus.0.file", "changed"))
        assert steps_saved(run) == saved


def test_a_file_of_the_same_length_on_a_server_that_tells_nothing_else_is_not_noticed(train, tmp_path):
    """The limit of the promise, as `web` states it."""
    run, data = tmp_path / "run", jsonl(TEXTS)
    with FaultServer({"x.jsonl": data}) as server:
        server.tells = {"Content-Length"}
        train(server.url("x.jsonl"), run, *ENDLESS, code=2, says=("train.tokens",))
        server.files["x.jsonl"] = data.replace(b"w1 ", b"w2 ", 1)
        train(server.url("x.jsonl"), run, *ENDLESS, "corpus.epochs=9", code=2, says=("train.tokens",))


def test_a_file_that_is_replaced_while_it_is_read_ends_the_run_by_name(train, tmp_path, undisturbed):
    run, (_, gets) = tmp_path / "run", undisturbed("x.jsonl")
    for replacement in (jsonl(SHORT[::-1]), jsonl(SHORT[:5])):
        with FaultServer({"x.jsonl": jsonl(SHORT)}) as server:
            server.swapped["x.jsonl"] = replacement
            server.plan += ["well"] * (gets - LATE) + ["swap"]
            says = ("corpus.name", "the file that was opened", "it is now")
            train(server.url("x.jsonl"), run / str(len(replacement)), *PASSES, code=2, says=says)
        assert steps_saved(run / str(len(replacement)))[-1] > 0


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) >= 1 and len(old) == len(new)
    path.write_text(text.replace(old, new, 1))


def test_one_byte_of_model_tokenizer_or_text_changed_between_two_legs_is_refused_by_name(
    train, tmp_path, tiny_model_dir
):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model_dir("llama"), model)
    text = tmp_path / "a.jsonl"
    text.write_bytes(jsonl(TEXTS))
    code = model / "modeling_own.py"
    code.write_text("WIDTH = 1\n")
    args = (*ENDLESS, f"model.name={model}")
    train(text, run, *args, code=2, says=("train.tokens",))
    saved = steps_saved(run)
    edits: list[tuple[Path, str, Callable[[Path], None]]] = [
        (model / "model.safetensors", "model_revision", flip_last_bit),
        (model / "config.json", "model_revision", lambda p: replace_once(p, "1e-06", "1e-05")),
        (code, "model_revision", lambda p: replace_once(p, "1", "2")),
        (model / "tokenizer.json", "tokenizer", lambda p: replace_once(p, '"w17"', '"v17"')),
        (text, "corpus.0.files", lambda p: replace_once(p, "w1 ", "w2 ")),
    ]
    for path, part, edit in edits:
        before = path.read_bytes()
        edit(path)
        assert path.read_bytes() != before
        train(text, run, *args, code=2, says=(f"{part}=", "changed"))
        path.write_bytes(before)
        assert steps_saved(run) == saved
    train(text, run, *args, "corpus.epochs=2", code=2, says=("train.tokens",))
    assert steps_saved(run)[-1] > saved[-1], "with everything as it was, the run goes on"


def test_an_edit_in_the_middle_of_large_weights_is_noticed_up_to_the_size_that_is_read_whole(
    tmp_path, monkeypatch
):
    from sae_train.harvest import provenance

    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    whole = provenance.local_revision(str(tmp_path))
    monkeypatch.setattr(provenance, "WHOLE_BYTES", 1 << 20)
    sampled = provenance.local_revision(str(tmp_path))
    with weights.open("r+b") as file:
        file.seek(3 << 19)
        file.write(b"\1")
    assert provenance.local_revision(str(tmp_path)) == sampled  # the limit that the module states
    monkeypatch.undo()
    assert provenance.local_revision(str(tmp_path)) != whole


# -- D10, D11: sizes that do not divide, text that ends early ----------------------------------------


@pytest.mark.parametrize("sizes", [(100, 32, 7), (96, 640, 5)])
def test_every_row_is_trained_on_or_counted_whatever_divides_what(train, tmp_path, sizes):
    shard, batch, length = sizes
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    run = tmp_path / "run"
    args = (f"source.shard_tokens={shard}", f"train.batch_tokens={batch}", f"corpus.context_length={length}")
    err = train(tmp_path / "a.jsonl", run, *args, "train.tokens=64000", "corpus.allow_short=true")
    summary = json.loads((run / "summary.json").read_text())
    rows, trained = summary["rows"], summary["tokens"]
    dropped = sum(rows.get(rule, 0) for rule in ("padding", "special", "nonfinite", "sink"))
    assert rows["seen"] == rows["kept"] + dropped
    assert trained == rows["kept"] - rows["unaligned"] - rows["tail"] == batch * summary["steps"]
    assert rows["tail"] < batch
    # D11: the end of the data is said on the terminal, in the record and in the report.
    assert f"the data ended at step {summary['steps']} of" in err
    assert json.loads((run / "run.json").read_text())["step"] == summary["steps"]
    assert f"The data ended at step {summary['steps']} of" in (run / "report.html").read_text()


def test_a_batch_larger_than_all_the_data_is_refused_with_the_number_of_rows(train, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    args = ("train.batch_tokens=64000", "train.tokens=64000", "corpus.allow_short=true")
    line = train(tmp_path / "a.jsonl", tmp_path / "run", *args, code=2, says=("train.batch_tokens", "kept"))
    assert re.search(r"after \d+ usable ones", line)
