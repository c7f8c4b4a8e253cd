"""Text data sets on the Hugging Face Hub.

`datasets` finds the files of a subset and split, and reads formats other than .parquet. The Hub's client sends all
requests, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the proxy settings apply.
"""

import codecs
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar

from fsspec.spec import AbstractBufferedFile

from common.errors import one_line
from common.hub import HubRequestError, with_retries
from common.jsonl import decompress, name_unreadable_file
from data import DataError, parquet
from data.sources import Document, decode_text

_TIMEOUT_SECONDS = 120.0  # of requests that have no timeout in the client: the lists of files
_READ_BYTES = 8_000_000  # of one request for a file that is read from front to back

Result = TypeVar("Result")


@dataclass
class DatasetSource:
    """One split of a text data set on the Hub. `tasks` sends the first request.

    A task is a piece of a .parquet file (data/parquet.py), or a file of another format that `datasets` reads.
    """

    dataset: str
    _: KW_ONLY
    subset: str | None = None
    """a "config" in the data set's card; None for the default"""
    split: str = "train"
    revision: str = "main"
    commit: str | None = None
    """of an earlier lookup, to continue with; the branch may have moved since"""
    text_column: str = "text"
    errors: str = "strict"
    """for bytes that are not UTF-8: "strict" raises, "replace" puts U+FFFD"""

    @property
    def settings(self) -> dict[str, Any]:
        """All but the commit."""
        return {
            "kind": "hub",
            "dataset": self.dataset,
            "subset": self.subset,
            "split": self.split,
            "asked_revision": self.revision,  # "revision" in the manifest is the commit
            "text_column": self.text_column,
            "errors": self.errors,
        }

    @property
    def provenance(self) -> dict[str, str]:
        """The commit that the revision pointed to; empty before `tasks` was called."""
        return {"revision": self.commit} if self.commit else {}

    def tasks(self) -> list[dict[str, Any]]:
        """List the pieces to read, in order: {"path", "bytes", "format", "size" of the file, "piece", "pieces"}."""
        self.commit = find_commit(self.dataset, self.revision, self.commit)
        ask = partial(ask_hub, dataset=self.dataset, revision=self.revision)
        builder = ask(partial(_open_builder, self.dataset, self.subset, self.commit), what="its files")
        splits = builder.config.data_files or {}
        if self.split not in splits:
            raise DataError(
                f"{self.dataset} (subset {builder.config.name}) has no split {self.split!r}, only {', '.join(splits)}; "
                "choose with --split"
            )
        data_format = builder.__module__.rpartition(".")[2]
        root = f"hf://datasets/{self.dataset}@{self.commit}/"
        paths = [url.removeprefix(root) for url in splits[self.split]]
        if elsewhere := [path for path in paths if "://" in path]:
            raise DataError(f"{self.dataset} has its files elsewhere ({elsewhere[0]}); download them and use `files`")
        sizes = ask(partial(_sizes, self.dataset, self.commit, paths), what="the sizes of its files")
        whole_file = {"piece": 0, "pieces": 1}
        return [
            {"path": path, "format": data_format, "size": size, **piece}
            for path, size in zip(paths, sizes, strict=True)
            for piece in (parquet.pieces(size) if data_format == "parquet" else [{"bytes": size, **whole_file}])
        ]

    def documents(self, task: Mapping[str, Any]) -> Iterator[Document]:
        """Yield the documents of a task."""
        where = f"{self.dataset}/{task['path']}"
        file: Any = HubFile(self.dataset, str(self.commit), task["path"], task["size"])
        kind = PurePosixPath(task["path"].removesuffix(".gz").removesuffix(".zst").removesuffix(".xz")).suffix
        if task["format"] == "parquet":
            texts = parquet.rows(file, task, text_column=self.text_column, where=where, errors=self.errors)
        elif kind in (".jsonl", ".txt"):
            texts = self._lines(file, where, is_json=kind == ".jsonl")
        else:
            texts = self._other_rows(task, where)
        yield from (Document(text) for text in texts if text is None or text.strip())

    def _lines(self, file: Any, where: str, *, is_json: bool) -> Iterator[str | None]:
        """Yield the text of each line of JSON, or of the entire .txt file.

        `datasets` refuses lines whose other fields change their type, and half surrogates; it joins CR LF.
        """
        decode = partial(decode_text, is_json=is_json, text_column=self.text_column, errors=self.errors)
        raw = io.BufferedReader(file, _READ_BYTES)
        with name_unreadable_file(where), decompress(raw, PurePosixPath(where).suffix) as stream:
            for number, content in enumerate(stream if is_json else [stream.read()], start=1):
                content = content.removeprefix(codecs.BOM_UTF8) if number == 1 else content
                if content.strip():
                    yield decode(content, locate=partial(_place, where, number))

    def _other_rows(self, task: Mapping[str, Any], where: str) -> Iterator[str | None]:
        """Yield the text of each row of a file that `datasets` reads."""
        import datasets

        silence(datasets)
        url = f"hf://datasets/{self.dataset}@{self.commit}/{task['path']}"
        number = 0
        try:
            rows = datasets.load_dataset(task["format"], data_files=[url], split="train", streaming=True)
            for batch in rows.iter(batch_size=64):
                if self.text_column not in batch:
                    raise parquet.missing_column(self.text_column, batch, where)
                for value in batch[self.text_column]:
                    number += 1
                    if not isinstance(value, str | None):
                        raise DataError(f"{where}:{number}: {self.text_column!r} is a {type(value).__name__}, not text")
                    yield value
        except DataError:
            raise
        except Exception as error:  # of any library that reads a format
            raise DataError(
                f"{where}: `datasets` cannot read this file after row {number} ({one_line(error)}); run the command "
                "again, or try the Hub's conversion to Parquet: --revision refs/convert/parquet"
            ) from None


