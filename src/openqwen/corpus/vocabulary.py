"""The `tokenizer` stage: a vocabulary is trained on the corpus and measured on held-out text."""

from collections.abc import Collection
from typing import Any

from openqwen.corpus.config import text_bytes
from openqwen.corpus.documents import HELDOUT, TRAIN, DocumentEntry, read_documents
from openqwen.corpus.mixture import sample
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json
from openqwen.support.stage import CORPUS, Effort, Stage, StageRun
from openqwen.tokenizer import TokenizerConfig, tokenizer_statistics, train_tokenizer

_SPEED = 3e6  # bytes of text a second, in training a vocabulary and in encoding


def run_tokenizer(run: StageRun) -> dict[str, float]:
    """A sample of the corpus's training documents, by the weights of the mixture → a vocabulary."""
    config, corpus = run.config, run.inputs["corpus"]
    sources = read_json(corpus / "corpus.json")["sources"]
    if unknown := sorted(config.weights.keys() - sources.keys()):
        raise OpenQwenError(
            f"The corpus has no source '{unknown[0]}'.",
            where="tokenizer.weights",
            do=f"name only its sources: {', '.join(sources)}",
        )
    weights = {
        name: config.weights.get(name, 1.0) * source["weight"] / source["bytes"]
        for name, source in sources.items()
        if source["bytes"]
    }
    entries = map(DocumentEntry.of, read_documents(corpus / TRAIN))
    chosen = sample(entries, weights, config.max_bytes, run.seed)
    documents = read_documents(corpus / TRAIN)
    texts = (document["text"] for document in documents if document["id"] in chosen)
    tokenizer = train_tokenizer(texts, config)
    tokenizer.save(run.output)
    held: dict[str, list[str]] = {}
    for document in read_documents(corpus / HELDOUT):
        held.setdefault(document["source"], []).append(document["text"])
    trained = min(config.max_bytes, sum(source["bytes"] for source in sources.values()))
    statistics = tokenizer_statistics(tokenizer, held, trained)
    write_json(run.output / "statistics.json", statistics)
    rates = statistics["bytes_per_token"]
    return {"bytes_per_token": sum(rates.values()) / len(rates), "vocabulary": tokenizer.vocab_size}


def vocabulary_effort(recipe: Any, roles: Collection[str]) -> Effort:
    """The effort of training the vocabulary, or of encoding with it."""
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
