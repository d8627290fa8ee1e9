"""The stages that read token shards: pre-training, its long-sequence phase, and the sweep that sets their rates."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from openqwen.corpus import TokenShard
from openqwen.corpus.documents import read_documents
from openqwen.evaluate.bits_per_byte import halves
from openqwen.recipe.stage import Work
from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json
from openqwen.support.generators import Generators
from openqwen.support.hub import local
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.parallel import join
from openqwen.train.pieces import DataConfig
from openqwen.train.pretrain import ExtendConfig, PretrainConfig, pretrain
from openqwen.train.rows import Sample
from openqwen.train.trainer import Place


def run_pretrain(work: Work) -> dict[str, float]:
    """Token shards → a base model, from random weights or from a checkpoint."""
    config = work.config
    tokenizer = load_tokenizer(work.inputs["tokenizer"])
    if config.model is not None:
        tokenizer = _checked_tokenizer(tokenizer, config.model, work.inputs["tokenizer"])
    return _pretrain(work, config, config.model, tokenizer)


def run_extend(work: Work) -> dict[str, float]:
    """A base model → one with a longer context."""
    start = work.inputs["model"]
    return _pretrain(work, work.config, start, load_tokenizer(start))


def _pretrain(
    work: Work, config: PretrainConfig | ExtendConfig, start: Path | None, tokenizer: Tokenizer
) -> dict[str, float]:
    sources = token_sources(work.inputs["tokens"])
    config = config.model_copy(update={"data": weighted(config.data, work.inputs["corpus"], sources)})
    held, tokens = list[Sample](), config.validation.tokens
    if tokens:
        context = min(stage.data.row for stage in config.resolved())
        order = Generators(work.seed)["data.validation"]
        held = held_out(work.inputs["corpus"], tokenizer, context, tokens, order)
    place = Place(work.output, work.scratch, work.seed, work.label)
    return pretrain(config, sources, tokenizer, tokenizer.vocab_size, start, place, held)


def held_out(corpus: Path, tokenizer: Tokenizer, context: int, tokens: int, order: np.random.Generator) -> list[Sample]:
    """So many tokens of a corpus's held-out documents, shuffled, in pieces of the context.

    Only of their half for development: what is chosen by them is still to be judged by the other.
    """
    samples: list[Sample] = []
    path = corpus / "heldout.parquet"
    documents, _ = halves(read_documents(path))
    for document in (documents[n] for n in order.permutation(len(documents))):
        ids = np.array([*tokenizer.encode(document["text"]), tokenizer.endoftext_id])
        for start in range(0, len(ids) - 1, context):
            piece = ids[start : start + min(context, tokens) + 1]
            samples.append((piece, np.ones(len(piece), dtype=bool)))
            tokens -= len(piece) - 1
            if tokens <= 0:
                return samples
    if not samples:
        raise OpenQwenError("There is no held-out text to score.", path, "give a corpus with a held-out split")
    return samples


def token_sources(folder: Path) -> dict[str, TokenShard]:
    """The shards of a folder. Their checksums are proved first: next to training on a token, reading it is nothing."""
    return {name: TokenShard(folder, name, verify=join().main) for name in read_json(folder / "tokens.json")}


def weighted(data: DataConfig, corpus: Path, sources: Mapping[str, TokenShard]) -> DataConfig:
    """With the corpus's weights as its mixture, where it names none."""
    if data.mixture:
        return data
    table = read_json(corpus / "corpus.json")["sources"]
    weights = {name: table[name]["weight"] for name in sources}
    total = sum(weights.values())
    return data.model_copy(update={"mixture": {n: w / total for n, w in weights.items()}})


def _checked_tokenizer(given: Tokenizer, start: Path, where: Path) -> Tokenizer:
    """The checkpoint's own tokenizer, which is saved with the model; that of the shards must be a part of it."""
    own = load_tokenizer(start)
    if given.vocabulary != own.vocabulary or not given.control_ids.items() <= own.control_ids.items():
        raise OpenQwenError(
            f"The tokenizer of the shards is not that of {start}: the same ids would mean other text.",
            where=where,
            do=f"make the shards with the checkpoint's: {command('tokens', '--tokenizer', local(start), '...')}",
        )
    return own
