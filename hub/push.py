"""Push a checkpoint to the Hub in one commit, so that a repository never shows part of a model.

The commit is made by huggingface_hub's `create_commit`. Its `upload_folder` may split a push into several commits where
hf_xet is installed (2.4.0: more than 20 files, after refused commits). The token stays in huggingface_hub: it is in no
message and no exception of this module.
"""

import fnmatch
import itertools
import json
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from safetensors import SafetensorError, safe_open

from common.checkpoints import find_damage, resolve_checkpoint
from common.cli import say, shell_quote
from common.errors import UserError
from common.hub import HubRequestError, with_retries
from common.models import load_gpt2_config
from common.weights import weights_problem
from hub import HubError
from hub.card import eval_results_files, has_license_file, license_id, model_card, read_results, read_run

_LICENSE = Path(__file__).parent.parent / "LICENSE"
# Not pushed: what only resuming reads (the Trainer's state also names local folders, and its checkpoints are in the
# model's folder), hidden files, and pickles, which can run code when they are opened.
_IGNORED = (
    *("training_state/*", "trainer_state.json", "checkpoint-*/*", ".*", "*/.*"),
    *("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt"),
)
# Weights that an earlier push may have left at the root, where from_pretrained would prefer them to the new ones.
_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)

Result = TypeVar("Result")


class CommitPlan(NamedTuple):
    """Content of a commit."""

    files: dict[str, Path | bytes]  # {path in the repository: file or content}
    message: str


def collect_files(checkpoint: str | Path, repo_id: str, *, results: Sequence[str | Path] = ()) -> CommitPlan:
    """Check a checkpoint and collect the files to push, model card included. Nothing is sent.

    Args:
        checkpoint: folder of a model. A README.md in it is pushed unchanged; otherwise a model card is written.
        repo_id: "owner/name", for the card.
        results: files of `python -m eval --output`, for the card.

    Raises:
        UserError: the folder is not a complete checkpoint, or the results are not about its weights.
    """
    folder = Path(resolve_checkpoint(checkpoint))
    files = _checkpoint_files(folder)
    run, config = read_run(folder), _read_json(folder / "config.json")
    if run is not None and run["is_evaluated"] and run["val_loss"] is None:
        raise HubError(
            f"checkpoint {str(folder)!r}: its validation loss is not finite, the training diverged: push an earlier "
            "checkpoint"
        )
    num_parameters = _count_parameters(folder)
    if config.get("model_type") == "gpt2repro" and not has_license_file(folder):
        files["LICENSE"] = _LICENSE  # of the modeling files
    if "README.md" in files:
        readme = str(folder / "README.md")
        try:
            (folder / "README.md").read_text(encoding="utf-8")
        except ValueError:
            raise HubError(f"{readme!r} is not UTF-8 text: convert it first") from None
        if results:
            raise HubError(f"--results: {readme!r} is the card already; remove it to have one written")
    else:
        try:
            gpt2_config = load_gpt2_config(str(folder))
        except UserError as error:
            raise HubError(f"{error}. For other models, put a README.md there, or push with `hf upload`") from error
        scores = read_results(results, folder)
        card = model_card(
            repo_id,
            config=gpt2_config,
            num_parameters=num_parameters,
            run=run,
            license=license_id(run, folder),
            has_license_file=has_license_file(folder),
            results=scores,
        )
        files |= {"README.md": card.encode(), **eval_results_files(scores)}
        if run is not None and run["curves"] is not None:
            files["curves.png"] = run["curves"]
    return CommitPlan(files, f"Upload {folder.name}" if run is None else f"Step {run['step']:,}")


