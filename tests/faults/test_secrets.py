"""Secrets of the environment reach nothing that a run writes or prints: every byte is looked through.

The canaries stand where secrets do, in variables of the process. A value that holds one is refused before
anything is written, since a configuration is saved, published and shown as it is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from faults.tools import SMALL
from safetensors.torch import save_file

from sae_train.activations.topk import TopKConfig
from sae_train.cli.main import main
from sae_train.errors import InputError
from sae_train.redact import MASK, redact, refuse_secrets, secrets
from sae_train.report.card import write_card
from sae_train.sae.io import save_sae
from sae_train.sae.linear import LinearConfig, LinearSAE

MARK = "cAnArY"
CANARIES = {
    "HF_TOKEN": f"hf_{MARK}0a1b2c3d4e5f6071829",
    "WANDB_API_KEY": f"{MARK}7f".ljust(40, "e"),
    "MY_SECRET_NUMBER": f"{MARK}-9182736455",
    "DB_PASSWORD": f"{MARK}/p@ss 'w\"ord\\",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}+abc/def=ghi0123456789",
    "GOOGLE_CREDENTIALS": json.dumps({"key": f"{MARK}zzzz"}),
}


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    save_file({"activations": torch.randn(2000, 12, generator=generator)}, tmp_path / "rows.safetensors")
    return ["source=tensors", f"source.paths=[{tmp_path / 'rows.safetensors'}]", *SMALL]


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)


def run(folder: Path, *args: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`sae-train args...` in a process with the canaries; its home, caches and work are in the folder."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **CANARIES,
    }
    begin = f"import sys\n{code}\nfrom sae_train.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", begin, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


def found_in(folder: Path, *texts: str) -> list[str]:
    """Where a canary is: names of files, their content, and the given texts."""
    mark = MARK.encode()
    places = [str(path) for path in folder.rglob("*") if MARK in path.name]
    places += [str(path) for path in folder.rglob("*") if path.is_file() and mark in path.read_bytes()]
    return places + [text for text in texts if MARK in text]


def test_a_run_with_every_logger_writes_no_secret_anywhere(tmp_path: Path, rows: list[str]) -> None:
    loggers = ["logger.every=1", "logger.wandb=true", "logger.tensorboard=true"]
    done = run(tmp_path, "train", *rows, *loggers, "run.dir=run")
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    for wanted in (
        "run/report.html",
        "run/run.json",
        "run/config.yaml",
        "run/train.log",
        "run/metrics.jsonl",
    ):
        assert wanted in written
    for part in (
        "run/wandb/offline-run-",
        "run/tensorboard/events",
        "run/checkpoints/step-",
        "run/saes/main/",
    ):
        assert any(name.startswith(part) for name in written), part
    assert found_in(tmp_path, done.stdout, done.stderr) == []
    (tmp_path / "planted").write_text(CANARIES["HF_TOKEN"])
    assert found_in(tmp_path) == [str(tmp_path / "planted")], "a canary would be found"


CRASH = """
from sae_train.train.trainer import Trainer
def fit(*args):
    import os
    token = os.environ["HF_TOKEN"]
    raise KeyError("https://user:" + token + "@hub/x")
