"""Supervised fine-tuning on demonstrations D: assistant tokens only (Qwen2 report, 4.2)."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from openqwen.model import load_model, save_checkpoint
from openqwen.support.device import best_device
from openqwen.support.files import read_jsonl
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer
from openqwen.train.conversations import conversation, fitting
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.order import Epochs
from openqwen.train.rows import Rows, cut_to_budget
from openqwen.train.trainer import SaveConfig, Trainer


class SftConfig(BaseModel):
    """The report's settings: 2 epochs, 32,768 tokens, 7e-6 falling to 7e-7, weight decay 0.1, clip 1.0."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(2.0, gt=0, description="passes over the demonstrations")
    batch: int = Field(128, gt=0, description="conversations of one optimizer step")
    max_length: int = Field(32_768, gt=1, description="longer conversations are left out and counted")
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
    model = load_model(start, device=best_device())
    samples = [
        conversation(tokenizer, record, f"{demonstrations}, record {n}")
        for n, record in enumerate(read_jsonl(demonstrations), 1)
    ]
    limit = min(config.max_length, model.config.max_position_embeddings)
    kept = fitting(samples, [len(ids) for ids, _ in samples], limit, str(demonstrations))
    order = Epochs(len(kept), config.epochs, config.batch, generators)

    def batch(step: int) -> list[Rows]:
        chosen = [kept[i] for i in order.batch(step)]
        cuts = cut_to_budget([len(ids) for ids, _ in chosen], config.micro_tokens)
        return [Rows.of(chosen[c], model.device) for c in cuts]

    metrics = Trainer(
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
    ).run()
    save_checkpoint(model, tokenizer, output, chat=True)
    return metrics | {"examples": len(kept), "too_long": len(samples) - len(kept)}
