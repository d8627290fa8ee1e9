"""Pre-training by next-token prediction, and its long-sequence phase with a raised RoPE base (Qwen2 report, 2.3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import write_json
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer
from openqwen.train.balance import Balance, Balanced, balanced, load_record, measure_load, with_loads
from openqwen.train.losses import Loss, next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.parallel import load_for_training
from openqwen.train.rows import Rows, Sample, cut_to_budget
from openqwen.train.trainer import SaveConfig, Trainer

EXPERTS = "experts.json"  # the load of each expert at the end of training
_ROW_MULTIPLE = 128  # embedding rows are padded to it, as the published models' are
_BALANCE = "where a mixture of experts counts the load that it evens out: the whole step, each micro-batch, or nowhere"


class NetworkConfig(BaseModel):
    """The size of a new network; the vocabulary comes from the tokenizer."""

    model_config = ConfigDict(extra="forbid")

    hidden_size: int = Field(256, gt=0, description="width of the residual stream, D")
    intermediate_size: int = Field(704, gt=0, description="width of the SwiGLU feed-forward network")
    layers: int = Field(4, gt=0, description="number of layers")
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int = Field(2, gt=0, description="key/value heads")
    tie_word_embeddings: bool = Field(True, description="use the embedding table as the output matrix")
    rms_norm_eps: float = Field(1e-6, gt=0, description="added under the root of RMSNorm")
    experts: int = Field(0, ge=0, description="routed experts of each layer; 0: a dense network")
    experts_per_token: int = Field(8, gt=0, description="routed experts that a token passes through")
    expert_width: int = Field(96, gt=0, description="width of one routed expert")
    shared_width: int = Field(768, gt=0, description="width of the expert that every token passes through")
    balance_weight: float = Field(0.001, ge=0, description="the load-balancing loss's share of the loss")


class DataConfig(BaseModel):
    """How much text, in which pieces, from which sources."""

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(1_500_000, gt=0, description="tokens to train on")
    context: int = Field(4_096, gt=1, description="longest piece of a document, in tokens")
    batch_tokens: int = Field(16_384, gt=0, description="tokens of one optimizer step")
    micro_tokens: int = Field(8_192, gt=0, description="tokens of one forward call; changes memory and speed alone")
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="share of each source in the tokens; the others split the rest by size",
    )


class PretrainConfig(BaseModel):
    """Pre-training from random weights: context 4,096 at RoPE base 10,000, as Qwen2 and Qwen2.5."""

    model_config = ConfigDict(extra="forbid")

    network: NetworkConfig = Field(default_factory=NetworkConfig, description="the size of the network")
    balance: Balance = Field("global", description=_BALANCE)
    data: DataConfig = Field(default_factory=DataConfig, description="what it reads")
    rope_theta: float = Field(10_000.0, gt=1, description="RoPE base")
    train: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=3e-4), description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


class ExtendConfig(BaseModel):
    """The long-sequence phase: context 32,768 and RoPE base 1,000,000 in Qwen2 and Qwen2.5."""

    model_config = ConfigDict(extra="forbid")

    balance: Balance = Field("global", description=_BALANCE)
    data: DataConfig = Field(default_factory=lambda: DataConfig(context=32_768), description="what it reads")
    rope_theta: float = Field(1_000_000.0, gt=1, description="RoPE base")
    train: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=3e-5), description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


class TokenSource(Protocol):
    """Tokenized documents of one source, each ending in `<|endoftext|>`."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        ...

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document."""
        ...


class Pieces:
    """The training text as pieces of documents, planned in full before the first step.

    Each source gives its share of the tokens, its documents in shuffled order and again from the start when they run
    out. A document longer than the context is cut into pieces that overlap by one token, so that every token but a
    document's first is predicted once. All pieces are then shuffled together.
    """

    def __init__(self, sources: Mapping[str, TokenSource], config: DataConfig, generators: Generators):
        self._names = sorted(sources)
        self.sources = [sources[name] for name in self._names]
        self.config = config
        parts = []
        for number, name in enumerate(sorted(sources)):
            quota = round(config.tokens * _shares(sources, config.mixture)[name])
            parts.append(self._plan(number, quota, generators[f"data.{name}"]))
        self.pieces = np.concatenate(parts)  # [pieces, 4]: source, document, first token, tokens
        generators["data.order"].shuffle(self.pieces)
        ends = (self.pieces[:, 3] - 1).cumsum()
        self.steps = max(1, round(int(ends[-1]) / config.batch_tokens))
        edges = np.linspace(0, ends[-1], self.steps + 1)
        self.starts = np.searchsorted(ends, edges, side="left")
        self.starts[-1] = len(self.pieces)

    def _plan(self, source: int, quota: int, generator: np.random.Generator) -> np.ndarray:
        lengths = self.sources[source].lengths
        usable = np.flatnonzero(lengths >= 2)
        chosen: list[np.ndarray] = []
        total = 0
        while total < quota:
            order = generator.permutation(usable)
            ends = (lengths[order] - 1).cumsum()
            order = order[: int(np.searchsorted(ends, quota - total)) + 1]
            total += int((lengths[order] - 1).sum())
            chosen.append(order)
        documents = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
        context = self.config.context
        counts = -(-(lengths[documents] - 1) // context)
        document = np.repeat(documents, counts)
        first = (np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)) * context
        size = np.minimum(context + 1, lengths[document] - first)
        return np.stack([np.full(len(document), source), document, first, size], axis=1).astype(np.int64)

    def batch(self, step: int) -> list[list[Sample]]:
        """The samples of one step, cut into micro-batches."""
        rows = self.pieces[self.starts[step] : self.starts[step + 1]]
        samples: list[Sample] = []
        for source, document, first, size in rows:
            ids = self.sources[source].document(int(document))[first : first + size].astype(np.int64)
            samples.append((ids, np.ones(len(ids), dtype=bool)))
        return [samples[s] for s in cut_to_budget([int(r[3]) for r in rows], self.config.micro_tokens)]

    def name(self, step: int) -> str:
        """The documents that a step reads, for a message."""
        rows = self.pieces[self.starts[step] : self.starts[step + 1]]
        named = list(dict.fromkeys(f"{self._names[source]} {document}" for source, document, *_ in rows))
        return f"documents {', '.join(named[:12])}" + (f" and {len(named) - 12} more" if len(named) > 12 else "")


def _shares(sources: Mapping[str, TokenSource], mixture: Mapping[str, float]) -> dict[str, float]:
    """Shares of the sources that sum to one: those named as asked, the rest split by size."""
    for name in mixture:
        if name not in sources:
            raise OpenQwenError(f"The mixture names '{name}'; there is no such source.{suggestion(name, sources)}")
    asked = sum(mixture.values())
    rest = {n: float((sources[n].lengths - 1).clip(0).sum()) for n in sources if n not in mixture}
    if asked > 1 + 1e-9 or (not rest and abs(asked - 1) > 1e-6):
        raise OpenQwenError(f"The mixture's shares sum to {asked:.3g}, not 1.", where="data.mixture")
    size = sum(rest.values()) or 1.0
    return dict(mixture) | {n: (1 - asked) * v / size for n, v in rest.items()}


def pretrain(
    config: PretrainConfig | ExtendConfig,
    sources: Mapping[str, TokenSource],
    tokenizer: Tokenizer,
    vocabulary: int,
    start: Path | None,
    output: Path,
    scratch: Path,
    seed: int,
    label: str,
) -> dict[str, float]:
    """Train a new network (`start` None) or continue a checkpoint at a new context and RoPE base; save to `output`."""
    generators = Generators(seed)
    model = _network(config, vocabulary, start, generators)
    pieces = Pieces(sources, config.data, generators)
    sparse = bool(model.config.num_experts)
    balance = config.balance if sparse else "off"

    def batch(step: int) -> list[Balanced]:
        return with_loads(model, [Rows.of(samples, model.device) for samples in pieces.batch(step)], balance)

    def loss(micro: Balanced) -> Loss:
        if not sparse:
            return next_token(model, micro.rows)
        weight = model.config.router_aux_loss_coef
        return balanced(lambda rows, routing: next_token(model, rows, routing), micro, balance, weight)

    trainer = Trainer(
        label=label,
        model=model,
        batch=batch,
        loss=loss,
        tokens=lambda micro: len(micro.rows.tokens),
        steps=pieces.steps,
        optimizer=config.train,
        save=config.save,
        scratch=scratch,
        output=output,
        generators=generators,
        flops=lambda micro: micro.rows.flops(model.config),
        name=pieces.name,
    )
    metrics = trainer.run()
    trainer.save_checkpoint(tokenizer)
    if sparse:
        load = measure_load(model, [micro.rows for micro in batch(pieces.steps - 1)])
        write_json(output / EXPERTS, load_record(model, load))
    return metrics | {"parameters": model.config.parameters()}


def network_config(config: PretrainConfig, vocabulary: int) -> ModelConfig:
    """The network that a configuration and a vocabulary of this many tokens ask for."""
    size = config.network
    mixture: dict[str, Any] = {
        "num_experts": size.experts,
        "num_experts_per_tok": size.experts_per_token,
        "moe_intermediate_size": size.expert_width,
        "shared_expert_intermediate_size": size.shared_width,
        "router_aux_loss_coef": size.balance_weight,
    }
    return ModelConfig(
        vocab_size=-(-vocabulary // _ROW_MULTIPLE) * _ROW_MULTIPLE,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=config.data.context,
        rope_theta=config.rope_theta,
        rms_norm_eps=size.rms_norm_eps,
        tie_word_embeddings=size.tie_word_embeddings,
        **(mixture if size.experts else {}),
    )


def _network(
    config: PretrainConfig | ExtendConfig, vocabulary: int, start: Path | None, generators: Generators
) -> Qwen2:
    if start is not None:
        model = load_for_training(start)
        model.config = model.model.config = model.config.with_rope(config.rope_theta, config.data.context)
        return model
    assert isinstance(config, PretrainConfig)
    model = Qwen2(network_config(config, vocabulary))
    initialize(model, generators.torch("weights"))
    return model.to(best_device())