class HubFile(AbstractBufferedFile):
    """A file of a data set on the Hub, read by range requests that are checked and repeated."""

    def __init__(self, dataset: str, commit: str, path: str, size: int) -> None:
        from huggingface_hub import hf_hub_url

        super().__init__(None, path, size=size, cache_type="none")
        self.dataset, self.url = dataset, hf_hub_url(dataset, path, repo_type="dataset", revision=commit)

    def _fetch_range(self, begin: int, end: int) -> bytes:
        return ask_hub(partial(self._request, begin, min(end, self.size)), self.dataset, self.path)

    def _request(self, begin: int, end: int) -> bytes:
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        response = get_session().get(self.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(response)
        content: bytes = response.content
        if response.status_code == 200 and len(content) == self.size:  # some storage ignores ranges
            content = content[begin:end]
        if len(content) != end - begin:  # never a shorter file than the Hub's
            raise OSError(f"received {len(content):,} of {end - begin:,} bytes")
        return content


def _place(where: str, number: int, byte: int) -> str:
    """Return "FILE:LINE" of any byte of a line."""
    return f"{where}:{number}"


def find_commit(dataset: str, revision: str, commit: str | None = None) -> str:
    """Return the commit of a revision, after checking that its files may be read; or `commit`, if given."""
    from huggingface_hub import HfApi

    def call() -> str:
        api = HfApi()
        info = api.dataset_info(dataset, revision=commit or revision, expand=["sha"], timeout=_TIMEOUT_SECONDS)
        api.auth_check(dataset, repo_type="dataset")  # a gated data set can be listed by everyone, but not read
        return str(info.sha)

    return ask_hub(call, dataset, "its description", commit or revision)


def ask_hub(call: Callable[[], Result], dataset: str, what: str, revision: str = "main") -> Result:
    """Return call(), which makes requests for `what` of a data set; repeat it after errors that may be temporary."""
    from huggingface_hub import constants, errors, get_session

    hub = constants.ENDPOINT
    final: dict[type[Exception], str] = {
        errors.GatedRepoError: (
            f"{dataset} is gated: accept its terms on {hub}/datasets/{dataset} and log in with `hf auth login`"
        ),
        errors.RepositoryNotFoundError: (
            f"no data set {dataset} on {hub}, or you may not read it: check the name, or log in with `hf auth login`"
        ),
        errors.RevisionNotFoundError: f"{dataset} has no revision {revision!r}; check --revision",
        errors.HFValidationError: f"{dataset!r} is not the name of a data set, which is OWNER/NAME",
        errors.OfflineModeIsEnabled: (
            f"{dataset}: HF_HUB_OFFLINE is set; unset it, or use data on this machine (`files PATH`, "
            "`pretokenized FOLDER` or `sample`)"
        ),
    }
    get_session().timeout = _TIMEOUT_SECONDS  # the client itself has none, and a silent server would hold us for ever
    try:
        log = partial(print, f"{dataset}, {what}:", file=sys.stderr)
        return with_retries(call, raises=tuple(final), log=log)
    except HubRequestError as error:
        tried = "" if error.is_final else f" after {error.attempts} attempts"
        problem = (
            f"{dataset}, {what}: request to {hub} failed{tried} ({error.reason}); check the network, the proxy "
            "settings and HF_ENDPOINT, and run the same command again: finished work is kept"
        )
    except tuple(final) as error:
        problem = next(text for kind, text in final.items() if isinstance(error, kind))
    raise DataError(problem)  # without the client's exception, which has the token


def _open_builder(dataset: str, subset: str | None, commit: str) -> Any:
    """Return the builder of `datasets`, which has found the files of the subset's splits."""
    import datasets
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    silence(datasets)
    # A new cache: without a network, `datasets` would give the newest set in its cache, whatever commit that has.
    with tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset_builder(dataset, subset, revision=commit, cache_dir=cache)
        except FileNotFoundError as error:
            failure: BaseException | None = error  # `datasets` hides failed requests behind "not found"
            while failure is not None:
                if isinstance(failure, HfHubHTTPError) and not isinstance(failure, EntryNotFoundError):
                    raise failure from None
                failure = failure.__cause__ or failure.__context__
            problem = f"{one_line(error)}; try the Hub's conversion to Parquet: --revision refs/convert/parquet"
        except ValueError as error:
            if "onfig" not in str(error):
                raise
            problem = f"{one_line(error, 600)}; choose with --subset"
        except RuntimeError as error:
            if "scripts" not in str(error):
                raise
            problem = (
                "a program makes this data set, and `datasets` no longer runs such programs; try the Hub's conversion "
                "to Parquet: --revision refs/convert/parquet"
            )
    raise DataError(f"{dataset}: {problem}")


def _sizes(dataset: str, commit: str, paths: list[str]) -> list[int]:
    """Return the sizes of files, which the list of files has; `datasets` does not keep them."""
    from huggingface_hub import HfFileSystem, constants

    files = HfFileSystem(endpoint=constants.ENDPOINT, token=None)  # as in `datasets`: the same list, still in memory
    return [files.info(f"datasets/{dataset}@{commit}/{path}")["size"] for path in paths]


def silence(datasets: Any) -> None:
    """Turn off the progress bars and warnings of `datasets`: data.prepare has its own."""
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
