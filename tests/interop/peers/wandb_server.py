"""A wandb server on this machine: openwandb, and before it the part of the protocol that it lacks, sweeps.

    python peers/wandb_server.py --port N --data FOLDER

`wandb sweep` and `wandb agent` speak GraphQL: a sweep is made (upsertSweep), an agent joins it (createAgent)
and asks again and again what to do (agentHeartbeat). Grids are all that is known here; every point is given
out once, in order. Whatever is no question about sweeps goes on to openwandb as it came.
"""

import argparse
import itertools
import json
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Sweeps:
    """What agents are told to run."""

    def __init__(self) -> None:
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, dict[str, Any]] = {}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a question about sweeps, None to any other."""
        if "upsertSweep" in query:
            return {"upsertSweep": {"sweep": self.upsert(variables), "configValidationWarnings": []}}
        if "createAgent" in query:
            name = uuid.uuid4().hex[:8]
            self.agents[name] = self.sweeps[variables["sweep"]]
            return {"createAgent": {"agent": {"id": name}}}
        if "agentHeartbeat" in query:
            commands = json.dumps(self.next(variables))
            return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": commands}}
        if "sweep(sweepName" in query.replace(" ", ""):
            found = self.sweeps.get(variables.get("sweep") or variables.get("sweepName") or "")
            return {"project": {"sweep": found and found["told"]}}
        return None

    def upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        import yaml

        name = variables.get("id")
        if name not in self.sweeps:
            name = uuid.uuid4().hex[:8]
            config = yaml.safe_load(variables["config"])
            keys = config["parameters"]
            values = [given.get("values") or [given["value"]] for given in keys.values()]
            points = [dict(zip(keys, point, strict=True)) for point in itertools.product(*values)]
            unknown = (
                "description",
                "createdAt",
                "heartbeatAt",
                "updatedAt",
                "bestLoss",
                "controller",
                "scheduler",
            )
            told = dict.fromkeys(unknown) | {"id": name, "name": name, "method": "grid", "state": "RUNNING"}
            told |= {"config": variables["config"], "earlyStopJobRunning": False, "runs": {"edges": []}}
            entity, project = variables.get("entityName") or "default", variables.get("projectName")
            place = {"id": "p", "name": project, "entity": {"id": "e", "name": entity}}
            self.sweeps[name] = {
                "told": told,
                "points": points,
                "program": config.get("program"),
                "place": place,
            }
        sweep = self.sweeps[name]
        sweep["told"]["state"] = variables.get("state") or sweep["told"]["state"]
        return {"name": name, "project": sweep["place"]}

    def next(self, variables: dict[str, Any]) -> list[dict[str, Any]]:
        """Another point for an agent that runs none, the end when there is none left."""
        sweep = self.agents[variables["id"]]
        if json.loads(variables.get("runState") or "{}"):
            return []
        if not sweep["points"]:
            return [{"type": "exit"}]
        args = {key: {"value": value} for key, value in sweep["points"].pop(0).items()}
        run = uuid.uuid4().hex[:8]
        return [{"type": "run", "run_id": run, "program": sweep["program"], "args": args}]


def with_sweeps(app: Any) -> Any:
    """An application that answers what it knows of sweeps, and else does what `app` does."""
    sweeps = Sweeps()

    async def both(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope.get("path") != "/graphql" or scope.get("method") != "POST":
            await app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body)
        if not asked.get("operationName"):
            asked.pop("operationName", None)  # openwandb refuses an empty one
        answer = sweeps.answer(asked.get("query", ""), asked.get("variables") or {})
        if answer is not None:
            head = {"type": "http.response.start", "status": 200}
            await send(head | {"headers": [(b"content-type", b"application/json")]})
            await send({"type": "http.response.body", "body": json.dumps({"data": answer}).encode()})
            return
        body = json.dumps(asked).encode()
        headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
        passed = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Message:
            return next(passed, None) or await receive()

        await app(scope | {"headers": [*headers, (b"content-length", str(len(body)).encode())]}, again, send)

    return both


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data", required=True)
    told = parser.parse_args()
    os.environ |= {"OPENWANDB_DATA_DIR": told.data, "OPENWANDB_PORT": str(told.port)}  # read at import
    import uvicorn
    from openwandb.server import app

    uvicorn.run(with_sweeps(app), host="127.0.0.1", port=told.port, log_level="warning")
