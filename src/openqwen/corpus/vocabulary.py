"""The `tokenizer` stage: a vocabulary learned from the corpus, and how well it compresses held-out
text.
"""

from collections.abc import Collection
from typing import Any

from openqwen.corpus.config import text_bytes
from openqwen.corpus.documents import read_documents
from openqwen.corpus.mixture import sample
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json
from openqwen.support.stage import CORPUS, Effort, Stage, StageRun
from openqwen.tokenizer import TokenizerConfig, tokenizer_statistics, train_tokenizer

_SPEED = 3e6  # bytes of text a second, to learn a vocabulary from or to encode


def run_tokenizer(run: StageRun) -> dict[str, float]:
    """A sample of the corpus's training documents, by the weights of the mixture → a vocabulary."""
    config, documents = run.config, run.inputs["corpus"] / "train.parquet"
    sources = read_json(run.inputs["corpus"] / "corpus.json")["sources"]
    if unknown := sorted(config.weights.keys() - sources.keys()):
        raise OpenQwenError(
            f"The corpus has no source '{unknown[0]}'.",
            where="tokenizer.weights",
            do=f"name some of its sources: {', '.join(sources)}",
        )
    weights = {
        name: config.weights.get(name, 1.0) * source["weight"] / source["bytes"]
        for name, source in sources.items()
        if source["bytes"]
    }
    chosen = sample(read_documents(documents), weights, config.max_bytes, run.seed)
    numbered = enumerate(read_documents(documents))
    texts = (document["text"] for number, document in numbered if number in chosen)
    tokenizer = train_tokenizer(texts, config)
    tokenizer.save(run.output)
    held: dict[str, list[str]] = {}
    for document in read_documents(run.inputs["corpus"] / "heldout.parquet"):
        held.setdefault(document["source"], []).append(document["text"])
    trained = min(config.max_bytes, sum(source["bytes"] for source in sources.values()))
    statistics = tokenizer_statistics(tokenizer, held, trained)
    write_json(run.output / "statistics.json", statistics)
    rates = statistics["bytes_per_token"]
    return {"bytes_per_token": sum(rates.values()) / len(rates), "vocabulary": tokenizer.vocab_size}


def vocabulary_effort(recipe: Any, roles: Collection[str]) -> Effort:
    """To learn the vocabulary, or to encode with it."""
    return Effort(seconds=min(text_bytes(recipe.corpus), recipe.tokenizer.max_bytes) / _SPEED)


STAGE = Stage(
    name="tokenizer",
    help="Train the byte-level BPE vocabulary.",
    config=TokenizerConfig,
    inputs={"corpus": CORPUS},
    outputs=["tokenizer"],
    run=run_tokenizer,
    estimate=vocabulary_effort,
)
