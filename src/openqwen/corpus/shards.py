"""Token shards, which training reads: a flat file of little-endian uint32 for each source.

`<source>.bin` holds the documents' tokens end to end, each document closed by `<|endoftext|>`;
`<source>.offsets.npy` holds [documents + 1] int64 positions in it; `<source>.json` is the index
with counts and SHA-256 digests.
"""

import hashlib
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from openqwen.corpus.documents import TRAIN, count_documents, read_documents, utf8_size
from openqwen.corpus.vocabulary import vocabulary_effort
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import read_json, sha256, write_json
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, TOKENIZER, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer

_INDEX_KEYS = {"tokens", "documents", "sha256", "offsets_sha256"}
_BATCH = 256  # documents tokenized together, on all cores
_REMAKE = "make the token shards again: delete this folder and run the stage again"


class TokensConfig(Settings):
    """The `tokens` stage has no settings: the tokenizer decides everything."""


class _ShardWriter:
    """One source's shard while it is written."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.offsets = [0]
        self.bytes = 0
        self.digest = hashlib.sha256()

    def add(self, ids: np.ndarray, size: int) -> None:
        raw = ids.astype("<u4").tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.bytes += size


def write_shards(documents: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, int]]:
    """Tokenize a Parquet file of documents into `folder`: a shard for each source, and tokens.json.

    Returns what tokens.json holds, {source: {"tokens", "documents", "bytes"}}: the tokens include
    those that close documents; the bytes are of text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, _ShardWriter] = {}
    with (
        disk_errors(folder),
        ExitStack() as files,
        progress("tokenize", count_documents(documents), "documents") as bar,
    ):
        stream = read_documents(documents)
        while batch := list(islice(stream, _BATCH)):
            ids, offsets = tokenizer.encode_batch(document["text"] for document in batch)
            for document, start, end in zip(batch, offsets, offsets[1:]):
                source = document["source"]
                if source not in writers:
                    file = files.enter_context(open(folder / f"{source}.bin", "wb"))
                    writers[source] = _ShardWriter(file)
                closed = np.append(ids[start:end], np.uint32(tokenizer.endoftext_id))
                writers[source].add(closed, utf8_size(document["text"]))
            bar.advance(len(batch))
    table = {}
    for source, writer in writers.items():
        with disk_errors(folder):
            np.save(folder / f"{source}.offsets.npy", np.array(writer.offsets, dtype="<i8"))
        counts = {"tokens": writer.offsets[-1], "documents": len(writer.offsets) - 1}
        offsets_digest = sha256(folder / f"{source}.offsets.npy")
        index = {**counts, "sha256": writer.digest.hexdigest(), "offsets_sha256": offsets_digest}
        write_json(folder / f"{source}.json", index)
        table[source] = {**counts, "bytes": writer.bytes}
    write_json(folder / "tokens.json", table)
    return table


class TokenShard:
    """A source's tokens, memory-mapped.

    tokens: [tokens] uint32. offsets: [documents + 1] int64, where each document begins and the last
    ends. Opening checks the files' sizes against the index, verify=True also their SHA-256.
    """

    def __init__(self, folder: Path, source: str, verify: bool = False):
        self.source = source
        binary, offsets = folder / f"{source}.bin", folder / f"{source}.offsets.npy"
        path = folder / f"{source}.json"
        index = read_json(path)
        if not isinstance(index, dict) or not index.keys() >= _INDEX_KEYS:
            raise OpenQwenError("This is not the index of a token shard.", path, _REMAKE)
        for path in (binary, offsets):
            if not path.is_file():
                raise OpenQwenError("A token shard is missing.", path, _REMAKE)
        size, indexed = binary.stat().st_size, 4 * index["tokens"]
        if size != indexed:
            what = f"A token shard has {size:,} bytes, but its index says {indexed:,}."
            raise OpenQwenError(what, binary, _REMAKE)
        self.offsets = _load_offsets(offsets, index)
        for path, digest in ((binary, index["sha256"]), (offsets, index["offsets_sha256"])):
            if verify and sha256(path) != digest:
                raise OpenQwenError("A token shard does not have its checksum.", path, _REMAKE)
        self.tokens = np.memmap(binary, dtype="<u4", mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each document, with its `<|endoftext|>`."""
        return np.diff(self.offsets)

    def document(self, number: int) -> np.ndarray:
        """[length] uint32 tokens of one document with its `<|endoftext|>`; a view, not a copy."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)} in shard {self.source}")
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


def _load_offsets(path: Path, index: dict[str, Any]) -> np.ndarray:
    try:
        offsets = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        what = f"A shard's offsets cannot be read: {error}"
        raise OpenQwenError(what, path, _REMAKE) from None
    sound = (
        offsets.shape == (index["documents"] + 1,)
        and offsets[0] == 0
        and offsets[-1] == index["tokens"]
        and bool((np.diff(offsets) > 0).all())
    )
    if not sound:
        raise OpenQwenError("A shard's offsets do not fit its index.", path, _REMAKE)
    return offsets


def run_tokens(run: StageRun) -> dict[str, float]:
    """The corpus's training documents → token shards."""
    tokenizer = load_tokenizer(run.inputs["tokenizer"])
    table = write_shards(run.inputs["corpus"] / TRAIN, tokenizer, run.output)
    return {
        name: sum(counts[name] for counts in table.values()) for name in ("tokens", "documents")
    }


STAGE = Stage(
    name="tokens",
    help="Text to shards of token ids.",
    config=TokensConfig,
    inputs={"corpus": CORPUS, "tokenizer": TOKENIZER},
    outputs=["tokens"],
    run=run_tokens,
    estimate=vocabulary_effort,
)
