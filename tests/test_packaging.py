"""The wheel holds what the checkout runs, and the files around the code say the same things as the code."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built offline from a copy of what goes into it (a build writes beside its sources)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["pyproject.toml", "README.md", "LICENSE", "sae_train", "conf", "kernels"]
    subprocess.run(["cp", "-r", *[str(ROOT / name) for name in names], str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "--wheel-dir", str(out), str(source)], check=True)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def modules(folder: Path, prefix: str) -> set[str]:
    """Path inside the wheel of every module under a folder of the checkout."""
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def test_the_packages_listed_are_the_packages_there_are():
    folders = {path.parent for path in (ROOT / "sae_train").rglob("*.py")}
    there = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"sae_train.conf"}
    folders = {path.parent for path in (ROOT / "kernels" / "sae_kernels").rglob("*.py")}
    there |= {".".join(folder.relative_to(ROOT / "kernels").parts) for folder in folders}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(there)


def test_every_package_says_what_it_is():
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        first, *rest = package.split(".")
        folder = {"sae_kernels": ROOT / "kernels" / "sae_kernels", "sae_train": ROOT / "sae_train"}[first]
        folder = ROOT / "conf" if rest == ["conf"] else folder.joinpath(*rest)
        text = (folder / "__init__.py").read_text()
        assert text.startswith('"""'), folder


def test_the_wheel_holds_every_module_every_yaml_the_template_and_the_licence(wheel):
    names = set(wheel.namelist())
    conf = ROOT / "conf"
    yaml = {f"sae_train/conf/{path.relative_to(conf).as_posix()}" for path in conf.rglob("*.yaml")}
    assert "sae_train/conf/train.yaml" in yaml
    wanted = modules(ROOT / "sae_train", "sae_train")
    wanted |= modules(ROOT / "kernels" / "sae_kernels", "sae_kernels") | yaml
    wanted |= {"sae_train/py.typed", "sae_kernels/py.typed"}
    wanted |= {"sae_train/conf/__init__.py", "sae_train/report/template.html"}
    assert wanted - names == set()
    (licence,) = [name for name in names if name.endswith("licenses/LICENSE")]
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"sae_train", "sae_kernels", f"sae_train-{PROJECT['project']['version']}.dist-info"}
    assert not [name for name in wheel.namelist() if "test" in name or "__pycache__" in name]


def test_the_command_and_its_target_exist(wheel):
    (entry,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "sae-train = sae_train.cli.main:main" in wheel.read(entry).decode()
    assert "sae_train/cli/main.py" in wheel.namelist()


def test_an_installation_of_the_wheel_composes_the_demo(wheel, tmp_path):
    """From another folder, with the unpacked wheel alone on the path: no file of the checkout can help."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + (
        "import sae_train.config, sae_train.cli.compose as c\n"
        "assert c.__file__.startswith(sys.path[0]), c.__file__\n"
        "print(c.compose('train', ['experiment=demo']).model.name)"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["demo:smollm2"]


def test_the_folder_kernels_is_no_package():
    """Hugging Face has a package of that name, and transformers breaks on ours if it can be imported."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_version_is_the_same_everywhere():
    stated = PROJECT["project"]["version"]
    code = (ROOT / "sae_train" / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.*)"$', code, re.MULTILINE) == [stated]
    assert f"## [{stated}]" in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = version("sae-train")
    except PackageNotFoundError:
        pytest.skip("run from a checkout without an installation")
    assert installed == stated


def test_every_requirement_is_pinned_in_the_constraints_to_a_version_it_allows():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert pins["triton"] == "3.7.1"
    extras = PROJECT["project"]["optional-dependencies"]
    stated = PROJECT["project"]["dependencies"] + [item for extra in extras.values() for item in extra]
    for requirement in map(Requirement, stated):
        name = requirement.name.lower()
        if name in ("sae-train", "setuptools"):
            continue
        pinned = pins.get(name) or pins.get(name.replace("_", "-")) or pins.get(name.replace("-", "_"))
        assert pinned is not None, name
        assert requirement.specifier.contains(pinned, prereleases=True), (str(requirement), pinned)


def test_the_image_runs_as_a_numbered_user_from_pinned_tags():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith(("#", " "))]
    users = [word[1] for word in words if word[0] == "USER"]
    assert users, "no USER: the image would run as root"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])  # numbers, so that runAsNonRoot can check them
    defaults = {f"${{{word[1].split('=')[0]}}}": word[1].split("=")[-1] for word in words if word[0] == "ARG"}
    bases = [defaults.get(word[1], word[1]) for word in words if word[0] == "FROM"]
    assert bases
    assert all(re.search(r":\d", base) and "latest" not in base for base in bases), bases
    assert words[-2:] == [["ENTRYPOINT", '["sae-train"]'], ["CMD", '["--help"]']]
    assert "PYTHONSAFEPATH=1" in (ROOT / "Dockerfile").read_text()
