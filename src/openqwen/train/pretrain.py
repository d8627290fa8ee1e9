"""Pre-training by next-token prediction (Qwen2 report, 2.3), and its long-sequence phase."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from openqwen.model import ModelConfig, Qwen2, Routing, initialize, load_model
from openqwen.support.batching import cut_to_budget
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
from openqwen.train.balance import (
    Balance,
    Load,
    PretrainBatch,
    load_record,
    measure_load,
    with_balance,
    with_loads,
)
from openqwen.train.data_stages import (
    PlannedStage,
    ResolvedStage,
    StagedConfig,
    StagedTrainer,
    planned_at,
    set_rope,
)
from openqwen.train.losses import Loss, next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch, Sample
from openqwen.train.packed_dataset import DataConfig, DocumentSampler, PackedDataset, TokenSource
from openqwen.train.parallel import World, join, load_for_training
from openqwen.train.shards import held_out, token_sources, weighted
from openqwen.train.trainer import Place

EXPERTS = "experts.json"  # the load of each expert at the end of training
STAGES = "data_stages.json"  # the data stages of a run that has several
_ROW_MULTIPLE = 128  # embedding rows are padded to it, as the published models' are


class NetworkConfig(Settings):
    """The size of a new network; the vocabulary comes from the tokenizer."""

    hidden_size: int = Field(256, gt=0, description="width of the residual stream, D")
    intermediate_size: int = Field(704, gt=0, description="width of the SwiGLU networks")
    layers: int = Field(4, gt=0, description="number of layers")
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int = Field(2, gt=0, description="key/value heads")
    tie_word_embeddings: bool = Field(True, description="the embedding is the output matrix")
    rms_norm_eps: float = Field(1e-6, gt=0, description="added under the root of RMSNorm")
    experts: int = Field(0, ge=0, description="routed experts of each layer; 0: a dense network")
    experts_per_token: int = Field(8, gt=0, description="routed experts of each token")
    expert_width: int = Field(96, gt=0, description="width of one routed expert")
    shared_width: int = Field(768, gt=0, description="width of the expert of all tokens")
    balance_weight: float = Field(0.001, ge=0, description="factor of the load-balancing loss")


class PretrainConfig(StagedConfig):
    """Pre-training, from random weights or a checkpoint.

    The defaults are Qwen2's: context 4,096 at RoPE base 10,000.
    """

    network: NetworkConfig = Field(
        default_factory=NetworkConfig, description="size of a new network"
    )
    model: Path | None = Field(None, description="checkpoint to go on from; none: random weights")

    @model_validator(mode="after")
    def _one_network(self) -> "PretrainConfig":
        if self.model is not None and self.network != NetworkConfig():
            raise ValueError("`model` is given, and its network is used: leave `network` out")
        return self


class ExtendConfig(StagedConfig):
    """The long-sequence phase: context 32,768 and RoPE base 1,000,000 in Qwen2 and Qwen2.5."""

    data: DataConfig = Field(
        default_factory=lambda: DataConfig(context=32_768), description="the text to read"
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
    """Train a network through all data stages and save it to the place's output.

    Args:
        config: All settings.
        sources: Tokenized documents by the name of their source.
        tokenizer: It is saved with the network.
        vocabulary: Number of token ids of the tokenizer.
        start: The checkpoint to go on from; None: a new network with random weights.
        place: Folders, seed and label.
        held_out: Samples on which the loss is measured, without that of the balance.
    """
    generators = Generators(place.seed)
    model = _network(config, vocabulary, start, generators)
    world = join().with_mesh(config.train.parallel, model)
    if world.main:
        check_ids(sources, min(vocabulary, model.config.vocab_size))
    before = None if start is None else model.config
    plan = plan_stages(config, sources, generators, tokenizer, before)
    last = plan[-1]
    if before is not None:
        _print_changes(before, last.stage)
    # The checkpoint gets the last stage's RoPE base and context. `shard` keeps a copy of them.
    set_rope(model, last.stage)
    pretraining = _Pretraining(config, model, plan, held_out, world)
    trainer = StagedTrainer(
        place,
        config,
        model,
        pretraining.batch,
        pretraining.loss,
        steps=last.first + last.dataset.steps,
        generators=generators,
        log_mfu=True,
        name=pretraining.documents,
        held_out=pretraining.held_out_batches if held_out else None,
        validation=config.validation,
        world=world,
        plan=plan,
    )
    metrics = trainer.run()
    metrics.pop("data_stage", None)
    trainer.save_checkpoint(tokenizer)
    if len(plan) > 1:
        write_json(place.output / STAGES, [_record(planned) for planned in plan])
    if model.config.num_experts:
        load = pretraining.load(trainer.steps - 1)
        write_json(place.output / EXPERTS, load_record(model, load))
    return metrics | {"parameters": model.config.parameters()}


class _Pretraining:
    """The micro-batches of each step, and their loss, dense or with experts."""

    def __init__(
        self,
        config: PretrainConfig | ExtendConfig,
        model: Qwen2,
        plan: Sequence[PlannedStage],
        held_out: Sequence[Sample],
        world: World,
    ):
        self.config, self.model, self.world = config, model, world
        self.plan, self.held_out = plan, held_out
        self.has_experts = bool(model.config.num_experts)
        self.balance: Balance = config.balance if self.has_experts else "off"

    def batch(self, step: int) -> list[PretrainBatch]:
        """The micro-batches of a step."""
        precision = self.config.train.precision
        return with_loads(self.model, self._rows(step), self.balance, precision, self.world)

    def loss(self, micro: PretrainBatch) -> Loss:
        """The loss of a micro-batch; with experts and in training, the balance is part of it."""
        if not self.has_experts or not self.model.training:
            return self._next_token(micro.rows)
        weight = self.model.config.router_aux_loss_coef
        return with_balance(self._next_token, micro, self.balance, weight)

    def documents(self, step: int) -> str:
        """The documents that a step reads, for messages."""
        planned = planned_at(self.plan, step)
        return planned.dataset.name(step - planned.first)

    def held_out_batches(self) -> list[PretrainBatch]:
        """The held-out samples as micro-batches."""
        cuts = cut_to_budget([len(ids) for ids, _ in self.held_out], self.config.data.micro_tokens)
        device = self.model.device
        return [PretrainBatch(PackedBatch.of(self.held_out[cut], device)) for cut in cuts]

    def load(self, step: int) -> Load:
        """How the tokens of a step spread over the experts."""
        precision = self.config.train.precision
        return measure_load(self.model, self._rows(step), precision, self.world)

    def _rows(self, step: int) -> list[PackedBatch]:
        planned = planned_at(self.plan, step)
        samples = planned.dataset.batch(step - planned.first)
        return [PackedBatch.of(micro, self.model.device) for micro in samples]

    def _next_token(self, rows: PackedBatch, routing: Routing | None = None) -> Loss:
        return next_token(self.model, rows, routing, self.world)


def check_ids(sources: Mapping[str, TokenSource], vocabulary: int) -> None:
    """Raise an error, with source and document, if a token id has no row in the embedding table.

    All shards are read once before the first step, which costs a small part of training on them.
    """
    for name, source in sources.items():
        for document in range(len(source.lengths)):
            largest = source.document(document).max()
            if largest >= vocabulary:
                raise OpenQwenError(
                    f"Document {document} of the source '{name}' holds the token id {largest}, but "
                    f"the vocabulary of the network ends at {vocabulary - 1}.",
                    where=f"token shard {name}, document {document}",
                    do="make the token shards with this network's tokenizer: "
                    f"{command('tokens', '--tokenizer', 'MODEL', '...')}",
                )


def plan_stages(
    config: StagedConfig,
    sources: Mapping[str, TokenSource],
    generators: Generators,
    tokenizer: Tokenizer,
    start: ModelConfig | None = None,
) -> list[PlannedStage]:
    """The rows of every data stage; an error names the stage.

    start: as in `StagedConfig.resolved`.
    """
    sampler, plan, first = DocumentSampler(sources, generators), list[PlannedStage](), 0
    for stage in config.resolved(start):
        try:
            dataset = PackedDataset(sampler, stage.data, generators, tokenizer)
        except OpenQwenError as error:
            if not stage.name:
                raise
            raise OpenQwenError(
                error.what, f"stages.{stage.name}, {error.where}", error.do
            ) from None
        plan.append(PlannedStage(stage, dataset, first))
        first += dataset.steps
    return plan


def _print_changes(before: ModelConfig, stage: ResolvedStage) -> None:
    """Print where training changes the checkpoint's RoPE base or context."""
    for what, old, new in (
        ("RoPE base", before.rope_theta, stage.rope_theta),
        ("context", before.max_position_embeddings, stage.positions),
    ):
        if old != new:
            text = f"  {what}: {old:,.0f} in the checkpoint, {new:,.0f} from here on"
            console.print(text, markup=False)


