"""A Hugging Face Hub on localhost: the requests of downloads and pushes, and faults on demand."""

import base64
import functools
import hashlib
import http.server
import json
import re
import threading
import time
from urllib.parse import unquote

COMMIT = "c" * 40
TOKEN, READ_TOKEN = "hf_secretsecretsecret", "hf_readingreading"  # of the user `me`; the second is read-only
LARGE = 1000  # bytes from which a file is an LFS file, with its SHA-256 in the listing


class HubServer:
    """
    `HubServer({"datasets/owner/name": {path: bytes}, "models/...": ...})` in a `with`; its `address` is an HF_ENDPOINT.

    Attributes:
        cards: {repository: dict}, the metadata of READMEs.
        faults: list of (pattern, fault). A request triggers the first fault whose pattern matches its method and path,
            once. A fault is a status (429, 500, ...), "drop" (the connection ends halfway through the body),
            "truncate" (half the body, with a Content-Length that fits), "corrupt" (other bytes of the same length),
            "hang" (no answer for a second, then the connection ends) or "slow" (a POST takes two seconds).
            Commits have four more: "lost" (made, without an answer), "overtaken" (another commit comes first),
            "dropped and overtaken" (not made, another one is, without an answer) and "lost and overtaken" (made, then
            another one, without an answer).
        log: (method, path) of every request.
        tokens: {token: {"name": owner, "orgs": organizations it may write to, "role": "write" or "read"}}. Needed to
            push, and to read private repositories.
        private: names of private repositories.
        gated: names of gated repositories.
        commits: {repository: [(id, title)]} of pushed commits. COMMIT is the id of the state before them.
        lfs: {SHA-256: bytes} of uploaded content. A commit turns it into files.
    """

    def __init__(self, repos):
        self.repos, self.cards, self.faults, self.log = repos, {}, [], []
        self.tokens = {
            TOKEN: {"name": "me", "orgs": ["team"], "role": "write"},
            READ_TOKEN: {"name": "me", "orgs": [], "role": "read"},
        }
        self.private, self.gated, self.commits, self.descriptions, self.lfs = set(), set(), {}, {}, {}
        self.lock = threading.Lock()

    def head(self, repo):
        """Return the id of a repository's newest commit."""
        return self.commits[repo][-1][0] if self.commits.get(repo) else COMMIT

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
    disable_nagle_algorithm = True  # or each small answer waits 40 ms for the acknowledgment of its headers

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
                if repo in self.hub.private and self._owner() is None:
                    break
                return self._api(repo, rest, files) if is_api else self._file(repo, rest, files)
        if path == "models/whoami-v2":
            owner = self._owner()
            if owner is None:
                return self._error(401, "Invalid credentials")
            token = {"role": owner["role"], "displayName": "mine"}
            orgs = [{"type": "org", "name": name} for name in owner["orgs"]]
            return self._json({"type": "user", "name": owner["name"], "orgs": orgs, "auth": {"accessToken": token}})
        return self._reply(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _owner(self):
        """Return the owner of the request's token, or None without a known token."""
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def do_POST(self):
        self.hub.log.append((self.command, self.path))
        self.fault = self.hub.fault_of(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(self.fault, int):
            return self._error(self.fault, "a fault on demand")
        if self.fault == "drop":
            return self._hang_up()
        if self.fault == "slow":
            time.sleep(2)
        path = unquote(self.path.partition("?")[0]).strip("/")
        if self.command == "PUT":  # to the storage, whose signed addresses need no token
            self.hub.lfs[path.removeprefix("lfs/")] = body
            return self._reply(200)
        owner = self._owner()
        if owner is None or owner["role"] == "read":
            return self._error(401 if owner is None else 403, "no token with write access")
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self._create(json.loads(body), owner)
        found = re.fullmatch(r"(?:api/models/)?(.+?)(?:/(preupload|commit)/main|\.git/info/lfs/objects/batch)", path)
        name, action = found[1], found[2]
        repo = f"models/{name}"
        if repo not in self.hub.repos:
            return self._reply(404, headers={"X-Error-Code": "RepoNotFound"})
        if name.partition("/")[0] not in (owner["name"], *owner["orgs"]):
            return self._error(403, f"you may not write to {name}")
        if action == "commit":
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return self._preupload(repo, json.loads(body)) if action else self._batch(json.loads(body))

    do_PUT = do_POST

    def _create(self, asked, owner):
        namespace = asked.get("organization") or owner["name"]
        repo = f"models/{namespace}/{asked['name']}"
        if namespace not in (owner["name"], *owner["orgs"]):
            return self._error(403, f"you may not write to {namespace}")
        url = f"{self.hub.address}/{repo.removeprefix('models/')}"
        if repo in self.hub.repos:
            return self._error(409, "You already created this model repo", url=url)
        self.hub.repos[repo] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return self._json({"url": url})

    def _preupload(self, repo, asked):
        """Answer whether each file is sent with the commit or uploaded before it."""
        files = self.hub.repos[repo]
        answer = []
        for file in asked["files"]:
            path, mode = file["path"], "lfs" if file["size"] >= LARGE else "regular"
            oid = _oid(files[path]) if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": answer})

    def _batch(self, asked):
        """Answer where to upload content that is missing: the storage has another address."""
        objects, storage = [], self.hub.address.replace("127.0.0.1", "localhost")
        for wanted in asked["objects"]:
            upload = {"upload": {"href": f"{storage}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.lfs else {"actions": upload}))
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo, lines):
        header = lines[0]["value"]
        if self.fault in ("overtaken", "dropped and overtaken"):
            self._commit_of_another(repo)
        if self.fault == "dropped and overtaken":
            return self._hang_up()
        head = self.hub.head(repo)
        if header.get("parentCommit") not in (None, head):
            return self._error(412, "A commit has happened since. Please refresh.")
        files = dict(self.hub.repos[repo])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.lfs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(f"{head}{header['summary']}".encode()).hexdigest()
        self.hub.repos[repo] = files  # all of it at once
        self.hub.commits.setdefault(repo, []).append((commit, header["summary"]))
        self.hub.descriptions[commit] = header.get("description", "")
        if self.fault == "lost and overtaken":
            self._commit_of_another(repo)
        if self.fault in ("lost", "lost and overtaken"):
            return self._hang_up()
        name = repo.removeprefix("models/")
        return self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def _commit_of_another(self, repo):
        self.hub.repos[repo] = self.hub.repos[repo] | {"theirs.txt": b"theirs"}
        self.hub.commits.setdefault(repo, []).append(("d" * 40, "Theirs"))

    def _hang_up(self):
        self.connection.close()
        self.close_connection = True

    def _error(self, status, message, **more):
        return self._reply(status, json.dumps({"error": message, **more}).encode())

    def _json(self, answer):
        return self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _gated(self, repo):
        """Reply with an error if the repository is gated: listing it is free, and its files need a known token."""
        if repo in self.hub.gated and self._owner() is None:
            self._reply(403, headers={"X-Error-Code": "GatedRepo"})
            return True
        return False

    def _file(self, repo, rest, files):  # resolve/REVISION/PATH
        if self._gated(repo):
            return None
        name = rest.split("/", 2)[-1]
        commit = COMMIT if rest.split("/")[1] == COMMIT else self.hub.head(repo)
        if name not in files:
            return self._reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(content) >= LARGE:
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and int(asked[1]) < len(content):
            begin, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            return self._reply(206, content[begin:end], headers)
        return self._reply(200, content, headers)

    def _api(self, repo, rest, files):
        kind, _, revision = rest.partition("/")
        if kind == "auth-check":
            return self._gated(repo) or self._json({})
        if kind == "commits":  # newest first
            commits = [(COMMIT, "Initial commit"), *self.hub.commits.get(repo, [])][::-1]
            fields = {"authors": [], "date": "2026-01-01T00:00:00.000Z"}
            messages = self.hub.descriptions
            return self._json([{"id": id, "title": t, "message": messages.get(id, "")} | fields for id, t in commits])
        if kind == "revision" and revision not in (self.hub.head(repo), "main", COMMIT):
            return self._reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            folder = revision.partition("/")[2]
            if revision.partition("/")[0] not in (self.hub.head(repo), "main", COMMIT):
                return self._reply(404, headers={"X-Error-Code": "RevisionNotFound"})
            answer = _tree(files, folder, recursive="recursive=true" in self.path.lower())
            if folder and not answer:
                return self._reply(404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            commit = COMMIT if revision == COMMIT else self.hub.head(repo)
            answer = {"id": repo.partition("/")[2], "sha": commit, "private": repo in self.hub.private}
            answer |= {"siblings": [{"rfilename": name} for name in files], "cardData": self.hub.cards.get(repo)}
        return self._json(answer)

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
        self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        if fault == "drop":
            self.wfile.flush()
            self._hang_up()

    def log_message(self, *arguments):
        pass


def _git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(content):
    """Return the id of a file's content: SHA-256 of a large one, git's hash of a small one."""
    return hashlib.sha256(content).hexdigest() if len(content) >= LARGE else _git_hash(content)


def _tree(files, folder, *, recursive):
    """List the files and folders in a folder ("": the root), as the Hub does."""
    prefix = f"{folder}/" if folder else ""
    listed = []
    for name, content in files.items():
        rest = name.removeprefix(prefix).split("/")
        if name.startswith(prefix):
            folders = [prefix + "/".join(rest[:depth]) for depth in range(1, len(rest))][: None if recursive else 1]
            listed += [
                {"type": "directory", "path": path, "size": 0, "oid": _git_hash(path.encode())} for path in folders
            ]
            if recursive or len(rest) == 1:
                listed.append(_listed(name, content))
    return [entry for number, entry in enumerate(listed) if entry not in listed[:number]]


def _listed(name, content):
    listed = {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}
    if len(content) >= LARGE:
        listed["lfs"] = {"oid": _oid(content), "size": len(content), "pointerSize": 130}
    return listed
