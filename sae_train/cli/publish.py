"""sae-train publish: the SAEs of one run or several, as a repository on the Hugging Face hub.

With `dry_run=true` everything is made and listed, and nobody is talked to.
"""

import sys
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from sae_train.cli.compose import run_composed
from sae_train.config import PublishCommandConfig, to_config
from sae_train.errors import InputError
from sae_train.hub.card import Publication
from sae_train.hub.forms import OWN, check_formats, write_form
from sae_train.hub.outcome import through_our_log
from sae_train.hub.public import hub_id
from sae_train.hub.publish import check_repo, publish
from sae_train.hub.runs import TrainedSAE, trained_saes
from sae_train.hub.stage import Upload, stage
from sae_train.log import setup_logging
from sae_train.redact import printable

USUAL = [OWN, "saelens"]
"""Forms of a publication that names none; one that cannot hold an SAE is left out."""


def run(args: list[str]) -> int:
    return run_composed("publish", args, put)


def put(composed: DictConfig) -> int:
    """Stage, list and publish. Returns 0."""
    request: PublishCommandConfig = to_config(composed)
    setup_logging(None)
    through_our_log()
    check_repo(request.repo)
    runs = request.run if isinstance(request.run, list) else [request.run]
    if not runs or not all(isinstance(run, str) and run for run in runs):
        raise InputError("run", request.run, "a run folder, or a list of them: run=[A,B]")
    formats = USUAL if request.formats is None else list(request.formats)
    check_formats(formats)
    for key, name in (("base_model", request.base_model), *(("datasets", n) for n in request.datasets or [])):
        if name is not None and (hub_id(name) is None or name.count("/") != 1):
            raise InputError(key, name, "a name on the hub, USER/NAME")
    saes = trained_saes(runs, request.sae, request.base_model)
    commits = {sae.record.versions["commit"] for sae in saes if "commit" in sae.record.versions}
    what = Publication(
        repo=request.repo,
        saes=saes,
        license=request.license,
        commit=", ".join(sorted(commits)),
        base_model=request.base_model,
        datasets=request.datasets,
    )

    def write(name: str, sae: TrainedSAE, folder: Path) -> str | None:
        return write_form(name, sae, request.base_model, folder)

    with tempfile.TemporaryDirectory(prefix="sae-train-publish-") as made:
        uploads, left = stage(what, formats, request.formats is None, write, Path(made))
        report(request, what, uploads, left)
        sys.stdout.flush()  # an upload takes long
        if request.dry_run:
            print("dry run: nothing was sent, nobody was asked")
            return 0
        names = ", ".join(sae.id for sae in saes[:3]) + (", ..." if len(saes) > 3 else "")
        done = publish(
            request.repo, uploads, request.private, request.replace, f"Publish {len(saes)} SAE(s): {names}"
        )
    said = "published" if done.changed else "nothing to change"
    print(f"{said}: {printable(done.url)} at commit {done.commit}; every file read back and compared")
    for sae in saes:
        print(f'  load_sae("hf://{request.repo}/{sae.id}@{done.commit}")')
    return 0


def report(request: PublishCommandConfig, what: Publication, uploads: list[Upload], left: list[str]) -> None:
    """What goes, with sizes, and what stays."""
    audience = "private" if request.private else "PUBLIC"
    print(f"{request.repo}: {audience}, licence {request.license or 'not stated (license=...)'}")
    for upload in uploads:
        print(f"  {upload.size_bytes:>14,}  {printable(upload.path)}")
    total = sum(upload.size_bytes for upload in uploads)
    print(f"  {total:>14,}  bytes in {len(uploads)} files")
    for sae, reason in what.refused.items():
        print(f"  left out: {sae} as {printable(reason)}")
    for name in left:
        print(f"  stays here: {printable(name)}")
    if any(hub_id(sae.meta.get("model")) is None for sae in what.saes):
        print("  the model is not one of the hub's: say base_model=USER/NAME if it is a copy of one")
