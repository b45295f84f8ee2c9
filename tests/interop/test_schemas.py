"""The manifests of docs/cluster are what Kubernetes, JobSet and SkyPilot read; wrong ones are told from them.

make test-interop
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from interop.environments import PEERS, python_of

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "cluster"
PLANTED = {
    "storage.yaml": ("accessModes: [ReadWriteMany]", "accessModes: ReadWriteMany"),
    "job.yaml": ("readOnlyRootFilesystem", "readOnlyRootFileSystem"),
    "harvest.yaml": ("backoffLimit: 6", "backoffLimit: six"),
    "jobset.yaml": ("onJobFailureReasons", "onJobFailureReason"),
    "skypilot.yaml": ("use_spot:", "use_spots:"),
}
PLANTED_IN_A_POD = ("terminationGracePeriodSeconds", "terminationGracePeriod")


def errors(home: Path, *paths: Path) -> dict[str, list[str]]:
    command = [str(python_of("cluster")), str(PEERS / "manifests.py"), *map(str, paths)]
    known = os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=500, cwd=home)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return {Path(path).name: told for path, told in found.items()}


def test_every_manifest_is_accepted_and_one_with_a_fault_in_it_is_not(tmp_path):
    shipped = sorted(FOLDER.glob("*.yaml"))
    assert {path.name for path in shipped} == PLANTED.keys()
    wrong = []
    for path in shipped:
        text, (right, mistaken) = path.read_text(), PLANTED[path.name]
        assert text.count(right) >= 1
        wrong.append(tmp_path / f"wrong-{path.name}")
        wrong[-1].write_text(text.replace(right, mistaken))
    wrong.append(tmp_path / "wrong-pod.yaml")
    wrong[-1].write_text((FOLDER / "jobset.yaml").read_text().replace(*PLANTED_IN_A_POD))
    found = errors(tmp_path, *shipped, *wrong)
    assert {name: told for name, told in found.items() if not name.startswith("wrong-")} == {
        path.name: [] for path in shipped
    }
    assert all(told for name, told in found.items() if name.startswith("wrong-")), found
