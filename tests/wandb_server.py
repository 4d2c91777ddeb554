"""As much of a W&B server as wandb's client needs to log, resume and sync: what it receives is what W&B would show."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

HISTORY, SUMMARY, EVENTS, OUTPUT = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl", "output.log"


@dataclass
class Run:
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    lines: dict[str, list[str]] = field(default_factory=dict)
    """Of the streamed files, each at its offset."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    ends: list[dict[str, Any]] = field(default_factory=list)
    """What the clients said last: exit code, and whether the run is preempting."""

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get(HISTORY, [])]

    def resume_status(self) -> dict[str, Any]:
        def tail(name: str) -> str:
            return json.dumps(self.lines.get(name, [])[-1:])

        return {
            "id": "run",
            "name": "run",
            "displayName": "run",
            "summaryMetrics": (self.lines.get(SUMMARY) or ["{}"])[-1],
            "historyLineCount": len(self.lines.get(HISTORY, [])),
            "eventsLineCount": len(self.lines.get(EVENTS, [])),
            "logLineCount": len(self.lines.get(OUTPUT, [])),
            "historyTail": tail(HISTORY),
            "eventsTail": tail(EVENTS),
            "config": json.dumps(self.config),
            "tags": self.tags,
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }


class WandbServer:
    """Listens on the loopback interface while it is entered; `runs` holds what came, by the run's id.

    Args:
        sweep_runs: What the agent of a sweep is told to run, one after the other: parameters, by the run's id.
    """

    def __init__(self, sweep_runs: dict[str, dict[str, Any]] | None = None) -> None:
        self.runs: dict[str, Run] = {}
        self.sweep = ""
        """The config that `wandb sweep` has sent."""
        self._sweep_runs = dict(sweep_runs or {})

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_of = self

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply({})

            def do_POST(self) -> None:
                body = self.body()
                if self.path == "/graphql":
                    self.reply({"data": self.server_of.answer(json.loads(body))})
                elif self.path.endswith("/file_stream"):
                    self.server_of.stream(self.path.split("/")[-2], json.loads(body))
                    self.reply({})
                else:
                    self.reply({})

            def do_PUT(self) -> None:
                _, _, run_id, name = self.path.split("/", 3)
                self.server_of.runs[run_id].uploads[name] = self.body()
                self.reply({})

            def body(self) -> bytes:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

            def reply(self, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a killed client leaves in mid-sentence

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def __enter__(self) -> WandbServer:
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, question: dict[str, Any]) -> Any:
        name, given = question.get("operationName"), question.get("variables") or {}
        if name == "RunResumeStatus":
            run = self.runs.get(given["name"])
            status = run.resume_status() if run is not None else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": status}}
        if name == "UpsertBucket":
            is_new = given["name"] not in self.runs
            run = self.runs.setdefault(given["name"], Run())
            run.config.update(json.loads(given["config"] or "{}"))
            run.tags = given["tags"] or run.tags
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "run", "name": given["name"], "displayName": "run", "description": "", "sweepName": None}
            bucket |= {"config": json.dumps(run.config), "project": project}
            bucket |= {"historyLineCount": len(run.lines.get(HISTORY, []))}
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if name == "CreateRunFiles":
            urls = [{"name": file, "uploadUrl": f"{self.url}/put/{given['run']}/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": urls}}
        return self.answer_to_agent(question["query"], given)

    def answer_to_agent(self, query: str, given: dict[str, Any]) -> Any:
        if "viewer {" in query:
            return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if "UpsertSweep(" in query:
            self.sweep = given["config"]
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            return {"upsertSweep": {"sweep": {"name": "s", "project": project}, "configValidationWarnings": []}}
        if "SweepWithRuns(" in query:
            times = dict.fromkeys(("createdAt", "heartbeatAt", "updatedAt"), "2026-01-01T00:00:00")
            sweep = {"id": "s", "name": "s", "method": "bayes", "state": "RUNNING", "config": self.sweep, **times}
            return {"project": {"sweep": sweep | {"controller": None, "scheduler": None, "runs": {"edges": []}}}}
        if "CreateAgent(" in query:
            return {"createAgent": {"agent": {"id": "a"}}}
        if "Heartbeat(" in query:
            commands = []
            if self._sweep_runs:
                run_id, parameters = self._sweep_runs.popitem()
                values = {name: {"value": value} for name, value in parameters.items()}
                program = yaml.safe_load(self.sweep)["program"]
                commands = [{"type": "run", "run_id": run_id, "program": program, "args": values}]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        return None

    def stream(self, run_id: str, sent: dict[str, Any]) -> None:
        run = self.runs[run_id]
        for name, part in sent.get("files", {}).items():
            start = part["offset"]
            run.lines.setdefault(name, [])[start : start + len(part["content"])] = part["content"]
        end = {key: sent[key] for key in ("exitcode", "preempting") if key in sent}
        if end:
            run.ends.append(end)
