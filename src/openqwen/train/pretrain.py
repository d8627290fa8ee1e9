"""Pre-training by next-token prediction, and its long-sequence phase with a raised RoPE base (Qwen2
report, 2.3).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.command import command
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_json
from openqwen.support.generators import Generators
from openqwen.support.hub import local
from openqwen.support.progress import console
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, TOKENIZER, TOKENS, Effort, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.balance import Balanced, balanced, load_record, measure_load, with_loads
from openqwen.train.data_stages import Resolved, StagedConfig, StagedTrainer, Stretch, enter
from openqwen.train.losses import Loss, next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch, Sample, cut_to_budget
from openqwen.train.packed_dataset import DataConfig, DocumentSampler, PackedDataset, TokenSource
from openqwen.train.parallel import join, load_for_training
from openqwen.train.shards import held_out, token_sources, weighted
from openqwen.train.trainer import Place

EXPERTS = "experts.json"  # the load of each expert at the end of training
STAGES = "data_stages.json"  # the data stages of a run that has several
_ROW_MULTIPLE = 128  # embedding rows are padded to it, as the published models' are


class NetworkConfig(Settings):
    """The size of a new network; the vocabulary comes from the tokenizer."""

    hidden_size: int = Field(256, gt=0, description="width of the residual stream, D")
    intermediate_size: int = Field(
        704, gt=0, description="width of the SwiGLU feed-forward network"
    )
    layers: int = Field(4, gt=0, description="number of layers")
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int = Field(2, gt=0, description="key/value heads")
    tie_word_embeddings: bool = Field(
        True, description="use the embedding table as the output matrix"
    )
    rms_norm_eps: float = Field(1e-6, gt=0, description="added under the root of RMSNorm")
    experts: int = Field(0, ge=0, description="routed experts of each layer; 0: a dense network")
    experts_per_token: int = Field(
        8, gt=0, description="routed experts that a token passes through"
    )
    expert_width: int = Field(96, gt=0, description="width of one routed expert")
    shared_width: int = Field(
        768, gt=0, description="width of the expert that every token passes through"
    )
    balance_weight: float = Field(
        0.001, ge=0, description="the load-balancing loss's share of the loss"
    )


class PretrainConfig(StagedConfig):
    """Pre-training from random weights, or on from a checkpoint: context 4,096 at RoPE base 10,000,
    as Qwen2.
    """

    network: NetworkConfig = Field(
        default_factory=NetworkConfig, description="the size of a new network"
    )
    model: Path | None = Field(
        None,
        description=(
            "the checkpoint to go on from (a folder, a .gguf file or a hub id); none: random "
            "weights"
        ),
    )

    @model_validator(mode="after")
    def _one_network(self) -> "PretrainConfig":
        if self.model is not None and self.network != NetworkConfig():
            raise ValueError(
                "the network is the checkpoint's where `model` is given: leave `network` out"
            )
        return self


class ExtendConfig(StagedConfig):
    """The long-sequence phase: context 32,768 and RoPE base 1,000,000 in Qwen2 and Qwen2.5."""

    data: DataConfig = Field(
        default_factory=lambda: DataConfig(context=32_768), description="what it reads"
    )
    rope_theta: float = Field(1_000_000.0, gt=1, description="RoPE base")
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-5), description="optimizer"
    )


def pretrain(
    config: PretrainConfig | ExtendConfig,
    sources: Mapping[str, TokenSource],
    tokenizer: Tokenizer,
    vocabulary: int,
    start: Path | None,
    place: Place,
    held_out: Sequence[Sample] = (),
) -> dict[str, float]:
    """Train a new network (`start` None) or go on from a checkpoint, through all data stages; save
    to the output.

    held_out: nothing is learned from these; their loss, without that of the balance, is measured on
    the way.
    """
    generators = Generators(place.seed)
    model = _network(config, vocabulary, start, generators)
    if join().main:
        check_ids(sources, min(vocabulary, model.config.vocab_size))
    own = None if start is None else model.config
    stretches = stretches_of(config, sources, generators, tokenizer, own)
    last = stretches[-1]
    if own is not None:
        _say_changes(own, last.stage)
    enter(model, last.stage)  # what is saved has the last stage's RoPE base and context
    sparse = bool(model.config.num_experts)
    balance = config.balance if sparse else "off"

    def batch(step: int) -> list[Balanced]:
        _, stretch = trainer.at(step)
        samples = stretch.dataset.batch(step - stretch.first)
        rows = [PackedBatch.of(micro, model.device) for micro in samples]
        return with_loads(model, rows, balance, config.train.precision)

    def loss(micro: Balanced) -> Loss:
        if not sparse or not model.training:
            return next_token(model, micro.rows)
        weight = model.config.router_aux_loss_coef
        return balanced(
            lambda rows, routing: next_token(model, rows, routing), micro, balance, weight
        )

    def name(step: int) -> str:
        _, stretch = trainer.at(step)
        return stretch.dataset.name(step - stretch.first)

    def measured() -> list[Balanced]:
        cuts = cut_to_budget([len(ids) for ids, _ in held_out], config.data.micro_tokens)
        return [Balanced(PackedBatch.of(held_out[cut], model.device)) for cut in cuts]

    trainer = StagedTrainer(
        place,
        config,
        model,
        batch,
        loss,
        steps=last.first + last.dataset.steps,
        generators=generators,
        log_mfu=True,
        name=name,
        held_out=measured if held_out else None,
        validation=config.validation,
        stretches=stretches,
    )
    metrics = trainer.run()
    metrics.pop("data_stage", None)
    enter(model, last.stage)
    trainer.save_checkpoint(tokenizer)
    if len(stretches) > 1:
        write_json(place.output / STAGES, [_record(stretch) for stretch in stretches])
    if sparse:
        rows = [micro.rows for micro in batch(trainer.steps - 1)]
        load = measure_load(model, rows, config.train.precision)
        write_json(place.output / EXPERTS, load_record(model, load))
    return metrics | {"parameters": model.config.parameters()}


def check_ids(sources: Mapping[str, TokenSource], vocabulary: int) -> None:
    """Every token must have its row in the embedding table; an error names the source and the
    document.

    Reading all shards once, before the first step, costs a small part of one pass of training over
    them.
    """
    for name, source in sources.items():
        for document in range(len(source.lengths)):
            largest = source.document(document).max()
            if largest >= vocabulary:
                raise OpenQwenError(
                    f"Document {document} of the source '{name}' holds the token id {largest}, but "
                    "the vocabulary "
                    f"of the network ends at {vocabulary - 1}.",
                    where=f"token shard {name}, document {document}",
                    do="make the token shards with this network's tokenizer: "
                    f"{command('tokens', '--tokenizer', 'MODEL', '...')}",
                )


def stretches_of(
    config: StagedConfig,
    sources: Mapping[str, TokenSource],
    generators: Generators,
    tokenizer: Tokenizer,
    start: ModelConfig | None = None,
) -> list[Stretch]:
    """The rows of every data stage; an error names it. start: as in `StagedConfig.resolved`."""
    sampler, found, first = DocumentSampler(sources, generators), list[Stretch](), 0
    for stage in config.resolved(start):
        try:
            pieces = PackedDataset(sampler, stage.data, generators, tokenizer)
        except OpenQwenError as error:
            if not stage.name:
                raise
            raise OpenQwenError(
                error.what, f"stages.{stage.name}, {error.where}", error.do
            ) from None
        found.append(Stretch(stage, pieces, first))
        first += pieces.steps
    return found


def _say_changes(own: ModelConfig, stage: Resolved) -> None:
    """A line where training changes the checkpoint's RoPE base or context."""
    for what, before, after in (
        ("RoPE base", own.rope_theta, stage.rope_theta),
        ("context", own.max_position_embeddings, stage.positions),
    ):
        if before != after:
            text = f"  {what}: {before:,.0f} in the checkpoint, {after:,.0f} from here on"
            console.print(text, markup=False)


