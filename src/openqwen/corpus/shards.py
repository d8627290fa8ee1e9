"""Token shards: what training reads. One flat file of little-endian uint32 for each source,
memory-mapped.

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

from openqwen.corpus.documents import count_documents, read_documents
from openqwen.corpus.vocabulary import vocabulary_effort
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import read_json, sha256, write_json
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, TOKENIZER, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer

_BATCH = 256  # documents tokenized together, on all cores
_REMAKE = "make the token shards again: delete this folder's stage and rerun it"


class TokensConfig(Settings):
    """Text to token ids; everything is decided by the tokenizer."""


class _Writer:
    """One source's shard while it grows."""

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
    """Tokenize a Parquet file of documents into shards under `folder`, one a source, and
    tokens.json over all.

    Returns {source: {"tokens", "documents", "bytes"}} (bytes of text); tokens count the closing
    ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, _Writer] = {}
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
                    writers[source] = _Writer(
                        files.enter_context(open(folder / f"{source}.bin", "wb"))
                    )
                closed = np.append(ids[start:end], np.uint32(tokenizer.endoftext_id))
                writers[source].add(closed, len(document["text"].encode("utf-8")))
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
    """A source's tokens, memory-mapped: `tokens` [tokens] uint32 and `offsets` [documents + 1]
    int64.

    The index is checked against the files' sizes on opening, and against their SHA-256 with
    verify=True.
    """

    def __init__(self, folder: Path, source: str, verify: bool = False):
        self.source = source
        binary, offsets = folder / f"{source}.bin", folder / f"{source}.offsets.npy"
        index = read_json(folder / f"{source}.json")
        if (
            not isinstance(index, dict)
            or not {"tokens", "documents", "sha256", "offsets_sha256"} <= index.keys()
        ):
            raise OpenQwenError(
                "This is not the index of a token shard.",
                where=folder / f"{source}.json",
                do=_REMAKE,
            )
        for path in (binary, offsets):
            if not path.is_file():
                raise OpenQwenError("A token shard is missing.", where=path, do=_REMAKE)
        found = binary.stat().st_size
        if found != 4 * index["tokens"]:
            what = (
                f"A token shard has {found:,} bytes where its index says {4 * index['tokens']:,}."
            )
            raise OpenQwenError(what, where=binary, do=_REMAKE)
        self.offsets = _load_offsets(offsets, index)
        if verify:
            for path, digest in ((binary, index["sha256"]), (offsets, index["offsets_sha256"])):
                if sha256(path) != digest:
                    raise OpenQwenError(
                        "A token shard does not have its checksum.", where=path, do=_REMAKE
                    )
        self.tokens = np.memmap(binary, dtype="<u4", mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each document, its `<|endoftext|>` counted."""
        return np.diff(self.offsets)

    def document(self, number: int) -> np.ndarray:
        """[length] uint32 tokens of one document, closed by `<|endoftext|>`; a view, not a copy."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)} in shard {self.source}")
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


def _load_offsets(path: Path, index: dict[str, Any]) -> np.ndarray:
    try:
        offsets = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise OpenQwenError(
            f"A shard's offsets cannot be read: {error}", where=path, do=_REMAKE
        ) from None
    sound = (
        offsets.shape == (index["documents"] + 1,)
        and offsets[0] == 0
        and offsets[-1] == index["tokens"]
        and bool((np.diff(offsets) > 0).all())
    )
    if not sound:
        raise OpenQwenError("A shard's offsets do not fit its index.", where=path, do=_REMAKE)
    return offsets


def run_tokens(run: StageRun) -> dict[str, float]:
    """The corpus's training documents → token shards."""
    table = write_shards(
        run.inputs["corpus"] / "train.parquet", load_tokenizer(run.inputs["tokenizer"]), run.output
    )
    return {what: sum(s[what] for s in table.values()) for what in ("tokens", "documents")}


STAGE = Stage(
    name="tokens",
    help="Text to shards of token ids.",
    config=TokensConfig,
    inputs={"corpus": CORPUS, "tokenizer": TOKENIZER},
    outputs=["tokens"],
    run=run_tokens,
    estimate=vocabulary_effort,
)