Trainer.fit = fit
"""


def test_a_run_that_dies_of_an_error_nobody_expected_shows_no_secret(tmp_path: Path, rows: list[str]) -> None:
    """Its traceback is shown, for whoever mends it; what it holds is not."""
    done = run(tmp_path, "train", *rows, "logger.wandb=true", "run.dir=run", code=CRASH)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and f"https://user:{MASK}@hub/x" in done.stderr
    assert found_in(tmp_path, *done.stdout.splitlines(), *done.stderr.splitlines()) == []


@pytest.mark.parametrize("variable", ["HF_TOKEN", "DB_PASSWORD"])
@pytest.mark.parametrize(
    "override",
    [
        "corpus.name={url}",
        "model.name={json}",
        "corpus.sources=[{{name: {json}}}]",
        "run.dir={json}",
        "logger.wandb_project={json}",
        "hook={json}",
        "saes={{a: {{hook: {json}}}}}",
        "train.tokens={json}",
        "train.tokenz={json}",
        "corpus.name=${{oc.env:{name}}}",
        "{json}",
    ],
)
@pytest.mark.usefixtures("canaries")
def test_a_value_that_holds_a_secret_is_refused_before_anything_is_written(
    tmp_path: Path,
    rows: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    variable: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    value = CANARIES[variable]
    url = f"https://user:{quote(value, safe='')}@localhost/x.jsonl"
    text = override.format(url=json.dumps(url), json=json.dumps(value), name=variable)
    assert main(["train", *rows, "run.dir=run", text]) == 2
    told = capfd.readouterr()
    assert "Traceback" not in told.err
    assert found_in(tmp_path, told.out, told.err) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("canaries")
def test_the_refusal_names_the_key_and_the_variable(
    tmp_path: Path, rows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"https://user:{CANARIES['HF_TOKEN']}@localhost/x.jsonl"
    assert main(["train", *rows, f"run.dir={tmp_path / 'run'}", f"corpus.name='{url}'"]) == 2
    line = capsys.readouterr().err
    assert "corpus.name='https://user:***@localhost/x.jsonl'" in line and "HF_TOKEN" in line


@pytest.mark.usefixtures("canaries", "no_pictures")
def test_damaged_checkpoints_are_told_of_without_secrets(
    tmp_path: Path, rows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their manifests may hold what the environment of this machine calls a secret."""
    args = ["train", *rows, f"run.dir={tmp_path / 'run'}"]
    assert main(args) == 0
    record = tmp_path / "run/run.json"
    record.write_text(record.read_text().replace('"status": "done"', '"status": "stopped"'))
    for step in (tmp_path / "run/checkpoints").iterdir():
        (step / CANARIES["MY_SECRET_NUMBER"]).write_text("x")
    assert main(args) == 2
    told = capsys.readouterr()
    assert "is not in the manifest" in told.err or "damaged" in told.err
    log = (tmp_path / "run/train.log").read_text()
    assert MARK not in told.out + told.err + log


@pytest.mark.usefixtures("canaries")
def test_what_is_published_is_cleared_of_secrets_whoever_writes_it(tmp_path: Path) -> None:
    """From Python there is no configuration to refuse."""
    sae = LinearSAE(LinearConfig(d_sae=24, activation=TopKConfig(k=3)), 12)
    sae.initialise(torch.randn(64, 12), torch.Generator().manual_seed(0))
    meta = {name: f"x {value} y" for name, value in CANARIES.items()}
    meta |= {"model": f"https://u:{CANARIES['HF_TOKEN']}@hub/m", "model_revision": CANARIES["DB_PASSWORD"]}
    save_sae(sae, tmp_path, meta | {"nested": [meta]})
    write_card(
        tmp_path / "README.md", f"an SAE of {CANARIES['HF_TOKEN']}", {}, meta | {"tokens": 1, "seed": 0}
    )
    assert found_in(tmp_path) == []
    assert MASK in (tmp_path / "config.json").read_text()
    assert "*" not in (tmp_path / "README.md").read_text().split("\n")[0], (
        "nor does the mask mean anything there"
    )


@pytest.mark.usefixtures("canaries")
@pytest.mark.parametrize("variable", CANARIES)
def test_a_secret_is_found_however_it_is_written(variable: str) -> None:
    value = CANARIES[variable]
    for form in (
        value,
        quote(value, safe=""),
        json.dumps(value),
        repr(value),
        f"a{value}b",
        [{"x": (value,)}],
    ):
        assert MARK not in str(redact(form)), form


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "hf_0123456789", True),
        ("my_api_key", "0123456789", True),
        ("GH_TOKENS", "0123456789", True),
        ("HF_TOKEN", "short", False),
        ("TOKENIZERS_PARALLELISM", "definitely", False),
        ("SSH_KEY_FILE", "/etc/passwd", False),
        ("SSH_KEY", "/etc/no such file", True),
        ("LANG", "en_US.UTF-8", False),
    ],
)
def test_what_counts_as_a_secret(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, secret: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert (value in secrets()) == secret
    if secret:
        with pytest.raises(InputError, match=re.escape(f"a.b.1='x {MASK}'") + f".*{name}"):
            refuse_secrets({"a": {"b": {"1": f"x {value}"}}})
    else:
        refuse_secrets({"a": {"b": {"1": f"x {value}"}}})