def _record(stretch: Stretch) -> dict[str, Any]:
    """A data stage in `data_stages.json`."""
    stage, pieces = stretch.stage, stretch.dataset
    return {
        "name": stage.name,
        "first_step": stretch.first,
        "steps": pieces.steps,
        "tokens": int((pieces.rows[:, 1] - 1).sum()),
        "context": stage.data.row,
        "rope_theta": stage.rope_theta,
        "learning_rate": stage.train.learning_rate,
    }


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
        max_position_embeddings=config.resolved()[-1].positions,
        rope_theta=config.resolved()[-1].rope_theta,
        rms_norm_eps=size.rms_norm_eps,
        tie_word_embeddings=size.tie_word_embeddings,
        **(mixture if size.experts else {}),
    )


def _network(
    config: PretrainConfig | ExtendConfig,
    vocabulary: int,
    start: Path | None,
    generators: Generators,
) -> Qwen2:
    if start is not None:
        return load_for_training(start)
    assert isinstance(config, PretrainConfig)
    model = Qwen2(network_config(config, vocabulary))
    initialize(model, generators.torch("weights"))
    return model.to(best_device())


def run_pretrain(run: StageRun) -> dict[str, float]:
    """Token shards → a base model, from random weights or from a checkpoint."""
    tokenizer, start = load_tokenizer(run.inputs["tokenizer"]), run.config.model
    if start is not None:
        tokenizer = _checked_tokenizer(tokenizer, start, run.inputs["tokenizer"])
    return pretrain_on_shards(run, start, tokenizer)


