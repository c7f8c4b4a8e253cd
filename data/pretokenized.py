"""Shards that somebody else has made: in llm.c's format, or build-nanogpt's .npy. Checked, and used as they are."""

from pathlib import Path, PurePosixPath

from data import DataError
from data.manifest import foreign_shards, split_of
from data.shards import HEADER_BYTES, scan_shard

_NPY_HEADER_BYTES = 128
NAMES = "{name}_train_{number}.bin and {name}_val_{number}.bin (or .npy)"


class LocalShards:
    """A folder of shards on this machine; they stay where they lie."""

    def __init__(self, folder, *, max_tokens=None):
        """
        Args:
            folder: where they are.
            max_tokens: take no more training shards than hold this many tokens.
        """
        self.folder, self.max_tokens, self.note = Path(folder), max_tokens, {}
        self.settings = {"kind": "pretokenized", "folder": str(folder)}

    def inputs(self):
        """
        Raises:
            DataError: no such folder, or no shards of one of the splits.
        """
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder, and a data set's name on the Hub looks like owner/name")
        found = foreign_shards(self.folder)
        return _chosen(
            [(split, {"path": path.name, "bytes": path.stat().st_size}) for split in found for path in found[split]],
            self.max_tokens,
            self.folder,
        )

    def fetch(self, file):
        return self.folder / file["path"]

    def adopt(self, file, path, folder):
        """
        Args:
            path: what `fetch` gave.
            folder: of the manifest.

        Returns:
            the manifest's entry of the shard, but for its part.

        Raises:
            DataError: it is not a whole shard.
        """
        name = path.name if self.folder.resolve() == Path(folder).resolve() else str(path.resolve())
        return _entry(file, path, name)


class HubShards:
    """Shards on the Hub, as kjj0/fineweb10B-gpt2 has them."""

    def __init__(self, repository, *, max_tokens=None):
        """
        Args:
            repository: data.hub.HubRepository.
            max_tokens: see LocalShards.
        """
        self.repository, self.max_tokens = repository, max_tokens
        self.settings = {
            "kind": "pretokenized",
            "dataset": repository.dataset,
            "asked_revision": repository.revision,
        }

    @property
    def note(self):
        """What asked_revision meant."""
        return {"revision": self.repository.commit}

    def inputs(self):
        """
        Raises:
            DataError: no such data set, or no shards of one of the splits in it.
        """
        shards = [(split_of(file["path"]), file) for file in self.repository.files()]
        return _chosen([(split, file) for split, file in shards if split], self.max_tokens, self.repository.dataset)

    def fetch(self, file):
        """See HubRepository.fetch."""
        return self.repository.fetch(file)

    def adopt(self, file, path, folder):
        """See LocalShards.adopt; the shard moves into the folder."""
        name = PurePosixPath(file["path"]).name
        entry = _entry(file, path, name)
        path.replace(Path(folder) / name)
        return entry


def _chosen(shards, max_tokens, where):
    """The files of (split, file) pairs: all of val, and of train as many as hold max_tokens."""
    for split in ("train", "val"):
        if not any(split == found for found, _ in shards):
            raise DataError(f"{where}: no {split} shards; they are recognised by their names, {NAMES}")
    chosen, tokens = [], 0
    for split, file in sorted(shards, key=lambda shard: (shard[0], shard[1]["path"])):
        if split == "val" or max_tokens is None or tokens < max_tokens:
            chosen.append(file)
            if split == "train":
                header = _NPY_HEADER_BYTES if file["path"].endswith(".npy") else HEADER_BYTES
                tokens += (file["bytes"] - header) // 2
    return chosen


def _entry(file, path, name):
    found = scan_shard(path)
    del found["crc32_of_all"]
    return {"file": name, "split": split_of(file["path"]), **found}
