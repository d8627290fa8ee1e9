"""The stages that read token shards: pre-training, its long-sequence phase, and the sweep that sets their rates."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from openqwen.corpus import TokenShard
from openqwen.recipe.stage import Work
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json
from openqwen.support.hub import local
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.parallel import join
from openqwen.train.pieces import DataConfig
from openqwen.train.pretrain import ExtendConfig, PretrainConfig, pretrain


def run_pretrain(work: Work) -> dict[str, float]:
    """Token shards → a base model, from random weights or from a checkpoint."""
    config = cast(PretrainConfig, work.config)
    tokenizer = load_tokenizer(work.inputs["tokenizer"])
    if config.model is not None:
        tokenizer = _checked_tokenizer(tokenizer, config.model, work.inputs["tokenizer"])
    return _pretrain(work, config, config.model, tokenizer)


def run_extend(work: Work) -> dict[str, float]:
    """A base model → one with a longer context."""
    start = work.inputs["model"]
    return _pretrain(work, cast(ExtendConfig, work.config), start, load_tokenizer(start))


def _pretrain(
    work: Work, config: PretrainConfig | ExtendConfig, start: Path | None, tokenizer: Tokenizer
) -> dict[str, float]:
    sources = token_sources(work.inputs["tokens"])
    config = config.model_copy(update={"data": weighted(config.data, work.inputs["corpus"], sources)})
    return pretrain(
        config, sources, tokenizer, tokenizer.vocab_size, start, work.output, work.scratch, work.seed, work.label
    )


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
            do=f"make the shards with the checkpoint's: openqwen tokens --tokenizer {local(start)} ...",
        )
    return own
