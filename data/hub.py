"""
Files of data sets on the Hugging Face Hub: which ones, and a checked copy of each, whatever the network does.

The Hub's own client downloads (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxy settings hold); what it gives up on
is tried again here with growing pauses, and what arrives is held against the size and SHA-256 that the Hub names.
"""

import hashlib
import random
import re
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path, PurePosixPath

from data import DataError
from data.sources import KINDS, file_kind, file_records

_ATTEMPTS = 6
_FIRST_PAUSE_SECONDS = 1.0  # then 2, 4, ...: half a minute in all
_LONGEST_PAUSE_SECONDS = 120.0
_LISTING_SECONDS = 120.0  # for which the client itself would wait without end


class HubRepository:
    """The files of one data set at one revision."""

    def __init__(self, dataset, *, revision="main", commit=None, download_folder):
        """
        Args:
            dataset: its id, "owner/name".
            revision: branch, tag or commit; what it means is looked up once.
            commit: what it meant when this was asked before.
            download_folder: where copies of files go.
        """
        self.dataset, self.revision, self._commit = dataset, revision, commit
        self.download_folder = Path(download_folder)
        self._card = None

    @property
    def commit(self):
        """The revision as a commit hash."""
        if self._commit is None:
            self._look_up()
        return self._commit

    def pin(self, commit):
        """What the revision meant when this was asked before, though it may mean another by now."""
        self._commit = commit

    @property
    def card(self):
        """The data set's metadata, a dict: the YAML at the head of its README."""
        if self._card is None:
            self._look_up()
        return self._card

    def _look_up(self):
        def request(api):
            return api.dataset_info(self.dataset, revision=self.revision, expand=["sha", "cardData"])

        info = self._with_retries(with_timeout(ask), f"the data set {self.dataset}")
        self._commit, self._card = self._commit or info.sha, info.card_data.to_dict() if info.card_data else {}

    def files(self, folder=""):
        """
        Args:
            folder: only what lies below it.

        Returns:
            list of {"path", "bytes", "sha256" (None for a small file)}, in the order of their paths.
        """
        from huggingface_hub.hf_api import RepoFile

        def request(api):
            tree = api.list_repo_tree(
                self.dataset, folder or None, recursive=True, revision=self.commit, repo_type="dataset"
            )
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        found = self._with_retries(with_timeout(ask), f"the list of files of {self.dataset}/{folder}".rstrip("/"))
        files = [{"path": f.path, "bytes": f.size, "sha256": f.lfs.sha256 if f.lfs else None} for f in found]
        return sorted(files, key=lambda file: file["path"])

    def fetch(self, file):
        """
        Args:
            file: one of `files()`.

        Returns:
            path of a local copy, whole.

        Raises:
            DataError: it was not to be had.
        """

        def request(api):
            path = Path(
                api.hf_hub_download(
                    self.dataset,
                    file["path"],
                    repo_type="dataset",
                    revision=self.commit,
                    local_dir=self.download_folder,
                )
            )
            problem = _mismatch(path, file)
            if problem:
                path.unlink()
                raise OSError(problem)
            return path

        return self._with_retries(ask, f"{self.dataset}/{file['path']}")

    def _with_retries(self, ask, what):
        """request(HfApi), again and again while there is hope."""
        from huggingface_hub import HfApi, constants, errors
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        # The client's base class for what its HTTP library raises, whichever library that is in its version.
        problems = (errors.HfHubHTTPError.__bases__[0], OSError, RuntimeError)
        attempt = 0
        while True:
            attempt += 1
            try:
                return request(HfApi())
            except errors.GatedRepoError as error:
                raise DataError(
                    f"{self.dataset} asks for consent: accept its terms on {constants.ENDPOINT}/datasets/"
                    f"{self.dataset} and log in with `hf auth login`"
                ) from error
            except errors.RepositoryNotFoundError as error:
                raise DataError(
                    f"no data set {self.dataset} on {constants.ENDPOINT}, or none that you may see: check the name, "
                    "or log in with `hf auth login`"
                ) from error
            except errors.RevisionNotFoundError as error:
                raise DataError(f"{self.dataset} has no revision {self.revision!r}; check --revision") from error
            except errors.HFValidationError as error:
                raise DataError(f"{self.dataset!r} is not the name of a data set: {error}") from error
            except errors.OfflineModeIsEnabled as error:
                raise DataError(
                    f"{what}: HF_HUB_OFFLINE is set; unset it, or use what is on this machine "
                    "(`files PATH`, `pretokenized FOLDER` or `sample`)"
                ) from error
            except problems as error:
                self._wait_or_give_up(error, what, attempt, constants.ENDPOINT)

    def _wait_or_give_up(self, error, what, attempt, endpoint):
        cause = error
        while cause.__cause__ is not None:  # the client says "not in the cache" where the network is the reason
            cause = cause.__cause__
        response = getattr(error, "response", None)
        if response is None:
            response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if getattr(error, "errno", None) is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            raise error  # the disk's, not the network's
        reason = f"HTTP {status}" if status else (" ".join(str(cause).split()) or type(cause).__name__)
        is_final = status is not None and 400 <= status < 500 and status not in (408, 416, 429)
        if is_final or attempt == _ATTEMPTS:
            tried = "" if is_final else f" after {attempt} attempts"
            raise DataError(
                f"{what} was not to be had from {endpoint}{tried} ({reason}); check the network, the proxy settings "
                "and HF_ENDPOINT, and run the same command again: finished files are kept"
            ) from error
        pause = _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
        asked = (getattr(response, "headers", None) or {}).get("retry-after", "")
        if str(asked).isdigit():
            pause = max(pause, float(asked))
        pause = min(pause, _LONGEST_PAUSE_SECONDS)
        print(f"{what}: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)


def in_background(function, *arguments):
    """A Future. Of a thread that does not outlive the program, as an executor's would."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def with_timeout(ask):
    """The same, with a TimeoutError after _LISTING_SECONDS."""

    def ask_in_time(api):
        try:
            return in_background(ask, api).result(_LISTING_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"no answer in {_LISTING_SECONDS:.0f} seconds") from None

    return ask_in_time


def _mismatch(path, file):
    """What is wrong with a downloaded file, or None."""
    size = path.stat().st_size
    if size != file["bytes"]:
        return f"{size:,} bytes came instead of {file['bytes']:,}"
    if file["sha256"] is not None:
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file["sha256"]:
                return "other bytes came than the Hub's SHA-256 is of"
    return None


class HubSource:
    """The training split of a text data set on the Hub, made of .parquet, .jsonl or .txt files."""

    def __init__(self, repository, *, subset=None, text_column="text", separator=None, errors="strict", keep=False):
        """
        Args:
            repository: HubRepository.
            subset: of the data set ("config"); None for its default.
            text_column, separator, errors: see data.sources.FileSource.
            keep: leave the downloaded files where they are.
        """
        self.repository, self.subset, self.keep = repository, subset, keep
        self.text_column, self.separator, self.errors = text_column, separator, errors
        self.settings = {
            "kind": "hub",
            "dataset": repository.dataset,
            "subset": subset,
            "asked_revision": repository.revision,
            "text_column": text_column,
            "separator": separator,
            "errors": errors,
        }

    @property
    def provenance(self):
        """What asked_revision meant."""
        return {"revision": self.repository.commit}

    def inputs(self):
        """
        Raises:
            DataError: no such data set or subset, no files that can be read.
        """
        from fsspec.utils import glob_translate  # what `datasets` reads these patterns with

        patterns = self._patterns()
        folder = _folder_of(patterns) if patterns else ""
        files = self.repository.files(folder)
        if patterns:
            wanted = [re.compile(glob_translate(pattern)) for pattern in patterns]
            files = [file for file in files if any(pattern.fullmatch(file["path"]) for pattern in wanted)]
        else:
            files = _training_files(files, self.subset)
        readable = [file for file in files if file_kind(file["path"])]
        name = self.repository.dataset + (f" (subset {self.subset})" if self.subset else "")
        if not readable:
            suffixes = sorted({"".join(PurePosixPath(file["path"]).suffixes[-2:]) for file in files})
            raise DataError(
                f"{name}: no file of kind {', '.join(KINDS)} for training"
                + (f" (it has {', '.join(suffixes)})" if suffixes else "")
                + "; the Hub's own conversion may have it: --revision refs/convert/parquet"
            )
        best = next(kind for kind in (".parquet", ".jsonl", ".txt") if kind in {file_kind(f["path"]) for f in readable})
        return [file for file in readable if file_kind(file["path"]) == best]

    def _patterns(self):
        """Globs of the subset's training files, from the card; None where it says nothing of files."""
        configs = [c for c in self.repository.card.get("configs") or [] if isinstance(c, dict) and c.get("config_name")]
        if not configs:
            return None
        names = [config["config_name"] for config in configs]
        if self.subset is None:
            config = next((c for c in configs if c.get("default") or c["config_name"] == "default"), configs[0])
        elif self.subset in names:
            config = configs[names.index(self.subset)]
        else:
            some = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise DataError(f"{self.repository.dataset} has no subset {self.subset!r}; it has {some}")
        files = config.get("data_files")
        if files is None:
            return None if config.get("data_dir") is None else [f"{config['data_dir'].strip('/')}/**"]
        if isinstance(files, list) and files and isinstance(files[0], dict):
            by_split = {entry.get("split"): entry.get("path") for entry in files}
            files = by_split.get("train")
            if files is None:
                raise DataError(
                    f"{self.repository.dataset} (subset {config['config_name']}) has no split 'train', only "
                    f"{', '.join(map(str, by_split))}"
                )
        return [pattern.removeprefix("./") for pattern in ([files] if isinstance(files, str) else files)]

    def fetch(self, file):
        """See HubRepository.fetch."""
        return self.repository.fetch(file)

    def done_with(self, path):
        """Removes the copy."""
        if not self.keep:
            path.unlink(missing_ok=True)

    def records(self, file, path, progress):
        """See FileSource.records."""
        where = f"{self.repository.dataset}/{file['path']}"
        return file_records(
            path, where=where, text_column=self.text_column, separator=self.separator, progress=progress
        )


def _folder_of(patterns):
    """The deepest folder that all patterns lie below: one short list of files instead of the whole repository's."""
    parts = []
    for together in zip(*(PurePosixPath(pattern).parts[:-1] for pattern in patterns), strict=False):
        if len(set(together)) > 1 or set("*?[") & set(together[0]):
            break
        parts.append(together[0])
    return "/".join(parts)


def _training_files(files, subset):
    """Where no card says which: those of the subset's folder, without what its name calls something else."""
    if subset is not None:
        files = [file for file in files if subset in PurePosixPath(file["path"]).parts[:-1]]
        if not files:
            raise DataError(f"no folder {subset!r} in this data set, and its card names no subsets; check --subset")
    files = [file for file in files if not PurePosixPath(file["path"]).name.startswith((".", "README", "LICENSE"))]
    training = [file for file in files if re.search(r"(?<![a-z])train", file["path"])]
    other = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])")
    return training or [file for file in files if not other.search(file["path"])]
