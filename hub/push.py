"""
A checkpoint to the Hub: one commit with everything in it, so that a repository never shows half a model.

The Hub's own client uploads (HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE and the proxy settings hold).
The token stays in it: nothing here reads it.
"""

import fnmatch
import hashlib
import json
import math
import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

from hub import HubError
from hub.card import Run, model_card, read_results

_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 1.0  # then 2, 4, ...
_LICENSE = Path(__file__).parent.parent / "LICENSE"
# What only resuming reads, what is hidden, and pickles, which run code when they are opened.
_LEFT_OUT = ("training_state/*", ".*", "*/.*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
# What an earlier push may have left: from_pretrained would open it in the place of what is there now.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


class Upload(NamedTuple):
    """What a commit brings."""

    files: dict
    """{path in the repository: Path or bytes}"""
    message: str


class Repository:
    """A model's repository on the Hub that this machine may write to."""

    def __init__(self, name, *, private=True):
        """
        Finds it, or makes it.

        Args:
            name: "owner/name".
            private: whether only its owner sees it. That of a repository that exists stays as it is, and must not be
                more open than asked for.

        Raises:
            HubError: no token, or one that may not write; no such owner; a public repository though private was asked
                for; no network.
        """
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise HubError(f"{name!r} is no name of a repository, USER/NAME ({error})") from None
        if "/" not in name:
            raise HubError(f"{name!r} does not say whose it is: give USER/NAME")
        if get_token() is None:
            raise HubError(
                "the Hub wants to know who pushes: run `hf auth login`, or set HF_TOKEN, with a token that may write"
            )
        self.name, self._api = name, HfApi()
        _asked(self._check_token, name)
        try:
            info = _asked(lambda: self._api.repo_info(self.name), self.name, of_interest=RepositoryNotFoundError)
        except RepositoryNotFoundError:
            _asked(lambda: self._api.create_repo(self.name, private=private, exist_ok=True), self.name)
            info = _asked(lambda: self._api.repo_info(self.name), self.name)
        if private and info.private is False:
            raise HubError(
                f"{self.name} exists and everybody can see it: say --public to push there all the same, or choose "
                "another name"
            )
        self.is_private = info.private is not False

    def _check_token(self):
        who = self._api.whoami()
        token = who.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise HubError(
                f"the token {token.get('displayName', '')!r} of {who['name']} may only read: make another with "
                "the permission to write, and give it to `hf auth login` or HF_TOKEN"
            )

    def push(self, upload):
        """
        Args:
            upload: Upload.

        Returns:
            the commit's address.

        Raises:
            HubError: nothing of it is on the Hub, and why.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.hf_api import RepoFile

        files = upload.files
        head = _asked(lambda: self._api.repo_info(self.name), self.name).sha
        there = _asked(lambda: list(self._api.list_repo_tree(self.name, revision=head, recursive=True)), self.name)
        remote = {entry.path: entry for entry in there if isinstance(entry, RepoFile)}
        stale = [path for path in remote if path not in files and _matches(path, _WEIGHTS)]

        def commit():
            # New ones each time: the client keeps notes in them of what it has done.
            operations = [CommitOperationAdd(path, source) for path, source in files.items()]
            operations += [CommitOperationDelete(path) for path in stale]
            return self._api.create_commit(
                self.name, operations, commit_message=upload.message, parent_commit=head
            ).commit_url

        def has_arrived():
            """Whether a commit whose answer was lost is there."""
            info = self._api.repo_info(self.name)
            if info.sha == head:
                return None
            tree = self._api.list_repo_tree(self.name, recursive=True)
            now = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            if all(path in now and _is_same(now[path], source) for path, source in files.items()):
                return f"{self._api.endpoint}/{self.name}/commit/{info.sha}"
            return None

        return _asked(commit, self.name, has_arrived=has_arrived)


class BackgroundPusher:
    """Pushes checkpoints while training goes on, one at a time."""

    def __init__(self, repository, say):
        """
        Args:
            repository: Repository.
            say: called with a line when a push has ended.
        """
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # training has its own
        self._repository, self._say, self._thread = repository, say, None
        self._is_pushed = False  # the last one that was tried
        self.reading = set()
        """folders that must stay for now"""

    def push(self, folder):
        """Starts to, unless one is under way: then this one is left out, since there will be others."""
        if self._thread is not None and self._thread.is_alive():
            self._say(f"not pushed {folder}: the push before it is still under way")
            return
        self.reading.add(folder)
        # Not an executor's, which would keep a program that was asked to stop from ending.
        self._thread = threading.Thread(target=self._push, args=[folder], daemon=True)
        self._thread.start()

    def finish(self, folder):
        """Waits for what is under way and pushes the last checkpoint. Returns whether that is on the Hub."""
        if self._thread is not None:
            self._thread.join()
        self._push(folder)
        return self._is_pushed

    def _push(self, folder):
        try:
            address = self._repository.push(prepare_upload(folder, self._repository.name))
            self._say(f"pushed    {folder} to {address}")
            self._is_pushed = True
        except HubError as error:
            self._say(
                f"warning: {folder} is not on the Hub: {error}. To push it by hand: python -m hub push {folder} "
                f"{self._repository.name}"
            )
            self._is_pushed = False
        finally:
            self.reading.discard(folder)


def prepare_upload(checkpoint, repo_id, *, results=()):
    """
    Args:
        checkpoint: folder of a model. A README.md in it is taken as it is, else a model card is written.
        repo_id: "owner/name", for the card.
        results: files of `python -m eval --output`, for the card.

    Returns:
        Upload

    Raises:
        HubError: the folder is no checkpoint, or a damaged one; results of something else.
    """
    from training.checkpoint import find_damage

    folder = Path(checkpoint)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise HubError(f"checkpoint {str(checkpoint)!r} has no config.json, so it is no checkpoint; give its folder")
    if (folder / "training_state" / "manifest.json").is_file() and (damage := find_damage(folder)):
        raise HubError(f"checkpoint {str(checkpoint)!r} is damaged: {damage}; push another one")
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _matches(path.relative_to(folder).as_posix(), _LEFT_OUT)
    }
    if not any(path.endswith(".safetensors") for path in files):
        raise HubError(
            f"checkpoint {str(checkpoint)!r} has no weights (*.safetensors); give the folder that holds them"
        )
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_read_json(index).get("weight_map", {}).values())
        if missing := sorted(shards - files.keys()):
            raise HubError(
                f"checkpoint {str(checkpoint)!r} is not whole: {index.name} names {missing[0]}, which is missing"
            )
    if "tokenizer_config.json" not in files:
        raise HubError(f"checkpoint {str(checkpoint)!r} has no tokenizer; put one there with tokenizer.save_pretrained")
    run = Run(folder)
    has_own_license = any(Path(path).stem.upper() == "LICENSE" for path in files)
    if not has_own_license:
        files["LICENSE"] = _LICENSE
    if "README.md" in files:
        if results:
            raise HubError(
                f"--results: {str(folder / 'README.md')!r} is the card already; remove it to have one written"
            )
    else:
        config = _read_config(config_file)
        card = model_card(
            folder,
            repo_id,
            config=config,
            parameters=_count_parameters(folder),
            run=run,
            results=[read_results(path, folder) for path in results],
            license_id=None if has_own_license else "mit",
        )
        files["README.md"] = card.encode()
        if run.curves is not None:
            files["curves.png"] = run.curves
    return Upload(files, f"Upload {folder.name}" if run.step is None else f"Step {run.step:,}")


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise HubError(f"{str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    return content


def _read_config(path):
    config = _read_json(path)
    kind = config.get("model_type")
    if kind not in ("gpt2repro", "gpt2"):
        raise HubError(
            f"{str(path)!r} is of a {kind!r} model, for which no card can be written here: put a README.md beside it, "
            "or share it with `hf upload`"
        )
    return config


def _count_parameters(folder):
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise HubError(f"{str(path)!r} cannot be read ({error}); push another checkpoint") from error
    return count


def _matches(path, patterns):
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def _is_same(remote, source):
    """Whether a file on the Hub is this one, by the hash that the Hub has of it."""
    content = source if isinstance(source, bytes) else source.read_bytes()
    if remote.lfs is not None:
        return hashlib.sha256(content).hexdigest() == remote.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id  # git's


def _asked(ask, name, *, has_arrived=None, of_interest=()):
    """
    ask(), again while there is hope.

    Args:
        name: of the repository, for messages.
        has_arrived: called before trying again; what it gives is the answer, None: try again.
        of_interest: exceptions that the caller wants to have.

    Raises:
        HubError: it was not to be had, in a user's words.
    """
    from huggingface_hub import errors

    # The client's base class for what its HTTP library raises, whichever library that is in its version.
    problems = (errors.HfHubHTTPError.__bases__[0], OSError, RuntimeError)
    attempt = 0
    while True:
        attempt += 1
        try:
            if attempt > 1 and has_arrived is not None and (answer := has_arrived()) is not None:
                return answer
            return ask()
        except of_interest:
            raise
        except errors.OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set: unset it to push") from None
        except problems as error:
            _raise_if_final(error, name, attempt)
        time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))


def _raise_if_final(error, name, attempt):
    """Raises HubError where trying again is of no use. Without the cause, whose request holds the token."""
    from huggingface_hub import constants

    status, reason = _reason(error)
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError | TimeoutError):
        raise HubError(f"{error.filename or 'a file of the checkpoint'} cannot be read ({error.strerror})") from None
    if status == 401:
        raise HubError(
            f"{constants.ENDPOINT} does not accept this machine's token (of HF_TOKEN, or of `hf auth login`): make one "
            "that may write in the settings of your account there"
        ) from None
    if status in (403, 404):
        raise HubError(
            f"this machine's token may not write to {name} ({reason}): check the owner's name, and that the token may "
            "write there"
        ) from None
    if status in (409, 412):
        raise HubError(
            f"{name} has changed since this push began ({reason}): somebody else pushed. Nothing of this push is "
            "there; look at what is, and push again"
        ) from None
    is_final = status is not None and 400 <= status < 500 and status not in (408, 429)
    if is_final or attempt == _ATTEMPTS:
        tried = "" if is_final else f" after {attempt} attempts"
        raise HubError(
            f"{name} could not be pushed to {constants.ENDPOINT}{tried} ({reason}); check the network and HF_ENDPOINT, "
            "and push again: what was uploaded is not sent twice"
        ) from None


def _reason(error):
    """(HTTP status or None, a phrase)"""
    while True:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            said = " ".join((getattr(error, "server_message", None) or "").split())
            return status, f"HTTP {status}" + (f", {said[:200]}" if said else "")
        if error.__cause__ is None:
            return None, " ".join(str(error).split())[:200] or type(error).__name__
        error = error.__cause__