def pretrain_on_shards(run: StageRun, start: Path | None, tokenizer: Tokenizer) -> dict[str, float]:
    """Pre-train on a run's token shards, in the corpus's mixture where none is named."""
    config: PretrainConfig | ExtendConfig = run.config
    sources = token_sources(run.inputs["tokens"])
    config = config.model_copy(
        update={"data": weighted(config.data, run.inputs["corpus"], sources)}
    )
    held, tokens = list[Sample](), config.validation.tokens
    if tokens:
        context = min(stage.data.row for stage in config.resolved())
        order = Generators(run.seed)["data.validation"]
        held = held_out(run.inputs["corpus"], tokenizer, context, tokens, order)
    return pretrain(config, sources, tokenizer, tokenizer.vocab_size, start, Place.of(run), held)


def _checked_tokenizer(given: Tokenizer, start: Path, where: Path) -> Tokenizer:
    """The checkpoint's own tokenizer, which is saved with the model; that of the shards must be a
    part of it.
    """
    own = load_tokenizer(start)
    if (
        given.vocabulary != own.vocabulary
        or not given.control_ids.items() <= own.control_ids.items()
    ):
        raise OpenQwenError(
            (
                f"The tokenizer of the shards is not that of {start}: the same ids would mean "
                "other text."
            ),
            where=where,
            do=(
                "make the shards with the checkpoint's: "
                f"{command('tokens', '--tokenizer', local(start), '...')}"
            ),
        )
    return own


def staged_effort(config: StagedConfig) -> Effort:
    """To read all data stages."""
    rows = Counter[int]()
    read = [stage.data for stage in config.resolved()]
    for data in read:
        for length, share in (data.lengths or {data.row: 1.0}).items():
            rows[length] += share * data.tokens  # type: ignore[assignment]
    longest = max(data.row for data in read)
    return Effort(rows=rows, micro_tokens=max(config.data.micro_tokens, longest), longest=longest)


STAGE = Stage(
    name="pretrain",
    help=(
        "Train a network on token shards, from scratch or from --model; with --sweep, see the verb "
        "sweep."
    ),
    config=PretrainConfig,
    inputs={"tokens": TOKENS, "tokenizer": TOKENIZER, "corpus": CORPUS},
    outputs=["model"],
    run=run_pretrain,
    trains_on_ranks=True,
    estimate=lambda recipe, roles: staged_effort(recipe.pretrain),
)
