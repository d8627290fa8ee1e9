"""Supervised fine-tuning on demonstrations D: assistant tokens only (Qwen2 report, 4.2)."""

from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from openqwen.model import Qwen2, Scorer, load_model
from openqwen.model.lora import LoraConfig, add_adapters, merge_adapters, save_adapter
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import TooLong, conversation, fit, fitting
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.packing import pack
from openqwen.train.parallel import load_for_training
from openqwen.train.rows import Rows
from openqwen.train.trainer import SaveConfig, Trainer

ADAPTER = "adapter"  # beside the merged network, in PEFT's format


class SftConfig(BaseModel):
    """The report's settings: 2 epochs, 32,768 tokens, 7e-6 falling to 7e-7, weight decay 0.1, clip 1.0."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(2.0, gt=0, description="passes over the demonstrations")
    batch: int = Field(128, gt=0, description="conversations of one optimizer step")
    max_length: int = Field(32_768, gt=1, description="the most tokens of a conversation")
    too_long: TooLong = Field(
        "leave out", description="what becomes of longer ones: they are counted either way, but for refuse, which stops"
    )
    lora: LoraConfig = Field(
        default_factory=lambda: LoraConfig(rank=0),
        description="adapters (LoRA, DoRA) in place of all weights; rank 0: none",
    )
    micro_tokens: int = Field(8_192, gt=0, description="tokens of one forward call; changes memory and speed alone")
    train: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


def sft(
    config: SftConfig,
    start: Path,
    demonstrations: Path,
    tokenizer: Tokenizer,
    output: Path,
    scratch: Path,
    seed: int,
    label: str,
) -> dict[str, float]:
    """Fine-tune the model at `start` on a JSONL file of demonstrations; save to `output`."""
    generators = Generators(seed)
    # Adapters are drawn for a network that is there.
    model = load_model(start, device=best_device()) if config.lora.rank else load_for_training(start)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise OpenQwenError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the network only {model.config.vocab_size} rows for them.",
            where=start,
            do="give the tokenizer that the model was trained with",
        )
    samples = [
        conversation(tokenizer, record, f"{demonstrations}, record {n}")
        for n, record in enumerate(read_jsonl(demonstrations), 1)
    ]
    limit = min(config.max_length, model.config.max_position_embeddings)
    fitted = [
        fit(sample, limit, config.too_long, f"{demonstrations}, record {n}") for n, sample in enumerate(samples, 1)
    ]
    numbers = [n for n, sample in enumerate(fitted, 1) if sample is not None]
    lengths = [len(ids) for ids, _ in samples]
    kept = [s for s in fitted if s is not None] or fitting(samples, lengths, limit, str(demonstrations))
    order = Epochs(len(kept), config.epochs, config.batch, generators)
    if config.lora.rank:
        add_adapters(model, config.lora, generators.torch("lora"))

    def batch(step: int) -> list[Rows]:
        chosen = [kept[i] for i in order.batch(step)]
        rows = pack([len(ids) for ids, _ in chosen], config.micro_tokens)
        return [Rows.of([chosen[i] for i in row], model.device) for row in rows]

    trainer = Trainer(
        label=label,
        model=model,
        batch=batch,
        loss=lambda rows: next_token(model, rows),
        tokens=lambda rows: len(rows.tokens),
        steps=order.steps,
        optimizer=config.train,
        save=config.save,
        scratch=scratch,
        output=output,
        generators=generators,
        flops=lambda rows: rows.flops(model.config),
        name=lambda step: f"records {', '.join(str(numbers[i]) for i in order.batch(step))}",
    )
    metrics = trainer.run()
    if config.lora.rank:
        trainer.whole = _merged(trainer, config, output, start)
    trainer.save_checkpoint(tokenizer, chat=True)
    cut = sum(s is not None and len(s[0]) < len(whole[0]) for s, whole in zip(fitted, samples, strict=True))
    return metrics | {"examples": len(kept), "too_long": len(samples) - len(kept), "truncated": cut}


def _merged(trainer: Trainer[Rows], config: SftConfig, output: Path, start: Path) -> Callable[[], Qwen2 | Scorer]:
    """Write the adapter to `output/adapter`; what gives the network with it merged."""
    whole = trainer.whole()
    if trainer.world.main:
        save_adapter(whole, config.lora, output / ADAPTER, base=str(start))
        merge_adapters(whole)
    return lambda: whole
