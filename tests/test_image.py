"""The Dockerfile, and `make image`, which builds it on a base pinned by digest."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", TEXT, re.MULTILINE)
DIGEST = "sha256:" + "0123456789abcdef" * 4
DOCKER = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in "buildx imagetools inspect "*) [ -n "$TODAY" ] && echo "$TODAY" || exit 1;; esac
"""
"""In the place of docker: a registry with one digest, or none to be reached."""


def make_image(tmp_path: Path, today: str) -> tuple[int, list[str]]:
    """The exit code of `make image`, and how it called docker."""
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    calls = tmp_path / "calls"
    env = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS")}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "TODAY": today}
    done = subprocess.run(["make", "image"], cwd=ROOT, env=env, capture_output=True, timeout=60)
    return done.returncode, calls.read_text().splitlines()


def test_an_image_is_built_on_the_digest_that_the_base_has_today(tmp_path):
    code, (asked, built) = make_image(tmp_path, DIGEST)
    assert code == 0
    (base,) = re.findall(r"^ARG BASE=(\S+)$", TEXT, re.MULTILINE)
    assert asked.startswith("buildx imagetools inspect") and asked.endswith(f" {base}")
    label = "--label org.opencontainers.image.base"
    told = f"{label}.name={base} {label}.digest={DIGEST}"
    assert built.split() == f"build --build-arg BASE={base}@{DIGEST} --tag sae-train {told} .".split()


def test_nothing_is_built_where_the_digest_cannot_be_known(tmp_path):
    code, calls = make_image(tmp_path, "")
    assert code != 0 and len(calls) == 1


def test_the_build_checks_what_it_installed_as_the_user_it_is_for():
    user = INSTRUCTIONS.index(("USER", "10001:10001"))
    runs = [(i, text) for i, (name, text) in enumerate(INSTRUCTIONS) if name == "RUN"]
    assert any("pip check" in text and i < user for i, text in runs)
    ((_, last),) = [(i, text) for i, text in runs if i > user]
    assert "sae-train train " in last and "compile_module_from_src" in last
    assert ("COPY", "--from=build /wheels /opt/wheels") in INSTRUCTIONS


@pytest.mark.parametrize("name", ["ENV", "ARG", "LABEL"])
def test_no_secret_is_in_the_image(name):
    said = [text for instruction, text in INSTRUCTIONS if instruction == name]
    assert said and not [text for text in said if re.search("TOKEN|SECRET|PASSWORD|API_KEY", text)]