def _checkpoint_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a checkpoint that are pushed. Raises HubError if some are missing or damaged."""
    try:
        if folder.is_dir() and (problem := weights_problem(folder)):
            raise HubError(f"checkpoint {str(folder)!r}: {problem}")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError("no config.json")
    except OSError as error:  # also a name that is too long, or a folder without permission
        raise HubError(f"{str(folder)!r} is not a checkpoint ({error}); give a checkpoint's folder") from error
    if (folder / "training_state").is_dir() and (damage := find_damage(folder)):
        raise HubError(f"checkpoint {str(folder)!r} is damaged: {damage}; push another one")

    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    files: dict[str, Path | bytes] = {
        name: folder / name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in _IGNORED)
    }
    if "tokenizer_config.json" not in files:
        raise HubError(f"checkpoint {str(folder)!r} has no tokenizer; put one there with tokenizer.save_pretrained")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        if "model.safetensors" in files:
            raise HubError(f"checkpoint {str(folder)!r} has model.safetensors and {index.name}: remove the stale one")
        try:
            shards = set(_read_json(index)["weight_map"].values())
        except (KeyError, AttributeError, TypeError):
            raise HubError(f"{str(index)!r} has no weight_map that names files") from None
        if missing := sorted(shards - files.keys()):
            raise HubError(
                f"checkpoint {str(folder)!r} is incomplete: {index.name} names {missing[0]}, which is missing"
            )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise HubError(f"{str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    return content


def _count_parameters(folder: Path) -> int:
    """Count the parameters in a folder's weights. Raises HubError if one is not finite: the training diverged."""
    count = 0
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith((".attn.bias", ".attn.masked_bias")):
                        continue  # the causal mask, which OpenAI's file has as a tensor
                    tensor = file.get_tensor(name)
                    count += tensor.numel()
                    if not tensor.isfinite().all():
                        raise HubError(
                            f"{str(path)!r}: {name} is not finite, the training diverged; push an earlier checkpoint"
                        )
        except (OSError, SafetensorError) as error:
            raise HubError(f"{str(path)!r} cannot be read ({error}); push another checkpoint") from error
    return count


