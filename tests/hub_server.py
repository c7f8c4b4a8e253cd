"""A Hugging Face Hub on localhost: as much of its protocol as downloading asks for, and faults on demand."""

import functools
import hashlib
import http.server
import json
import re
import threading
import time
from urllib.parse import unquote

COMMIT = "c" * 40
LARGE = 1000  # bytes from which a file is an LFS file, with its SHA-256 in the listing


class HubServer:
    """
    `HubServer({"datasets/owner/name": {path: bytes}, "models/...": ...})` in a `with`; its `address` is an HF_ENDPOINT.

    Attributes:
        cards: {repository: dict}, the metadata of READMEs.
        faults: list of (pattern, fault). The first whose pattern is found in a request's path and query is used up by
            it. A fault is a status (429, 500, ...), "drop" (the connection ends halfway through the body), "truncate"
            (half the body, under a header that says so), "corrupt" (other bytes, as many) or "hang" (no answer for a
            second, and then the connection's end).
        log: (method, path) of every request.
    """

    def __init__(self, repos):
        self.repos, self.cards, self.faults, self.log = repos, {}, [], []
        self.lock = threading.Lock()

    def __enter__(self):
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def fault_of(self, path):
        with self.lock:
            for fault in self.faults:
                if re.search(fault[0], path):
                    self.faults.remove(fault)
                    return fault[1]
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub, *arguments):
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self):
        self.hub.log.append((self.command, self.path))
        self.fault = self.hub.fault_of(f"{self.command} {self.path}")
        if self.fault == "hang":
            time.sleep(1)
            self.close_connection = True
            return None
        if isinstance(self.fault, int):
            return self._reply(self.fault, headers={"Retry-After": "1"} if self.fault == 429 else {})
        path = unquote(self.path.partition("?")[0]).strip("/")
        is_api = path.startswith("api/")
        path = path.removeprefix("api/")
        if not path.startswith(("datasets/", "models/")):
            path = f"models/{path}"
        for repo, files in self.hub.repos.items():
            if path == repo or path.startswith(f"{repo}/"):
                rest = path.removeprefix(repo).strip("/")
                return self._api(repo, rest, files) if is_api else self._file(rest, files)
        return self._reply(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _file(self, rest, files):  # resolve/REVISION/PATH
        name = rest.split("/", 2)[-1]
        if name not in files:
            return self._reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if len(content) >= LARGE:
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin and 0 < int(begin[1]) < len(content):
            headers["Content-Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
            return self._reply(206, content[int(begin[1]) :], headers)
        return self._reply(200, content, headers)

    def _api(self, repo, rest, files):
        kind, _, revision = rest.partition("/")
        if kind == "revision" and revision not in (COMMIT, "main"):
            return self._reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            folder = revision.partition("/")[2]
            answer = [_listed(name, content) for name, content in files.items() if name.startswith(folder)]
            if folder and not any(file["path"].startswith(f"{folder}/") for file in answer):
                return self._reply(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            answer = {"id": repo.partition("/")[2], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            answer["cardData"] = self.hub.cards.get(repo)
        return self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _reply(self, status, body=b"", headers=None):
        fault = self.fault if self.command == "GET" and status in (200, 206) else None
        if fault == "truncate":
            body = body[: len(body) // 2]
        if fault == "corrupt":
            body = bytes(byte ^ 1 for byte in body)
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def _listed(name, content):
    listed = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if len(content) >= LARGE:
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return listed
