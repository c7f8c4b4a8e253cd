"""
manifest.json: what a folder of shards holds, where it came from, and the checksums that its tokens are held against.

data.prepare writes it last, so a folder that has one is whole. Until then the folder has preparing.json, the same
without shards. A folder without either holds somebody else's shards, and the names of its files decide.
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from common.cli import shell_quote
from data import DataError
from data.shards import REMEDY, open_shard, write_and_rename
from data.tokenizer import tokenizer_sha256

MANIFEST = "manifest.json"
PREPARING = "preparing.json"
FORMAT_VERSION = 2
SPLITS = ("train", "val")
_SEAL = "sha256_of_the_rest"
_MEND = (
    "restore it from a copy, or remove it and run `python -m data.prepare pretokenized DIR --out DIR`, which checks "
    "the shards in DIR and writes another"
)


@dataclass(kw_only=True)
class Manifest:
    """What stands in manifest.json."""

    name: str
    """the shards' names begin with it"""
    source: dict
    """where the documents came from, enough to fetch them again"""
    inputs: list = field(default_factory=list)
    """one {"path", "bytes", "part"} a file that was read, in order; parts are prepared independently of each other"""
    split_rule: str
    """how documents were dealt to train and val"""
    val_fraction: float | None = None
    """the share of documents asked for as val; None where somebody else dealt them"""
    shard_tokens: int | None = None
    """most tokens in a shard; None where somebody else made them"""
    max_tokens: int | None = None
    """the documents end before they have more tokens than this together"""
    tokenizer: str = "gpt2"
    """its name, and below what decides whether it is the same"""
    tokenizer_sha256: str = field(default_factory=tokenizer_sha256)
    """see data.tokenizer.tokenizer_sha256"""
    versions: dict = field(default_factory=dict)
    """of what made it: {"python": "3.11.7", "tiktoken": ...}"""
    format_version: int = FORMAT_VERSION
    """of the manifest"""
    shards: list = field(default_factory=list)
    """one {"file", "split", "part", "tokens", "documents", "sha256", "crc32"} a shard, in order (shards.scan_shard)"""

    def write(self, path):
        write_sealed(path, dataclasses.asdict(self))

    def total(self, split, key):
        """Sum of "tokens" or "documents" over the shards of a split."""
        return sum(shard[key] for shard in self.shards if shard["split"] == split)

    @property
    def num_parts(self):
        return max((file["part"] for file in self.inputs), default=0) + 1


def write_sealed(path, content):
    """A JSON object with a checksum of itself, so that a damaged one is told from a whole one."""
    content = {**content, _SEAL: _seal(content)}
    write_and_rename(path, (json.dumps(content, indent=1) + "\n").encode())


