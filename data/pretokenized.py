"""Import shards made by other tools: llm.c's, build-nanogpt's .npy, nanoGPT's train.bin and val.bin.

They are checked and used unchanged.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data import DataError
from data.hub import HubRepository
from data.manifest import MANIFEST, Manifest, record_tokenizer, split_of, unmanaged_shards
from data.nanogpt import nanogpt_tokenizer
from data.shards import HEADER_BYTES, HEADERLESS_NAMES, scan_shard
from data.tokenizer import GPT2_VOCABULARY, Tokenizer, Vocabulary, load_tokenizer

_NPY_HEADER_BYTES = 128
NAMES = "{name}_train_{number}.bin and {name}_val_{number}.bin (or .npy), or train.bin and val.bin"


def import_shards(
    folder: str | Path,
    out: str | Path,
    *,
    name: str = "imported",
    tokenizer: Tokenizer | None = None,
    max_tokens: int | None = None,
) -> Manifest:
    """Check the shards of a local folder and write a manifest that describes them, in the same folder or another.

    Args:
        tokenizer: the one that made them; None for that of nanoGPT's meta.pkl, or GPT-2's.
        max_tokens: take as many training shards as are needed for this many tokens.

    Raises:
        DataError: a shard is damaged, or has tokens outside the tokenizer's vocabulary.
    """
    out = Path(out)
    tokenizer = tokenizer or nanogpt_tokenizer(folder) or load_tokenizer()
    source = LocalShards(folder, max_tokens=max_tokens, vocabulary=tokenizer.vocabulary)
    if (out / MANIFEST).exists():
        raise DataError(f"{out} has a {MANIFEST} already; name another --out, or remove it")
    shards = []
    for part, file in enumerate(source.inputs()):
        entry = source.import_shard(file, source.fetch(file), out)
        shards.append({"file": entry.pop("file"), "split": entry.pop("split"), "part": part, **entry})
    out.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        name=name,
        source=source.settings,
        split_rule="by the names of the imported files",
        max_tokens=max_tokens,
        tokenizer=record_tokenizer(tokenizer, out),
        shards=shards,
    )
    manifest.write(out / MANIFEST)
    return manifest


class LocalShards:
    """A folder of shards on this machine. The files are not moved."""

    def __init__(
        self, folder: str | Path, *, max_tokens: int | None = None, vocabulary: Vocabulary = GPT2_VOCABULARY
    ) -> None:
        """Select the shards of a folder: all, or as many for training as are needed for `max_tokens`."""
        self.folder, self.max_tokens, self.vocabulary = Path(folder), max_tokens, vocabulary
        self.provenance: dict[str, str] = {}
        self.settings = {"kind": "pretokenized", "folder": str(folder)}

    def inputs(self) -> list[dict[str, Any]]:
        """List the shards to import."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; the name of a data set on the Hub looks like owner/name")
        shards = unmanaged_shards(self.folder)
        return _select_shards(
            [(split, {"path": path.name, "bytes": path.stat().st_size}) for split in shards for path in shards[split]],
            self.max_tokens,
            self.folder,
            self.vocabulary.dtype.itemsize,
        )

    def fetch(self, file: dict[str, Any]) -> Path:
        """Return the path of a shard."""
        return self.folder / file["path"]

    def import_shard(self, file: dict[str, Any], path: Path, folder: str | Path) -> dict[str, Any]:
        """Check a shard; return its entry in the manifest that `folder` will have, without its part."""
        name = path.name if self.folder.resolve() == Path(folder).resolve() else str(path.resolve())
        return _shard_entry(file, path, name, self.vocabulary)


class HubShards:
    """Shards on the Hub, for example kjj0/fineweb10B-gpt2."""

    def __init__(self, repository: HubRepository, *, max_tokens: int | None = None) -> None:
        """Select the shards of a data set, see LocalShards."""
        self.repository, self.max_tokens = repository, max_tokens
        self.settings = {
            "kind": "pretokenized",
            "dataset": repository.dataset,
            "asked_revision": repository.revision,
        }

    @property
    def provenance(self) -> dict[str, str]:
        """The commit that the requested revision points to."""
        return {"revision": self.repository.commit}

    def inputs(self) -> list[dict[str, Any]]:
        """List the shards to import."""
        shards = [(split_of(file["path"]), file) for file in self.repository.files()]
        return _select_shards(
            [(split, file) for split, file in shards if split], self.max_tokens, self.repository.dataset
        )

    def fetch(self, file: dict[str, Any]) -> Path:
        """Download a shard, see HubRepository.fetch."""
        return self.repository.fetch(file)

    def import_shard(self, file: dict[str, Any], path: Path, folder: str | Path) -> dict[str, Any]:
        """Check a shard and move it into the folder, see LocalShards.import_shard."""
        name = PurePosixPath(file["path"]).name
        entry = _shard_entry(file, path, name)
        path.replace(Path(folder) / name)
        return entry


def _select_shards(
    shards: Sequence[tuple[str, dict[str, Any]]], max_tokens: int | None, where: object, itemsize: int = 2
) -> list[dict[str, Any]]:
    """Select from (split, file) pairs all of val, and as many of train as are needed for max_tokens."""
    for split in ("train", "val"):
        if not any(split == other for other, _ in shards):
            raise DataError(f"{where}: no {split} shards; they are recognized by their names, {NAMES}")
    selected, tokens = [], 0
    for split, file in sorted(shards, key=lambda shard: (shard[0], shard[1]["path"])):
        if split == "val" or max_tokens is None or tokens < max_tokens:
            selected.append(file)
            if split == "train":
                header = _NPY_HEADER_BYTES if file["path"].endswith(".npy") else HEADER_BYTES
                header = 0 if PurePosixPath(file["path"]).name in HEADERLESS_NAMES else header
                tokens += (file["bytes"] - header) // itemsize
    return selected


def _shard_entry(
    file: dict[str, Any], path: Path, name: str, vocabulary: Vocabulary = GPT2_VOCABULARY
) -> dict[str, Any]:
    scan = scan_shard(path, vocabulary=vocabulary)
    del scan["crc32_of_all"]
    return {"file": name, "split": split_of(file["path"]), **scan}
