"""Folders of text and of shards, and llm.c's format read and written by independent code."""

import json
import struct

DOCUMENTS = [f"Document {i}. " + "Some words of it, again and again. " * (i % 7) for i in range(200)]


def jsonl(path, documents):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(text)}\n" for text in documents))
    return path


def jsonl_folder(folder, documents, files):
    """Divide documents evenly over files 0.jsonl, 1.jsonl, ..."""
    size = -(-len(documents) // files)
    for number in range(files):
        jsonl(folder / f"{number}.jsonl", documents[number * size : (number + 1) * size])
    return folder


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times_of(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def llm_c(tokens):
    """Encode tokens as llm.c's dev/data/data_common.py does."""
    return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def independent_read(path):
    """Read llm.c's format with struct alone."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    assert header == (20240520, 1, header[2], *[0] * 253)
    return list(struct.unpack(f"<{header[2]}H", content[1024:]))
