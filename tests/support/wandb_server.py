"""A stand-in for the W&B server on the loopback device: it answers what the client asks and keeps what it is sent."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


class WandbServer(ThreadingHTTPServer):
    """`mode` may change at any time: "hang" answers nothing, a number that status, "drop" closes connections."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.lock = "normal", Lock()
        self.runs, self.files, self.artifacts, self.views = {}, {}, [], []
        self.sweep, self.commands = {}, []  # its configuration; what its agent is told, one thing a heartbeat

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""

    def run(self, name):
        fresh = {"config": "{}", "lines": {}, "summary": {}, "upserts": 0, "sweep": None}
        return self.runs.setdefault(name, fresh)

    def history(self, name):
        """The rows of a run's history, in order."""
        lines = self.run(name)["lines"].get("wandb-history.jsonl", {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def bucket(self, name):
        run = self.run(name)
        lines = {kind: run["lines"].get(f"wandb-{kind}.jsonl", {}) for kind in ("history", "events")}
        tail = {kind: json.dumps([rows[number] for number in sorted(rows)[-1:]]) for kind, rows in lines.items()}
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": name,
            "description": "",
            "config": run["config"],
            "summaryMetrics": json.dumps(run["summary"]),
            "sweepName": None,
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
            "logLineCount": len(run["lines"].get("output.log", {})),
            "historyLineCount": len(lines["history"]),
            "eventsLineCount": len(lines["events"]),
            "historyTail": tail["history"],
            "eventsTail": tail["events"],
            "project": {"id": "P", "name": "project", "entity": {"id": "E", "name": "me"}},
        }

    def answer(self, query, variables):
        """The data of a GraphQL answer."""
        if "upsertBucket" in query:
            inserted = variables["name"] not in self.runs
            run = self.run(variables["name"])
            run["upserts"] += 1
            run["sweep"] = variables.get("sweep") or run["sweep"]
            run["config"] = variables.get("config") or run["config"]
            return {"upsertBucket": {"bucket": self.bucket(variables["name"]), "inserted": inserted}}
        if "bucket(" in query:
            bucket = self.bucket(variables["name"]) if variables["name"] in self.runs else None
            return {"model": {"id": "P", "name": "project", "entity": {"id": "E", "name": "me"}, "bucket": bucket}}
        if "createRunFiles" in query:
            where = f"{self.url}/upload/{variables['run']}"
            files = [{"name": name, "uploadUrl": f"{where}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": f"id-{variables['run']}", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            self.views.append(variables)
            view = {"id": "VIEW", "name": "nw-view", "displayName": "x", "description": "", "spec": variables["spec"]}
            return {"upsertView": {"view": view | {"project": self.project()}, "inserted": True}}
        if "internalId" in query:
            return {"project": {"internalId": "UHJvamVjdA=="}}
        if "sweep(" in query:
            sweep = {"id": "S", "name": "SWEEP", "config": json.dumps(self.sweep), "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if "createAgent(" in query:
            return {"createAgent": {"agent": {"id": "AGENT"}}}
        if "agentHeartbeat(" in query:
            told = self.commands[:1]
            del self.commands[:1]
            return {"agentHeartbeat": {"agent": {"id": "AGENT"}, "commands": json.dumps(told)}}
        if "models(" in query:
            page = {"endCursor": "", "hasNextPage": False}
            return {"models": {"edges": [{"node": self.project(), "cursor": ""}], "pageInfo": page}}
        if "rtifact" in query:
            return self.answer_artifact(query, variables)
        if "viewer" in query:
            teams = {"edges": []}
            return {"viewer": {"id": "V", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": teams}}
        return {"serverInfo": {"features": []}, "entity": None}

    def project(self):
        node = {"id": "P", "name": "project", "entityName": "me", "createdAt": "2026-01-01"}
        return node | {"isBenchmark": False, "user": None}

    def answer_artifact(self, query, variables):
        if "createArtifact(" in query:
            number = len(self.artifacts)
            self.artifacts.append(variables)
            found = {"id": f"A{number}", "state": "PENDING", "digest": variables.get("digest"), "currentManifest": None}
            found["artifactSequence"] = {"id": "S", "latestArtifact": None}
            return {"createArtifact": {"artifact": found}}
        if "createArtifactManifest(" in query or "updateArtifactManifest(" in query:
            kind = "createArtifactManifest" if "createArtifactManifest(" in query else "updateArtifactManifest"
            file = {"id": "F", "name": "manifest", "displayName": "manifest", "uploadHeaders": [], "uploadUrl": None}
            file["uploadUrl"] = f"{self.url}/upload/artifacts/{variables.get('artifactID')}/manifest.json"
            return {kind: {"artifactManifest": {"id": "M", "file": file}}}
        if "createArtifactFiles(" in query:
            edges = []
            for spec in variables["artifactFiles"]:
                node = {"id": "F", "name": spec["name"], "displayName": spec["name"], "uploadHeaders": []}
                node["uploadUrl"] = f"{self.url}/upload/artifacts/{spec['artifactID']}/{spec['name']}"
                node |= {
                    "storagePath": spec["name"],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": spec["artifactID"]},
                }
                edges.append({"node": node})
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if "commitArtifact(" in query:
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        return {"project": None, "artifact": None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.body()
        if not self.disturbed():
            with self.server.lock:
                self.reply(self.posted(body))

    def do_PUT(self):
        body = self.body()
        if not self.disturbed():
            self.server.files[self.path.removeprefix("/upload/")] = body
            self.reply({})

    def do_GET(self):
        if not self.disturbed():
            self.reply({}, 404)

    def posted(self, body):
        if self.path == "/graphql":
            sent = json.loads(body)
            variables = sent.get("variables") or {}
            return {"data": self.server.answer(sent["query"], variables | variables.get("input", {}))}
        if self.path.endswith("/file_stream"):
            run = self.server.run(self.path.split("/")[4])
            for name, part in json.loads(body).get("files", {}).items():
                if name == "wandb-summary.json":
                    run["summary"] = json.loads(part["content"][-1])
                lines = run["lines"].setdefault(name, {})
                lines |= {part["offset"] + index: line for index, line in enumerate(part["content"])}
        return {}

    def body(self):
        if "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        else:
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def disturbed(self):
        """Whether the server's mode has dealt with the request."""
        mode = self.server.mode
        if mode == "hang":
            while self.server.mode == "hang":
                time.sleep(0.05)
            self.close_connection = True
        elif mode == "drop":
            self.close_connection = True
        elif mode != "normal":
            self.reply({"errors": [{"message": "the server says no"}]}, int(mode))
        return mode != "normal"

    def reply(self, data, status=200):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def wandb_server():
    """A server that runs; None of its answers leave the machine."""
    server = WandbServer()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.mode = "normal"
        server.shutdown()
        server.server_close()
