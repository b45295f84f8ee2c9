"""Everything that a publication consists of, as a list of local files and their names in the repository.

    README.md, plots/pareto.png                                 the card
    ID/config.json, sae.safetensors, features.safetensors,
       metrics.json, eval.json, README.md, plots/*.png          our own form, as it lies in the run folder
    ID/cfg.json, sae_weights.safetensors, ...                   SAELens' form, beside it
    ID/FORMAT/...                                               any other form

Only names on these lists go; what else lies in a run's folders is told and stays. Weights are not copied.
What is written for the occasion (cards, configurations without local names, other forms) is the same bytes
each time, so that an upload that was interrupted finds its files at the hub already.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_train.errors import InputError
from sae_train.files import write_bytes, write_json
from sae_train.formats.plain import open_sae
from sae_train.hub.card import Publication, draw_pareto, repo_card
from sae_train.hub.public import private_paths, refuse_private
from sae_train.hub.runs import TrainedSAE
from sae_train.report.card import card
from sae_train.sae.io import CONFIG, WEIGHTS

OWN = (WEIGHTS, "features.safetensors", "metrics.json", "eval.json")
PICTURES = ("density.png", "scatter.png", "fvu.png", "loss.png", "lr.png", "l0.png", "shares.png")
MADE_HERE = (CONFIG, "README.md")
BESIDE_OURS = ("saelens",)
"""Forms whose names are not ours: they share our folder, where their readers look for them."""
FORM_SUFFIXES = (".json", ".safetensors", ".yaml", ".npz", ".pt")

Write = Callable[[str, TrainedSAE, Path], str | None]
"""(format, SAE, empty folder): writes it there; why it cannot, if it cannot."""


@dataclass(frozen=True)
class Upload:
    """One file: where it lies, and what it is called in the repository."""

    path: str
    file: Path

    @property
    def size_bytes(self) -> int:
        return self.file.stat().st_size


def stage(
    what: Publication, formats: Sequence[str], optional: bool, write: Write, folder: Path
) -> tuple[list[Upload], list[str]]:
    """Make what has to be made, and list all that is to be published.

    Args:
        what: the SAEs; `forms` and `refused` are filled in.
        formats: forms to publish, "own" among them.
        optional: leave out a form that cannot hold an SAE, and say so in the card, instead of refusing.
        write: writes a form.
        folder: an empty one, for what is made here.

    Returns:
        The files, and the names of those in the runs' folders that stay.

    Raises:
        InputError: an SAE that cannot be loaded or written, or something that must stay here.
    """
    uploads: list[Upload] = []
    left: list[str] = []
    for sae in what.saes:
        if "own" in formats:
            _check(sae.folder)
            uploads += _own(what, sae, folder / sae.id)
        left += [f"{sae.run.name}/saes/{sae.name}/{name}" for name in _others(sae.folder)]
        for name in formats:
            if name != "own":
                uploads += _form(what, sae, name, optional, write, folder)
    (folder / "plots").mkdir(exist_ok=True)
    draw_pareto(what.saes, folder / "plots" / "pareto.png")
    write_bytes(folder / "README.md", repo_card(what).encode())
    uploads += [Upload(name, folder / name) for name in ("README.md", "plots/pareto.png")]
    uploads.sort(key=lambda upload: upload.path)
    paths = private_paths([sae.run for sae in what.saes])
    for upload in uploads:
        refuse_private(upload.path, upload.file, paths)
    return uploads, left


def _check(folder: Path) -> None:
    """Raises InputError for an SAE that `load_sae` would refuse; weights are read in blocks."""
    plain = open_sae(folder)
    for matrix in (plain.w_enc, plain.w_dec):
        for _ in matrix.blocks():  # refuses what is not finite
            pass


def _own(what: Publication, sae: TrainedSAE, made: Path) -> Iterator[Upload]:
    made.mkdir(parents=True)
    write_json(made / CONFIG, sae.data)
    address = f"hf://{what.repo}/{sae.id}"
    write_bytes(made / "README.md", card(sae.description, sae.numbers, sae.meta, address).encode())
    for name in MADE_HERE:
        yield Upload(f"{sae.id}/{name}", made / name)
    for name in (*OWN, *(f"plots/{picture}" for picture in PICTURES)):
        file = sae.folder / name
        if not os.path.lexists(file):
            continue
        if not stat.S_ISREG(file.lstat().st_mode) or sae.folder.resolve() not in file.resolve().parents:
            # A link may lead to any file of this machine.
            raise InputError("run", str(file), "a regular file")
        yield Upload(f"{sae.id}/{name}", file)


def _others(folder: Path) -> Iterator[str]:
    """What is in the SAE's folder and on no list."""
    known = {*OWN, *MADE_HERE, *(f"plots/{picture}" for picture in PICTURES)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not (path.is_dir() and not path.is_symlink()):
            yield name


def _form(
    what: Publication, sae: TrainedSAE, name: str, optional: bool, write: Write, folder: Path
) -> list[Upload]:
    where = sae.id if name in BESIDE_OURS else f"{sae.id}/{name}"
    made = folder / f"form-{name}" / sae.id
    made.mkdir(parents=True)
    reason = write(name, sae, made)
    if reason is not None:
        if not optional:
            raise InputError("formats", name, f"forms that can hold {sae.run.name}/{sae.name}: {reason}")
        what.refused[sae.id] = f"{name}: {reason}"
        return []
    files = sorted(path for path in made.rglob("*") if path.is_file())
    assert all(path.suffix in FORM_SUFFIXES for path in files), files
    what.forms.setdefault(name, {})[sae.id] = where
    return [Upload(f"{where}/{path.relative_to(made).as_posix()}", path) for path in files]
