"""
A checkpoint to the Hub: one commit with everything in it, so that a repository never shows half a model.

The Hub's own client uploads (HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE and the proxy settings hold).
The token stays in it, and out of what is raised here.
"""

import atexit
import contextlib
import fnmatch
import hashlib
import json
import random
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

from transformers import GPT2Config

from common.checkpoints import resolve_checkpoint
from common.weights import weights_problem
from eval.checkpoint import weights_sha256
from hub import HubError
from hub.card import UNREADABLE, Run, model_card, read_results
from modeling_gpt2repro import GPT2ReproConfig

_ATTEMPTS = 5
_OFFLINE = "HF_HUB_OFFLINE is set: unset it to push"
_FIRST_PAUSE_SECONDS = 1.0  # then 2, 4, ...
_LICENSE = Path(__file__).parent.parent / "LICENSE"
_CONFIGS = {"gpt2repro": GPT2ReproConfig, "gpt2": GPT2Config}
# What only resuming reads (trainer_state.json is the Trainer's, and names folders of this machine), what is hidden,
# and pickles, which run code when they are opened.
_LEFT_OUT = (
    "training_state/*",
    "trainer_state.json",
    ".*",
    "*/.*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.pickle",
    "*.ckpt",
)
# What an earlier push may have left at the root: from_pretrained would open it in the place of what is there now.
_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