def read_sealed(path, mend=_MEND):
    """
    Args:
        mend: what to do about a damaged one, for the message.

    Returns:
        dict.

    Raises:
        DataError: it cannot be read, or is not what `write_sealed` wrote.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        seal = content.pop(_SEAL)
        is_whole = seal == _seal(content)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is damaged or no manifest ({type(error).__name__}: {reason}); {mend}") from error
    if not is_whole:
        raise DataError(f"{path} is damaged: its checksum is not that of its content; {mend}")
    return content


def _seal(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder, name=MANIFEST):
    """
    Args:
        name: MANIFEST or PREPARING.

    Returns:
        Manifest, or None where there is none.

    Raises:
        DataError: it cannot be read, is damaged, of another version, or speaks of another tokenizer.
    """
    path = Path(folder) / name
    if not path.exists():
        return None
    mend = _MEND if name == MANIFEST else f"remove {folder} and prepare it again"
    content = read_sealed(path, mend)
    if content.get("format_version") != FORMAT_VERSION:  # first: another format may have other keys
        raise DataError(
            f"{path}: format {content.get('format_version')!r}, this program reads {FORMAT_VERSION}; {mend}"
        )
    if content.get("tokenizer_sha256") != tokenizer_sha256():
        raise DataError(f"{path}: these shards were made with another tokenizer than GPT-2's; prepare them again")
    return Manifest(**content)


def is_to_be_prepared(folder):
    """Whether there is nothing in that place, or what an interrupted preparation left."""
    folder = Path(folder)
    return not folder.exists() or ((folder / PREPARING).exists() and not (folder / MANIFEST).exists())


def open_split(folder, split):
    """
    Args:
        split: "train" or "val".

    Returns:
        list of data.shards.Shard, in order.

    Raises:
        DataError: no such folder, one that is not finished, no shards of that split, or one of them is not whole.
    """
    folder = Path(folder)
    if folder.is_file():
        raise DataError(
            f"{folder} is a file, not a folder of shards. Make one of it with `python -m data.prepare files "
            f"{shell_quote(folder)} --out {shell_quote(Path('shards') / folder.stem)}`"
        )
    if not folder.is_dir():
        raise DataError(
            f"no data in {folder}: there is no such folder{_near(folder)} Make it with "
            f"`python -m data.prepare files YOUR_TEXT --out {shell_quote(folder)}` (or `sample`, for the offline "
            "sample)"
        )
    manifest = read_manifest(folder)
    if manifest is not None:
        shards = [open_entry(folder, entry) for entry in manifest.shards if entry["split"] == split]
    elif (folder / PREPARING).exists():
        raise DataError(
            f"{folder} is not finished: its preparation was interrupted or still runs. Run the same "
            "`python -m data.prepare` command again; it goes on where it stopped"
        )
    else:
        shards = [open_shard(path) for path in foreign_shards(folder).get(split, [])]
    if not shards:
        raise DataError(
            f"no {split} shards (*_{split}_*.bin) in {folder}; make them with "
            f"`python -m data.prepare files YOUR_TEXT --out DIR`"
        )
    return shards


def _near(folder: Path) -> str:
    """Name the folders next to it that are called almost the same, for a message."""
    try:
        names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        names = []
    near = difflib.get_close_matches(folder.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(folder.parent / name) for name in near)}?" if near else "."


def open_entry(folder, entry):
    """
    Args:
        folder: of the manifest.
        entry: one of its shards.

    Returns:
        data.shards.Shard.

    Raises:
        DataError: the file is missing, not a whole shard, or of another length than the manifest says.
    """
    path = Path(folder) / entry["file"]  # an absolute one stays what it is
    shard = open_shard(path, crc32=entry["crc32"])
    if len(shard) != entry["tokens"]:
        raise DataError(f"{path}: {len(shard):,} tokens, {MANIFEST} says {entry['tokens']:,}; {REMEDY}")
    return shard


def foreign_shards(folder):
    """
    Shards that came without a manifest: {name}_{split}_{number}.bin or .npy, as llm.c and build-nanogpt name them.

    Returns:
        {split: paths in order} of what was found.
    """
    found = {}
    for path in sorted(Path(folder).iterdir()):
        split = split_of(path)
        if split and not path.name.startswith("."):
            found.setdefault(split, []).append(path)
    return found


def split_of(path):
    """ "train", "val", or None where a file's name does not say that it is a shard."""
    path = PurePath(path)
    split = (path.stem.split("_")[-2:-1] or [""])[0]  # from the right: a name may well have "_val_" in it too
    return split if path.suffix in (".bin", ".npy") and split in SPLITS else None


def identity(folder):
    """
    What a folder of shards is, for provenance.json and the console.

    Returns:
        dict: train_tokens, val_tokens, shards (number of files), and, all None for shards that came without a
        manifest: manifest_sha256, train_sha256 (of the training shards' own, in order) and source.

    Raises:
        DataError: as `open_split`.
    """
    train, val = open_split(folder, "train"), open_split(folder, "val")
    manifest = read_manifest(folder)
    hashes = [entry["sha256"] for entry in manifest.shards if entry["split"] == "train"] if manifest else []
    return {
        "train_tokens": sum(len(shard) for shard in train),
        "val_tokens": sum(len(shard) for shard in val),
        "shards": len(train) + len(val),
        "manifest_sha256": manifest and hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest(),
        "train_sha256": manifest and hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "source": manifest and manifest.source,
    }