def _record(planned: PlannedStage) -> dict[str, Any]:
    """A data stage in `data_stages.json`."""
    stage, dataset = planned.stage, planned.dataset
    return {
        "name": stage.name,
        "first_step": planned.first,
        "steps": dataset.steps,
        "tokens": int((dataset.rows[:, 1] - 1).sum()),
        "context": stage.data.row,
        "rope_theta": stage.rope_theta,
        "learning_rate": stage.train.learning_rate,
    }


def network_config(config: PretrainConfig, vocabulary: int) -> ModelConfig:
    """The network of a configuration, for a vocabulary of this many tokens."""
    size, last = config.network, config.resolved()[-1]
    experts: dict[str, Any] = {
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
        max_position_embeddings=last.positions,
        rope_theta=last.rope_theta,
        rms_norm_eps=size.rms_norm_eps,
        tie_word_embeddings=size.tie_word_embeddings,
        **(experts if size.experts else {}),
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
    """Pre-train on a run's token shards; without a mixture in the settings, in the corpus's."""
    config: PretrainConfig | ExtendConfig = run.config
    sources = token_sources(run.inputs["tokens"])
    config = config.model_copy(
        update={"data": weighted(config.data, run.inputs["corpus"], sources)}
    )
    held, tokens = list[Sample](), config.validation.tokens
    if tokens:
        before = None if start is None else load_model(start, device="meta").config
        context = min(stage.data.row for stage in config.resolved(before))
        order = Generators(run.seed)["data.validation"]
        held = held_out(run.inputs["corpus"], tokenizer, context, tokens, order)
    return pretrain(config, sources, tokenizer, tokenizer.vocab_size, start, Place.of(run), held)


def _checked_tokenizer(given: Tokenizer, start: Path, where: Path) -> Tokenizer:
    """The checkpoint's tokenizer, which is saved with the model; the shards' must agree with it."""
    tokenizer = load_tokenizer(start)
    same_controls = given.control_ids.items() <= tokenizer.control_ids.items()
    if given.vocabulary != tokenizer.vocabulary or not same_controls:
        raise OpenQwenError(
            f"The tokenizer of the shards is not that of {start}: its ids mean other text.",
            where=where,
            do="make the shards with the checkpoint's: "
            f"{command('tokens', '--tokenizer', local(start), '...')}",
        )
    return tokenizer


def staged_effort(config: StagedConfig) -> Effort:
    """The effort of reading all data stages."""
    rows = Counter[int]()
    read = [stage.data for stage in config.resolved()]
    for data in read:
        for length, share in (data.lengths or {data.row: 1.0}).items():
            rows[length] += share * data.tokens  # type: ignore[assignment]
    longest = max(data.row for data in read)
    return Effort(rows=rows, micro_tokens=max(config.data.micro_tokens, longest), longest=longest)


STAGE = Stage(
    name="pretrain",
    help="Train a network on token shards, from scratch or from --model; --sweep: see sweep.",
    config=PretrainConfig,
    inputs={"tokens": TOKENS, "tokenizer": TOKENIZER, "corpus": CORPUS},
    outputs=["model"],
    run=run_pretrain,
    trains_on_ranks=True,
    estimate=lambda recipe, roles: staged_effort(recipe.pretrain),
)
