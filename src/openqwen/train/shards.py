"""The inputs of pre-training: token shards, their mixture, and held-out text."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from openqwen.corpus import TokenShard
from openqwen.corpus.documents import halves, read_documents
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json
from openqwen.tokenizer import Tokenizer
from openqwen.train.packed_batch import Sample
from openqwen.train.packed_dataset import DataConfig
from openqwen.train.parallel import join


def held_out(
    corpus: Path,
    tokenizer: Tokenizer,
    context: int,
    tokens: int,
    order: np.random.Generator,
    source: str | None = None,
) -> list[Sample]:
    """`tokens` tokens of a corpus's held-out documents, shuffled, in samples of at most `context`.

    They come from the development half of the documents. The test half judges what these decide.

    source: take documents of this source alone.
    """
    samples: list[Sample] = []
    path = corpus / "heldout.parquet"
    documents, _ = halves(d for d in read_documents(path) if source in (None, d["source"]))
    for document in (documents[n] for n in order.permutation(len(documents))):
        ids = np.array([*tokenizer.encode(document["text"]), tokenizer.endoftext_id])
        for start in range(0, len(ids) - 1, context):
            part = ids[start : start + min(context, tokens) + 1]
            samples.append((part, np.ones(len(part), dtype=bool)))
            tokens -= len(part) - 1
            if tokens <= 0:
                return samples
    if not samples:
        raise OpenQwenError(
            f"There is no held-out text{f' of {source}' if source else ''} to score.",
            path,
            "give a corpus with a held-out split",
        )
    return samples


def token_sources(folder: Path) -> dict[str, TokenShard]:
    """The token shards of a folder, by source; rank 0 verifies their checksums."""
    return {
        name: TokenShard(folder, name, verify=join().main)
        for name in read_json(folder / "tokens.json")
    }


def weighted(data: DataConfig, corpus: Path, sources: Mapping[str, TokenShard]) -> DataConfig:
    """The settings with the corpus's weights as the mixture, where they name no mixture."""
    if data.mixture:
        return data
    table = read_json(corpus / "corpus.json")["sources"]
    weights = {name: table[name]["weight"] for name in sources}
    total = sum(weights.values())
    return data.model_copy(update={"mixture": {n: w / total for n, w in weights.items()}})
