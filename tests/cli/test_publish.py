"""`sae-train publish`, as a user runs it, to a real server on this machine through the hub's own client."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from format_cases import write_slightly_wrong
from hub_server import TOKEN, HubServer, Repo

from sae_train.cli.main import main
from sae_train.hub import outcome
from sae_train.hub.fetch import fetch
from sae_train.sae.io import load_sae

TINY = [
    *("hook=resid_post.1", "corpus.context_length=16", "corpus.holdout=0.25", "source.shard_tokens=256"),
    *("source.lanes=2", "train.tokens=320", "train.batch_tokens=32", "eval.tokens=200", "eval.ce_tokens=64"),
    *("eval.every=0", "checkpoint.every=100", "run.threads=1", "sae.d_sae=48", "sae.activation.k=4"),
]
A, B = "resid_post.1/width_48/k_4", "resid_post.1/width_48/k_2"
OWN = {"config.json", "sae.safetensors", "features.safetensors", "metrics.json", "README.md"}
OWN |= {f"plots/{name}.png" for name in ("density", "scatter", "fvu", "loss", "lr", "l0")}
SAELENS = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "export.json"}
ROOT_FILES = {"README.md", "plots/pareto.png"}
REPO = "repo=me/saes"


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tiny_corpus_dir, tmp_path_factory) -> Path:
    """A finished run of two SAEs, for copies."""
    run = tmp_path_factory.mktemp("finished") / "run"
    names = [f"model.name={tiny_model_dir('llama')}", f"corpus.name={tiny_corpus_dir}", f"run.dir={run}"]
    assert main(["train", *names, *TINY, "saes={a: {}, b: {sae: {activation: {k: 2}}}}"]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    monkeypatch.setattr(outcome, "RETRY", outcome.Retry(attempts=4, initial_s=0.01, max_s=0.02))
    with HubServer() as server:
        server.connect(monkeypatch, tmp_path / "home")
        yield server


def tree(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = hub.repos["me/saes"].files(revision)
    assert files is not None
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def expected(*ids: str, forms: set[str] = frozenset(SAELENS)) -> set[str]:
    return {f"{folder}/{name}" for folder in ids for name in OWN | forms} | ROOT_FILES


def one_line(capsys: Any, code: int, args: list[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["publish", *args]) == code
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sae-train publish:")]
    for word in words:
        assert word in line, line
    return line


def test_a_run_is_published_in_one_commit_and_comes_back_as_it_was(hub, run, capsys):
    assert main(["publish", f"run={run}", REPO, "license=apache-2.0"]) == 0
    files, repo = tree(hub), hub.repos["me/saes"]
    assert files.keys() == expected(A, B)
    assert len(repo.commits) == 2 and hub.count("POST", "/commit/") == 1
    assert repo.private
    for name, folder in (("a", A), ("b", B)):
        for file in ("sae.safetensors", "features.safetensors", "metrics.json"):
            assert files[f"{folder}/{file}"] == (run / "saes" / name / file).read_bytes()
    out = capsys.readouterr().out
    assert repo.head() in out and "every file read back" in out
    trained_with = json.loads((run / "run.json").read_text())["versions"].get("commit")
    card = repo.files()["README.md"].decode()
    assert ("Trained with commit" in card) == (trained_with is not None) and (trained_with or "") in card
    # Every file was downloaded again, at the commit.
    read = {
        path.split(f"/resolve/{repo.head()}/")[1]
        for m, path, _ in hub.requests
        if m == "GET" and "/resolve/" in path
    }
    assert read == files.keys()
    x = torch.randn(7, 32)
    for name, folder in (("a", A), ("b", B)):
        ours, theirs = load_sae(run / "saes" / name), load_sae(fetch(f"hf://me/saes/{folder}@{repo.head()}"))
        assert torch.equal(ours(x), theirs(x))


def test_the_first_snippet_of_the_card_runs_as_it_stands(hub, run):
    assert main(["publish", f"run={run}", REPO]) == 0
    for path, folder in (("README.md", A), (f"{B}/README.md", B)):
        card = tree(hub)[path].decode()
        (code, *_) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        known: dict[str, Any] = {"x": torch.randn(5, 32)}
        exec(code, known)
        assert known["x_hat"].shape == (5, 32)
        name = "a" if folder == A else "b"
        assert torch.equal(known["x_hat"], load_sae(run / "saes" / name)(known["x"]))


def test_the_card_says_what_the_hub_and_a_reader_want_to_know(hub, run):
    from huggingface_hub import ModelCard

    more = ["license=mit", "base_model=me/llama", "datasets=[me/text]"]
    assert main(["publish", f"run={run}", REPO, *more]) == 0
    text = tree(hub)["README.md"].decode()
    data = ModelCard(text).data
    said = data.to_dict()
    assert (said["library_name"], said["license"], said["base_model"]) == ("saelens", "mit", "me/llama")
    assert data.datasets == ["me/text"]
    assert {"sparse-autoencoder", "sae", "mechanistic-interpretability", "saelens"} <= set(data.tags)
    metrics = json.loads((run / "saes/a/metrics.json").read_text())
    found = {r.metric_name: r.metric_value for r in data.eval_results}
    assert found[f"fraction of variance unexplained, {A}"] == pytest.approx(metrics["fvu"], abs=1e-6)
    assert found[f"L0, {B}"] == 2.0
    record = json.loads((run / "run.json").read_text())
    for part in (
        f"`{A}`",
        f"{metrics['fvu']:.4f}",
        "## Recipe",
        "d_sae: 48",
        "model.layers.1",
        "SAE.from_pretrained",
    ):
        assert part in text, part
    digest = hashlib.sha256(json.dumps(record["fingerprint"], sort_keys=True).encode()).hexdigest()
    assert digest[:16] in text
    config = json.loads(tree(hub)[f"{A}/config.json"])
    assert config["meta"]["model"] == "me/llama" and config["meta"]["fingerprint"]["model"] == "me/llama"
    assert json.loads(tree(hub)[f"{A}/cfg.json"])["metadata"]["model_name"] == "me/llama"


def test_nothing_published_names_a_folder_of_this_machine(
    hub, run, finished, tiny_model_dir, tiny_corpus_dir
):
    assert main(["publish", f"run={run}", REPO]) == 0
    hidden = [run, finished, tiny_model_dir("llama"), tiny_corpus_dir, Path.home(), Path.cwd()]
    for path, data in tree(hub).items():
        for folder in hidden:
            assert str(folder).encode() not in data, path
    assert json.loads(tree(hub)[f"{A}/config.json"])["meta"]["model"] == "local:llama"
    assert b"base_model" not in tree(hub)["README.md"]


def test_an_sae_trained_on_shards_knows_the_model_that_they_were_harvested_from(
    hub, tiny_model_dir, tiny_corpus_dir, tmp_path
):
    model, shards, run = tiny_model_dir("llama"), tmp_path / "shards", tmp_path / "run"
    names = [f"model.name={model}", f"corpus.name={tiny_corpus_dir}"]
    assert main(["harvest", *names, *TINY, f"out={shards}"]) == 0
    assert main(["train", *TINY, "source=shards", f"source.path={shards}", f"run.dir={run}"]) == 0
    meta = json.loads((run / "saes/main/config.json").read_text())["meta"]
    assert meta["model"] == str(model) and meta["context_length"] == 16 and meta["dtype"]
    assert meta["hooks"]["resid_post.1"]["module"] == "model.layers.1"
    assert main(["publish", f"run={run}", REPO]) == 0
    files = tree(hub)
    assert b"Model `local:llama`, revision `xxh3:" in files["README.md"]
    assert all(str(model).encode() not in data for data in files.values())
    assert main(["export", f"run={run}", "format=saelens", "model=me/llama", f"out={tmp_path / 'out'}"]) == 0
    told = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert told["model_name"] == "me/llama" and told["context_size"] == 16
    assert told["hf_hook_name"] == "model.layers.1"


def test_the_same_command_again_changes_nothing_and_compares_all_again(hub, run, capsys):
    args = ["publish", f"run={run}", REPO]
    assert main(args) == 0
    puts, gets = hub.count("PUT", "/_lfs/"), hub.count("GET", "/resolve/")
    assert main(args) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert len(hub.repos["me/saes"].commits) == 2
    assert hub.count("PUT", "/_lfs/") == puts and hub.count("GET", "/resolve/") == 2 * gets


@pytest.mark.parametrize(
    ("asked", "private"), [([], True), (["private=true"], True), (["private=false"], False)]
)
def test_a_repository_is_private_unless_it_is_said_to_be_for_all(hub, run, asked, private):
    assert main(["publish", f"run={run}", "sae=a", REPO, *asked]) == 0
    assert hub.repos["me/saes"].private == private
    assert tree(hub).keys() == expected(A)


@pytest.mark.parametrize("there", [True, False])
def test_a_repository_of_the_other_kind_receives_nothing(hub, run, capsys, there):
    hub.repos["me/saes"] = Repo(private=there)
    asked = "false" if there else "true"
    one_line(capsys, 2, [f"run={run}", REPO, f"private={asked}"], "private=", "settings page")
    assert tree(hub) == {} and hub.large == {}


def test_a_dry_run_lists_exactly_what_would_go_and_asks_nobody(hub, run, capsys, monkeypatch):
    (run / "saes/a/eval.json").write_text('{"fvu": 0.5}')
    (run / "saes/a/notes.txt").write_text("mine")
    monkeypatch.delenv("HF_TOKEN")
    assert main(["publish", f"run={run}", REPO, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert hub.requests == []
    listed = {
        m[2]: int(m[1].replace(",", "")) for m in re.finditer(r"^ +([\d,]+)  (\S+)$", out, re.MULTILINE)
    }
    assert "stays here: run/saes/a/notes.txt" in out and "private" in out
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["publish", f"run={run}", REPO]) == 0
    assert listed == {path: len(data) for path, data in tree(hub).items()}
    assert f"{A}/eval.json" in listed


def test_foreign_files_stay_here(hub, run, capsys):
    foreign = [".env", "notes.txt", "optimizer.pt", "plots/private.png", "deep/sae.safetensors"]
    for name in foreign:
        (run / "saes/a" / name).parent.mkdir(exist_ok=True)
        (run / "saes/a" / name).write_text("foreign")
    (run / "saes/a" / "link").symlink_to("/etc/passwd")
    assert main(["publish", f"run={run}", REPO]) == 0
    assert tree(hub).keys() == expected(A, B)
    out = capsys.readouterr().out
    for name in (*foreign, "link"):
        assert f"stays here: run/saes/a/{name}" in out, name


@pytest.mark.parametrize("name", ["eval.json", "sae.safetensors", "plots/density.png", "plots"])
def test_a_link_under_a_known_name_is_refused(hub, run, capsys, tmp_path, name):
    file = run / "saes/a" / name
    elsewhere = tmp_path / "elsewhere"
    if file.exists():
        shutil.move(file, elsewhere)
    else:
        elsewhere.write_text("{}")
    file.symlink_to(elsewhere)
    one_line(capsys, 2, [f"run={run}", REPO], "regular")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "secret"), [("eval.json", "hf_" + "s" * 34), ("metrics.json", "canary-0123456789")]
)
def test_a_secret_stops_everything_and_is_named_by_file_and_line(hub, run, capsys, monkeypatch, file, secret):
    monkeypatch.setenv("DB_PASSWORD", "canary-0123456789")
    (run / "saes/b" / file).write_text(json.dumps({"l0": 2.0, secret: 1.0}, indent=1))
    line = one_line(capsys, 2, [f"run={run}", REPO], f"{B}/{file} line 3")
    assert secret not in line
    assert hub.requests == []


def test_a_download_that_differs_is_found(hub, run, capsys):
    data = bytearray((run / "saes/b/sae.safetensors").read_bytes())
    data[-1] ^= 1
    hub.served[f"{B}/sae.safetensors"] = bytes(data)
    one_line(capsys, 75, [f"run={run}", REPO], f"{B}/sae.safetensors came back from the hub with other bytes")
    hub.served.clear()
    assert main(["publish", f"run={run}", REPO]) == 0
    assert len(hub.repos["me/saes"].commits) == 2


def test_a_download_that_is_cut_off_is_said_in_one_line(hub, run, capsys):
    hub.served[f"{B}/metrics.json"] = b"{}"
    one_line(capsys, 75, [f"run={run}", REPO], f"{B}/metrics.json")


def test_a_wrong_token_or_none_is_said_in_one_line(hub, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_wrong_wrong")
    line = one_line(capsys, 2, [f"run={run}", REPO], "HF_TOKEN", "a token that the hub accepts")
    assert "hf_wrong" not in line
    monkeypatch.delenv("HF_TOKEN")
    asked = len(hub.requests)
    one_line(capsys, 2, [f"run={run}", REPO], "HF_TOKEN", "hf auth login")
    assert len(hub.requests) == asked and hub.repos == {}


def test_somebody_elses_name_is_said_in_one_line(hub, run, capsys):
    one_line(capsys, 2, [f"run={run}", "repo=you/saes"], "you/saes", "may write to")


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("POST", "/repos/create"),
        ("GET", "/api/models/me/saes"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/_lfs/"),
        ("POST", "/_verify/"),
        ("POST", "/commit/"),
        ("HEAD", "/resolve/"),
        ("GET", "/resolve/"),
    ],
)
def test_a_server_that_fails_is_asked_again(hub, run, method, part):
    hub.failures.append((method, part, 500, 2))
    assert main(["publish", f"run={run}", "sae=a", REPO, "formats=[own]"]) == 0
    assert hub.failures == [] and tree(hub).keys() == expected(A, forms=set())
    assert len(hub.repos["me/saes"].commits) == 2


def test_a_server_that_goes_on_failing_ends_in_one_line_and_the_same_command_continues(hub, run, capsys):
    hub.failures.append(("POST", "/commit/", 503, 1000))
    args = [f"run={run}", REPO]
    one_line(capsys, 75, args, "uploading", "run the same command again")
    assert tree(hub) == {}
    hub.failures.clear()
    sent = hub.count("PUT", "/_lfs/")
    assert main(["publish", *args]) == 0
    assert hub.count("PUT", "/_lfs/") == sent, "large files were at the hub already"


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(hub, run):
    hub.failures.append(("COMMITTED", "me/saes", 502, 1))
    assert main(["publish", f"run={run}", REPO]) == 0
    assert len(hub.repos["me/saes"].commits) == 2 and hub.failures == []


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, run, capsys):
    hub.others.append({"theirs.txt": b"x"})
    one_line(capsys, 75, [f"run={run}", REPO], "somebody else committed")
    assert tree(hub) == {"theirs.txt": b"x"}


def test_files_of_others_are_deleted_only_when_asked(hub, run, capsys):
    hub.repos["me/saes"] = Repo(private=True)
    hub.repos["me/saes"].add({"theirs.txt": b"x", "old/sae.safetensors": b"y"})
    one_line(capsys, 2, [f"run={run}", REPO], "old/sae.safetensors, theirs.txt", "replace=true")
    assert hub.large == {}
    assert main(["publish", f"run={run}", REPO, "replace=true"]) == 0
    assert tree(hub).keys() == expected(A, B)
    assert ".gitattributes" in hub.repos["me/saes"].files()


def test_a_sweep_of_runs_shares_one_repository_and_each_sae_has_its_own_folder(hub, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for name in ("a", "b"):
        path = other / "saes" / name / "config.json"
        data = json.loads(path.read_text())
        data["meta"]["seed"] = 1
        path.write_text(json.dumps(data))
    assert main(["publish", f"run=[{run},{other}]", REPO, "formats=[own]"]) == 0
    ids = [f"{base}__seed_{seed}" for base in (A, B) for seed in (0, 1)]
    assert tree(hub).keys() == expected(*ids, forms=set())
    card = tree(hub)["README.md"].decode()
    assert all(card.count(f"`{name}`") >= 2 for name in ids)
    assert "library_name: sae-train" in card and "SAELens" not in card


def test_two_runs_that_differ_in_nothing_are_told_apart_by_their_folders(hub, run, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    args = ["publish", f"run=[{run},{tmp_path / 'again'}]", "sae=a", REPO, "formats=[own]"]
    assert main(args) == 0
    assert tree(hub).keys() == expected(f"{A}__run_run", f"{A}__run_again", forms=set())


def test_other_forms_have_folders_of_their_own_and_impossible_ones_are_refused(hub, run, capsys):
    assert main(["publish", f"run={run}", "sae=a", REPO, "formats=[own,saelens,sparsify]"]) == 0
    files = tree(hub)
    assert {f"{A}/sparsify/cfg.json", f"{A}/sparsify/sae.safetensors"} <= files.keys()
    assert f'SparseCoder.load_from_hub("me/saes", hookpoint="{A}/sparsify")' in files["README.md"].decode()
    assert json.loads(files[f"{A}/sparsify/cfg.json"])["k"] == 4
    one_line(capsys, 2, [f"run={run}", "repo=me/more", "formats=[gemma_scope]"], "formats", "thresholds")
    assert "me/more" not in hub.repos


def test_every_form_of_an_sae_arrives_with_the_proof_that_it_is_the_same(hub, run, capsys, monkeypatch):
    args = ["publish", f"run={run}", "sae=a", REPO, "formats=[own,saelens,merged]"]
    assert main(args) == 0
    files = tree(hub)
    for name, folder, halves in (("saelens", A, {"main"}), ("merged", f"{A}/merged", {"main", "sparsify"})):
        told = json.loads(files[f"{folder}/export.json"])
        assert (told["format"], told["dtype"], told["rows_from"]) == (name, "float32", "random")
        assert told["saes"].keys() == halves
        for proof in told["saes"].values():
            assert proof["holds"] and proof["rows"] == 256 and proof["active"] > 256
            assert proof["differing"] == 0 and max(proof["codes"], proof["reconstruction"]) < 1e-5
    assert "`export.json`" in files["README.md"].decode()
    write_slightly_wrong(monkeypatch)
    asked = len(hub.requests)
    one_line(capsys, 2, [f"run={run}", "repo=me/more"], "does the same as")
    assert len(hub.requests) == asked, "nobody is asked to take what is not the same"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["repo=../x"], ["repo="]),
        (["repo=saes"], ["repo=", "USER/NAME"]),
        (["repo=me/a--b"], ["repo="]),
        (["repo=me/saes/more"], ["repo="]),
        ([REPO, "formats=[own,nothing]"], ["formats=", "saelens"]),
        ([REPO, "formats=[]"], ["formats="]),
        ([REPO, "license='my own: terms'"], ["license="]),
        ([REPO, "base_model=./here"], ["base_model="]),
        ([REPO, "datasets=['a b']"], ["datasets="]),
        ([REPO, "sae=c"], ["sae=", "one of a, b"]),
        ([REPO, "privat=false"], ["privat", "private"]),
    ],
)
def test_wrong_input_is_one_line_and_asks_nobody(hub, run, capsys, args, words):
    one_line(capsys, 2, [f"run={run}", *args], *words)
    assert hub.requests == []


@pytest.mark.parametrize("damage", ["no run", "unfinished", "weights", "metrics", "nan"])
def test_a_run_that_cannot_be_published_is_refused_in_one_line(hub, run, capsys, damage):
    if damage == "no run":
        shutil.rmtree(run)
    elif damage == "unfinished":
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    elif damage == "metrics":
        (run / "saes/a/metrics.json").write_text('{"fvu": "low"}')
    else:
        file = run / "saes/a/sae.safetensors"
        data = bytearray(file.read_bytes())
        if damage == "nan":
            data[-4:] = b"\xff\xff\xff\x7f"
        file.write_bytes(data if damage == "nan" else data[:-1])
    one_line(capsys, 2, [f"run={run}", REPO, "formats=[own]"])
    assert hub.requests == []


@pytest.mark.timeout(600)  # two processes, each with its imports
def test_a_publication_killed_in_the_middle_of_an_upload_is_continued_by_the_same_command(run, tmp_path):
    weights = hashlib.sha256((run / "saes/b/sae.safetensors").read_bytes()).hexdigest()
    command = [sys.executable, "-m", "sae_train", "publish", f"run={run}", REPO, "formats=[own]"]
    with HubServer() as hub:
        known = os.environ | hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        hub.hold = weights
        process = subprocess.Popen(command, env=known, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not hub.held.wait(0.1):
                assert process.poll() is None, "it ended before its upload was held"
            deadline = time.monotonic() + 60
            while set(hub.large) != hub.announced - {weights} and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait(60)
        whole = set(hub.large)
        assert len(whole) > 5 and whole == hub.announced - {weights}
        assert tree(hub) == {}, "nothing is there before all of it is"
        hub.hold, hub.requests[:] = None, []
        done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert tree(hub).keys() == expected(A, B, forms=set())
        sent = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "PUT"}
        assert weights in sent and not sent & whole, "what had arrived is not sent again"
        assert len(hub.repos["me/saes"].commits) == 2