def check_repo_id(name: str) -> None:
    """Raise HubError for what is not the id of a repository, USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{name!r} is not the name of a repository, USER/NAME ({error})") from None
    if "/" not in name:
        raise HubError(f"{name!r} does not say whose repository it is: give USER/{name}, with your name on the Hub")


class Upload(NamedTuple):
    """What a commit brings."""

    files: dict
    """{path in the repository: Path or bytes}"""
    message: str


class Repository:
    """A model's repository on the Hub that this machine may write to."""

    def __init__(self, name, *, private=True):
        """
        Asks whether it could be pushed to; nothing changes there.

        Args:
            name: "owner/name".
            private: whether only its owner sees it. That of a repository that exists stays as it is, and must not be
                more open than asked for.

        Raises:
            HubError: no token, or one that may not write; no such owner; a public repository though private was asked
                for; no network.
        """
        from huggingface_hub import HfApi, constants, get_token

        check_repo_id(name)
        if constants.HF_HUB_OFFLINE:
            raise HubError(_OFFLINE)
        token = get_token()
        if token is None:
            raise HubError("not logged in to the Hub: run `hf auth login` or set HF_TOKEN (a token with write access)")
        if not (token.isascii() and token.isprintable()):
            raise HubError(
                "the token (of HF_TOKEN, or of `hf auth login`) has characters that no token has: give it anew"
            )
        self.name, self._private, self._api = name, private, HfApi()
        _asked(self._check_token, name)
        info = self._find()
        if private and info is not None and info.private is False:
            raise HubError(
                f"{self.name} exists and everybody can see it: say --public to push there all the same, or choose "
                "another name"
            )
        self.is_private = private if info is None else info.private is not False

    def _find(self):
        """What the Hub says of the repository; None if there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with contextlib.suppress(RepositoryNotFoundError):
            return _asked(lambda: self._api.repo_info(self.name), self.name, of_interest=[RepositoryNotFoundError])
        return None

    def _check_token(self):
        who = self._api.whoami()
        token = who.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise HubError(
                f"the token {token.get('displayName', '')!r} of {who['name']} may only read: make another with "
                "the permission to write, and give it to `hf auth login` or HF_TOKEN"
            )
        owner = self.name.partition("/")[0]
        if owner.lower() not in {name.lower() for name in (who["name"], *(org["name"] for org in who.get("orgs", [])))}:
            raise HubError(f"the token is {who['name']}'s, who may not write to {owner}'s {self.name}: check the name")

    def push(self, upload):
        """
        Args:
            upload: Upload.

        Returns:
            (the commit's address, weights of an earlier push that it removed)

        Raises:
            HubError: nothing of it is on the Hub, and why.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.hf_api import RepoFile

        files = upload.files
        if (info := self._find()) is None:
            _asked(lambda: self._api.create_repo(self.name, private=self._private, exist_ok=True), self.name)
            info = _asked(lambda: self._api.repo_info(self.name), self.name)
        head = info.sha
        there = _asked(lambda: list(self._api.list_repo_tree(self.name, revision=head, recursive=True)), self.name)
        remote = {entry.path: entry for entry in there if isinstance(entry, RepoFile)}
        stale = [path for path in remote if path not in files and _WEIGHTS.fullmatch(path)]

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

        return _asked(commit, self.name, has_arrived=has_arrived), stale


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
        self._repository, self._say = repository, say
        self._ended = None  # an Event: is set when the last one that was started is over
        self._folder, self._is_pushed = None, False  # the last one that was tried
        self.reading = set()
        """folders that must stay for now"""
        atexit.register(self._say_what_is_dropped)

    def push(self, folder):
        """Starts to, unless one is under way: then this one is left out, since there will be others."""
        if self._is_under_way():
            self._say(f"not pushed {folder}: the push before it is still under way")
            return
        self.reading.add(folder)
        self._start(folder)

    def finish(self, folder, *, is_stopped=lambda: False):
        """
        Waits for what is under way and pushes the last checkpoint.

        Args:
            is_stopped: asked a few times a second; what is still to do is dropped when it says yes.

        Returns:
            whether it is on the Hub.
        """
        self._start(folder, after=self._ended)
        while self._is_under_way() and not is_stopped():
            self._ended.wait(0.2)  # not the thread's join(), which Ctrl-C makes believe that the thread is over
        return self._is_pushed and not self._is_under_way()

    def _is_under_way(self):
        return self._ended is not None and not self._ended.is_set()

    def _start(self, folder, after=None):
        ended = threading.Event()

        def push():
            try:
                if after is not None:
                    after.wait()
                self._push(folder)
            finally:
                ended.set()

        self._folder, self._ended = folder, ended
        # Not an executor's, which would keep a program that was asked to stop from ending.
        threading.Thread(target=push, daemon=True).start()

    def _say_what_is_dropped(self):
        """At the program's end, which is the thread's too."""
        if self._is_under_way():
            self._say_by_hand(self._folder, "the program ended before")

    def _say_by_hand(self, folder, why):
        self._say(
            f"warning: {folder} is not on the Hub: {why}. To push it by hand: python -m hub push {folder} "
            f"{self._repository.name}"
        )

    def _push(self, folder):
        try:
            address, _ = self._repository.push(prepare_upload(folder, self._repository.name))
            self._say(f"pushed    {folder} to {address}")
            self._is_pushed = True
        except Exception as error:  # whatever it is, training is not to end for it
            self._say_by_hand(folder, error if isinstance(error, HubError) else type(error).__name__)
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

    checkpoint = resolve_checkpoint(checkpoint)
    folder = Path(checkpoint)
    config_file = folder / "config.json"
    try:
        if folder.is_dir() and (problem := weights_problem(folder)):
            raise HubError(f"checkpoint {str(checkpoint)!r}: {problem}")
        if not config_file.is_file():
            raise FileNotFoundError("it has no config.json")
    except OSError as error:  # another: a name too long, a folder of somebody else's
        raise HubError(f"{str(checkpoint)!r} is no checkpoint ({error}); give a checkpoint's folder") from error
    if (folder / "training_state").is_dir() and (damage := find_damage(folder)):
        raise HubError(f"checkpoint {str(checkpoint)!r} is damaged: {damage}; push another one")
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    files = {name: folder / name for name in names if not any(fnmatch.fnmatch(name, p) for p in _LEFT_OUT)}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if "model.safetensors" in files:
            raise HubError(
                f"checkpoint {str(checkpoint)!r} has model.safetensors and {index.name}: remove the stale one"
            )
        try:
            shards = set(_read_json(index)["weight_map"].values())
        except (KeyError, AttributeError, TypeError):
            raise HubError(f"{str(index)!r} has no weight_map that names files") from None
        if missing := sorted(shards - files.keys()):
            raise HubError(
                f"checkpoint {str(checkpoint)!r} is not whole: {index.name} names {missing[0]}, which is missing"
            )
    if "tokenizer_config.json" not in files:
        raise HubError(f"checkpoint {str(checkpoint)!r} has no tokenizer; put one there with tokenizer.save_pretrained")
    run, config = Run(folder), _read_json(config_file)
    if run.evaluation is not None and run.evaluation["val_loss"] is None:
        raise HubError(
            f"checkpoint {str(checkpoint)!r}: its validation loss is not finite, the training diverged: "
            "push an earlier one"
        )
    num_parameters = _count_parameters(folder)
    if config.get("model_type") == "gpt2repro" and not run.has_own_license:
        files["LICENSE"] = _LICENSE  # of the modeling files, which travel along
    if "README.md" in files:
        try:
            files["README.md"].read_text(encoding="utf-8")
        except ValueError:
            raise HubError(f"{str(folder / 'README.md')!r} is not UTF-8 text: convert it first") from None
        if results:
            raise HubError(
                f"--results: {str(folder / 'README.md')!r} is the card already; remove it to have one written"
            )
    else:
        weights = weights_sha256(folder) if results else None
        known = {
            "config": _shape(config_file, config),
            "parameters": num_parameters,
            "results": [read_results(path, folder, weights) for path in results],
        }
        try:
            card = model_card(repo_id, run=run, **known)
        except UNREADABLE as error:
            if run.folder is None:
                raise
            raise HubError(
                f"{str(run.folder / 'provenance.json')!r} or metrics.jsonl beside it is not as train.py writes it "
                f"({type(error).__name__}: {error}): mend it, or copy the checkpoint out of the run"
            ) from error
        files["README.md"] = card.encode()
        if run.curves is not None:
            files["curves.png"] = run.curves.read_bytes()  # training may draw it anew while it is sent
    return Upload(files, f"Upload {folder.name}" if run.step is None else f"Step {run.step:,}")


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise HubError(f"{str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    return content


def _shape(path, content):
    """The config, with what its class fills in where config.json is silent."""
    kind = content.get("model_type")
    if kind not in _CONFIGS:
        raise HubError(
            f"{str(path)!r} is of a {kind!r} model, for which no card can be written here: put a README.md beside it, "
            "or share it with `hf upload`"
        )
    try:
        return _CONFIGS[kind].from_dict(content)
    except Exception as error:  # what transformers raises for a broken one is of every kind
        raise HubError(f"{str(path)!r} is no config of a GPT-2 ({type(error).__name__}: {error})") from error


def _count_parameters(folder: Path) -> int:
    """Count the parameters in a folder's weights. Raises HubError where one is not finite: the training diverged."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    if not tensor.isfinite().all():
                        raise HubError(
                            f"{str(path)!r}: {name} is not finite, the training diverged; push an earlier checkpoint"
                        )
                    count += tensor.numel()
        except (OSError, SafetensorError) as error:
            raise HubError(f"{str(path)!r} cannot be read ({error}); push another checkpoint") from error
    return count


def _is_same(remote, source):
    """Whether a file on the Hub is this one, by the hash that the Hub has of it."""
    if remote.lfs is not None and not isinstance(source, bytes):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == remote.lfs.sha256
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
    problems = (errors.HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError)
    attempt = 0
    while True:
        attempt += 1
        try:
            if attempt > 1 and has_arrived is not None and (answer := has_arrived()) is not None:
                return answer
            return ask()
        except (HubError, *of_interest):
            raise
        except errors.OfflineModeIsEnabled:
            why = _OFFLINE
        except problems as error:
            why = _why_final(error, name, attempt)
        if why is not None:
            # Only now, when the problem is forgotten: its request holds the token, and an exception that is raised
            # while another is handled leads to that one.
            raise HubError(why)
        time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))


def _why_final(error, name, attempt):
    """What to tell the user where trying again is of no use; None where it is."""
    from huggingface_hub import constants

    status, url, reason = _reason(error)
    if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError | TimeoutError):
        return f"{error.filename or 'a file of the checkpoint'} cannot be read ({error.strerror})"
    if status is None and isinstance(error, ValueError):
        return f"{constants.ENDPOINT} does not take the push, or is no Hub ({type(error).__name__}: {reason})"
    if status == 401:
        return (
            f"{constants.ENDPOINT} does not accept this machine's token (of HF_TOKEN, or of `hf auth login`): make one "
            "that may write in the settings of your account there"
        )
    is_hubs_own = url.startswith(constants.ENDPOINT)  # and not its storage's, whose addresses expire
    if status in (403, 404) and is_hubs_own:
        return (
            f"this machine's token may not write to {name} ({reason}): check the owner's name, and that the token may "
            "write there"
        )
    if status in (409, 412):
        known = "Nothing of this push is there" if attempt == 1 else "Whether this push came before is not known"
        return f"{name} has changed since this push began ({reason}): somebody else pushed. {known}; look at it first"
    is_final = status is not None and 400 <= status < 500 and status not in (403, 408, 429)
    if is_final or attempt == _ATTEMPTS:
        tried = "" if is_final else f" after {attempt} attempts"
        return (
            f"{name} could not be pushed to {constants.ENDPOINT}{tried} ({reason}); check the network and HF_ENDPOINT, "
            "and push again: what was uploaded is not sent twice"
        )
    return None


def _reason(error):
    """(HTTP status or None, the address that answered, a phrase)"""
    while True:
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) is not None:
            said = " ".join((getattr(error, "server_message", None) or "").split())
            status = response.status_code
            return status, str(response.url), f"HTTP {status}" + (f", {said[:200]}" if said else "")
        if error.__cause__ is None:
            return None, "", " ".join(str(error).split())[:200] or type(error).__name__
        error = error.__cause__
