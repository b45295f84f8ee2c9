"""What the schemas of Kubernetes, JobSet and SkyPilot say of manifests. Runs in an environment of its own.

    python peers/manifests.py FILE...    prints {"FILE": ["what is wrong", ...]}

Core kinds are checked by kubernetes-validate, strictly: a field that nobody knows is an error. A JobSet is
read by the classes that Kubeflow generates from its OpenAPI description; a field that they do not keep is
unknown to it. Its pods are checked as those of a Job. SkyPilot reads its tasks itself.
"""

import json
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

KUBERNETES = "1.33"


def of_core(document: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def lost(given: Any, kept: Any, path: str = "") -> list[str]:
    """Places of what was given and not kept as it was."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [one for key in given for one in lost(given[key], kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = zip(given, kept, strict=True)
        return [one for i, (a, b) in enumerate(pairs) for one in lost(a, b, f"{path}.{i}")]
    return [] if given == kept else [f"{path[1:]}: {given!r} is unknown"]


def of_job_set(document: dict[str, Any]) -> list[str]:
    try:
        read = models.JobsetV1alpha2JobSet.from_dict(document)
    except ValueError as error:
        return [str(error)]
    found = lost(document, read.to_dict())
    for job in document["spec"]["replicatedJobs"]:
        core = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
        found += of_core(core | job["template"])
    return found


def of_sky(path: str) -> list[str]:
    import sky

    try:
        sky.Task.from_yaml(path)
    except (ValueError, sky.exceptions.InvalidSkyPilotConfigError) as error:
        return [str(error)]
    return []


def errors(path: str) -> list[str]:
    documents = list(yaml.safe_load_all(Path(path).read_text()))
    if "kind" not in documents[0]:
        return of_sky(path)
    return [
        one
        for document in documents
        for one in (of_job_set if document["kind"] == "JobSet" else of_core)(document)
    ]


if __name__ == "__main__":
    print(json.dumps({path: errors(path) for path in sys.argv[1:]}))
