"""Data sets on the Hugging Face Hub: list their files and download them, with retries and checks.

huggingface_hub downloads (so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxy settings apply). This module repeats
failed requests (common/hub.py), and checks each file's size and SHA-256 against those that the Hub lists.
"""

import functools
import hashlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from common.hub import HubRequestError, with_retries
from data import DataError
from data.sources import KINDS, Progress, Record, file_kind, file_records

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LISTING_SECONDS = 120.0  # timeout of the listing requests, which have none in the client


class HubRepository:
    """The files of one data set at one revision."""

    def __init__(
        self, dataset: str, *, revision: str = "main", commit: str | None = None, download_folder: str | Path
    ) -> None:
        """Record the names, `commit` if an earlier lookup found it, and the folder for downloaded files."""
        self.dataset, self.revision, self._commit = dataset, revision, commit
        self.download_folder = Path(download_folder)

    @property
    def commit(self) -> str:
        """The commit hash of the revision."""
        return self._commit or self._info.sha

    def pin(self, commit: str) -> None:
        """Use the commit of an earlier lookup; the branch may have moved since."""
        self._commit = commit

    @property
    def card(self) -> dict[str, Any]:
        """The data set's metadata: the YAML at the top of its README."""
        return self._info.card_data.to_dict() if self._info.card_data else {}

    @functools.cached_property
    def _info(self) -> Any:
        def request(api: "HfApi") -> Any:
            return api.dataset_info(self.dataset, revision=self.revision, expand=["sha", "cardData"])

        return self._with_retries(with_timeout(request), f"the data set {self.dataset}")

    def files(self, folder: str = "") -> list[dict[str, Any]]:
        """List {"path", "bytes", "sha256" (None for a small file)} of each file in a folder, sorted by path."""
        from huggingface_hub.hf_api import RepoFile

        def request(api: "HfApi") -> list[RepoFile]:
            tree = api.list_repo_tree(
                self.dataset, folder or None, recursive=True, revision=self.commit, repo_type="dataset"
            )
            return [entry for entry in tree if isinstance(entry, RepoFile)]

        entries = self._with_retries(with_timeout(request), f"the list of files of {self.dataset}/{folder}".rstrip("/"))
        files = [{"path": f.path, "bytes": f.size, "sha256": f.lfs.sha256 if f.lfs else None} for f in entries]
        return sorted(files, key=lambda file: file["path"])

    def fetch(self, file: dict[str, Any]) -> Path:
        """Download one of `files()`, check it, and return the path of the copy."""

        def request(api: "HfApi") -> Path:
            path = Path(
                api.hf_hub_download(
                    self.dataset,
                    file["path"],
                    repo_type="dataset",
                    revision=self.commit,
                    local_dir=self.download_folder,
                )
            )
            problem = _find_mismatch(path, file)
            if problem:
                path.unlink()
                raise OSError(problem)
            return path

        return self._with_retries(request, f"{self.dataset}/{file['path']}")

    def _with_retries(self, request: Callable[["HfApi"], Any], what: str) -> Any:
        """Return request(HfApi()); repeat it after errors that may be temporary."""
        from huggingface_hub import HfApi, constants, errors
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        try:
            return with_retries(
                lambda: request(HfApi()),
                raises=(
                    *(errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError),
                    *(errors.HFValidationError, errors.OfflineModeIsEnabled),
                ),
                log=lambda line: print(f"{what}: {line}", file=sys.stderr),
            )
        except errors.GatedRepoError as error:
            raise DataError(
                f"{self.dataset} is gated: accept its terms on {constants.ENDPOINT}/datasets/"
                f"{self.dataset} and log in with `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise DataError(
                f"no data set {self.dataset} on {constants.ENDPOINT}, or you may not read it: check the name, "
                "or log in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise DataError(f"{self.dataset} has no revision {self.revision!r}; check --revision") from error
        except errors.HFValidationError as error:
            raise DataError(f"{self.dataset!r} is not the name of a data set: {error}") from error
        except errors.OfflineModeIsEnabled as error:
            raise DataError(
                f"{what}: HF_HUB_OFFLINE is set; unset it, or use data on this machine "
                "(`files PATH`, `pretokenized FOLDER` or `sample`)"
            ) from error
        except HubRequestError as error:
            tried = "" if error.is_final else f" after {error.attempts} attempts"
            raise DataError(
                f"{what}: request to {constants.ENDPOINT} failed{tried} ({error.reason}); check the network, the proxy "
                "settings and HF_ENDPOINT, and run the same command again: finished files are kept"
            ) from error


def in_background(function: Callable[..., Any], *arguments: Any) -> Future:
    """Run a function in a daemon thread; an executor's thread would delay the program's exit."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def with_timeout(request: Callable[["HfApi"], Any]) -> Callable[["HfApi"], Any]:
    """Return a function that calls `request` and raises TimeoutError after _LISTING_SECONDS."""

    def request_with_timeout(api: "HfApi") -> Any:
        try:
            return in_background(request, api).result(_LISTING_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"no response in {_LISTING_SECONDS:.0f} seconds") from None

    return request_with_timeout


def _find_mismatch(path: Path, file: dict[str, Any]) -> str | None:
    """Compare a downloaded file with the Hub's size and SHA-256; None if both match."""
    size = path.stat().st_size
    if size != file["bytes"]:
        return f"received {size:,} of {file['bytes']:,} bytes"
    if file["sha256"] is not None:
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file["sha256"]:
                return "the SHA-256 of the received file is not the Hub's"
    return None


class HubSource:
    """The training split of a text data set on the Hub that has .parquet, .jsonl or .txt files."""

    def __init__(
        self,
        repository: HubRepository,
        *,
        subset: str | None = None,
        text_column: str = "text",
        separator: str | None = None,
        errors: str = "strict",
        keep: bool = False,
    ) -> None:
        """Record the settings; `inputs` looks for the files. See data.sources.FileSource.

        Args:
            subset: subset of the data set (a "config" in its card); None for the default.
            keep: keep the downloaded files.
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
    def provenance(self) -> dict[str, str]:
        """The commit that the requested revision points to."""
        return {"revision": self.repository.commit}

    def inputs(self) -> list[dict[str, Any]]:
        """List the files of the training split."""
        from fsspec.utils import glob_translate  # `datasets` translates these patterns with it

        patterns = self._patterns()
        folder = _folder_of(patterns) if patterns else ""
        files = self.repository.files(folder)
        if patterns:
            regexes = [re.compile(glob_translate(pattern)) for pattern in patterns]
            files = [file for file in files if any(regex.fullmatch(file["path"]) for regex in regexes)]
        else:
            files = _training_files(files, self.subset)
        readable = [file for file in files if file_kind(file["path"])]
        name = self.repository.dataset + (f" (subset {self.subset})" if self.subset else "")
        if not readable:
            suffixes = sorted({"".join(PurePosixPath(file["path"]).suffixes[-2:]) for file in files})
            raise DataError(
                f"{name}: no file of kind {', '.join(KINDS)} for training"
                + (f" (it has {', '.join(suffixes)})" if suffixes else "")
                + "; try the Hub's conversion to Parquet: --revision refs/convert/parquet"
            )
        best = next(kind for kind in (".parquet", ".jsonl", ".txt") if kind in {file_kind(f["path"]) for f in readable})
        return [file for file in readable if file_kind(file["path"]) == best]

    def _patterns(self) -> list[str] | None:
        """Return the globs of the subset's training files from the card; None if the card does not list files."""
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

    def fetch(self, file: dict[str, Any]) -> Path:
        """Download a file, see HubRepository.fetch."""
        return self.repository.fetch(file)

    def done_with(self, path: Path) -> None:
        """Remove the copy, unless `keep`."""
        if not self.keep:
            path.unlink(missing_ok=True)

    def records(self, file: dict[str, Any], path: Path, progress: Progress) -> Iterator[Record]:
        """Yield the documents of a file, see FileSource.records."""
        where = f"{self.repository.dataset}/{file['path']}"
        return file_records(
            path, where=where, text_column=self.text_column, separator=self.separator, progress=progress
        )


def _folder_of(patterns: Sequence[str]) -> str:
    """Return the deepest folder that contains all patterns, so that only its files are listed."""
    parts = []
    for level in zip(*(PurePosixPath(pattern).parts[:-1] for pattern in patterns), strict=False):
        if len(set(level)) > 1 or set("*?[") & set(level[0]):
            break
        parts.append(level[0])
    return "/".join(parts)


def _training_files(files: list[dict[str, Any]], subset: str | None) -> list[dict[str, Any]]:
    """Select training files by name, where the card does not list them: the subset's folder without test files."""
    if subset is not None:
        files = [file for file in files if subset in PurePosixPath(file["path"]).parts[:-1]]
        if not files:
            raise DataError(f"no folder {subset!r} in this data set, and its card names no subsets; check --subset")
    files = [file for file in files if not PurePosixPath(file["path"]).name.startswith((".", "README", "LICENSE"))]
    training = [file for file in files if re.search(r"(?<![a-z])train", file["path"])]
    other = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])")
    return training or [file for file in files if not other.search(file["path"])]