def check_repo_id(repo_id: str) -> None:
    """Raise HubError unless the name is that of a repository, USER/NAME."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not the name of a repository, USER/NAME ({error})") from None
    if "/" not in repo_id:
        raise HubError(f"{repo_id!r} has no owner: give USER/{repo_id}, with your name on the Hub")


class Repository:
    """A model repository on the Hub that this machine may write to."""

    def __init__(self, repo_id: str, *, private: bool = True) -> None:
        """Check that we may push. This changes nothing on the Hub.

        Args:
            repo_id: "owner/name".
            private: make a new repository private, and refuse to push to a public one.

        Raises:
            HubError: not logged in, no write access, a public repository but private=True, or no network.
        """
        check_repo_id(repo_id)
        if constants.HF_HUB_OFFLINE:
            raise HubError("HF_HUB_OFFLINE is set: unset it to push")
        token = get_token()
        if token is None:
            raise HubError("not logged in to the Hub: run `hf auth login` or set HF_TOKEN (write access)")
        if not (token.isascii() and token.isprintable()):
            raise HubError("the token (HF_TOKEN or `hf auth login`) has invalid characters: set it again")
        self.repo_id, self._api = repo_id, HfApi()
        self._check_token()
        self.is_private = self._request(lambda: self._is_private(default=private))
        if private and not self.is_private:
            raise HubError(
                f"{repo_id} exists and is public: give --public (train.py: --push_public) to push there, or choose "
                "another name"
            )

    def push(self, plan: CommitPlan) -> tuple[str, list[str]]:
        """Make one commit with all files of a plan, on top of the current commit. Creates the repository if necessary.

        Returns:
            (URL of the commit, weight files of an earlier push that it deleted)

        Raises:
            HubError: the commit was not made.
        """
        api, repo_id = self._api, self.repo_id
        self._request(lambda: api.create_repo(repo_id, private=self.is_private, exist_ok=True))
        info = self._request(lambda: api.model_info(repo_id))
        remote = [sibling.rfilename for sibling in info.siblings or []]
        stale = [path for path in remote if path not in plan.files and _WEIGHTS.fullmatch(path)]
        push_id = f"gpt2-repro push {uuid.uuid4().hex}"

        attempts = itertools.count()

        def commit() -> str:
            if next(attempts):  # an earlier attempt may have made the commit, and only the answer was lost
                for made in api.list_repo_commits(repo_id):
                    if push_id in made.message:
                        return f"{api.endpoint}/{repo_id}/commit/{made.commit_id}"
            # New operations for each attempt: huggingface_hub stores in them what it has done.
            operations = [CommitOperationAdd(path, source) for path, source in plan.files.items()]
            return api.create_commit(
                repo_id,
                [*operations, *(CommitOperationDelete(path) for path in stale)],
                commit_message=plan.message,
                commit_description=push_id,
                parent_commit=info.sha,
            ).commit_url

        return self._request(commit), stale

    def _is_private(self, *, default: bool) -> bool:
        try:
            return self._api.model_info(self.repo_id).private is not False
        except RepositoryNotFoundError:  # the first push creates it
            return default

    def _check_token(self) -> None:
        who = self._request(self._api.whoami)
        token = who.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise HubError(
                f"the token {token.get('displayName', '')!r} of {who['name']} is read-only: create one with write "
                "access and pass it to `hf auth login` or HF_TOKEN"
            )
        owner = self.repo_id.partition("/")[0]
        names = {name.lower() for name in (who["name"], *(org["name"] for org in who.get("orgs", [])))}
        if owner.lower() not in names:
            raise HubError(
                f"the token belongs to {who['name']}, who may not write to {owner}'s {self.repo_id}: check the name"
            )

    def _request(self, call: Callable[[], Result]) -> Result:
        """Return call(), and try again after errors that may pass. Raises HubError if no attempt succeeded."""
        try:
            return with_retries(call)
        except HubRequestError as failure:
            raise HubError(_explain(failure, self.repo_id)) from None
        except OSError as error:
            raise HubError(
                f"{error.filename or 'a file of the checkpoint'} cannot be read ({error.strerror})"
            ) from error


def push_last_checkpoint(
    repository: Repository, folder: Path, *, should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Push the last checkpoint of a run. A push that fails or is stopped is a warning with the command to push by hand.

    Args:
        should_stop: polled during the push, which ends if it returns True.

    Returns:
        True if the checkpoint is on the Hub.
    """
    disable_progress_bars()
    problem = "the program ended before the push did"

    def push() -> None:
        nonlocal problem
        try:
            url, _ = repository.push(collect_files(folder, repository.repo_id))
            say(f"pushed    {folder} to {url}")
            problem = ""
        except Exception as error:  # of any kind: the run itself has succeeded
            problem = str(error) if isinstance(error, UserError) else type(error).__name__

    # A thread, since a stop request only sets a flag, and a push takes long. A daemon, to end with us.
    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not should_stop():
            thread.join(0.2)
    finally:  # also after Ctrl-C
        if problem:
            say(
                f"warning: {folder} is not on the Hub: {problem}. To push it by hand: python -m hub push "
                f"{shell_quote(folder)} {repository.repo_id}{'' if repository.is_private else ' --public'}"
            )
    return not problem


def _explain(failure: HubRequestError, repo_id: str) -> str:
    endpoint, status, reason = constants.ENDPOINT, failure.status, failure.reason
    if status is None and failure.is_final:
        return f"{endpoint} rejected the push, or is not a Hub ({reason})"
    if status == 401:
        return f"{endpoint} rejected the token (HF_TOKEN or `hf auth login`): create one with write access"
    if status in (403, 404) and failure.is_from_hub:
        return f"the token may not write to {repo_id} ({reason}): check the owner's name and the token's access"
    if status in (409, 412):
        return f"{repo_id} has changed since this push began ({reason}). Nothing was pushed; look at it first"
    tried = "" if failure.is_final else f" (tried {failure.attempts} times)"
    return f"{repo_id} could not be pushed to {endpoint} ({reason}): check HF_ENDPOINT and the network{tried}"
