"""Supervised fine-tuning on demonstrations D: assistant tokens only (Qwen2 report, 4.2)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from openqwen.model import Qwen2, Scorer, load_model
from openqwen.model.lora import LoraConfig, add_adapters, load_adapter, merge_adapters, save_adapter
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.records import read_records
from openqwen.support.stage import (
    CHAT,
    CONVERSATION,
    DEMONSTRATIONS,
    MODEL,
    Effort,
    Stage,
    StageRun,
)
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.conversations import TooLong, encode_demonstration, fit, fitting, says_nothing
from openqwen.train.losses import next_token
from openqwen.train.order import Epochs
from openqwen.train.packing import MicroBatchConfig, pack
from openqwen.train.parallel import join, load_for_training
from openqwen.train.rows import Rows, Sample
from openqwen.train.trainer import Place, Trainer, TrainingConfig
from openqwen.train.validation import ValidationConfig

ADAPTER = "adapter"  # beside the merged network, in PEFT's format


class SftValidationConfig(ValidationConfig):
    """Demonstrations that nothing is learned from, on which the loss is measured."""

    share: float = Field(
        0.0, ge=0, lt=1, description="share of the demonstrations held out, drawn at random"
    )
    file: Path | None = Field(
        None, description="a file of held-out demonstrations, in place of a share"
    )


class SftConfig(MicroBatchConfig, TrainingConfig):
    """The report's settings: 2 epochs, 32,768 tokens, 7e-6 falling to 7e-7, weight decay 0.1, clip
    1.0.
    """

    epochs: float = Field(2.0, gt=0, description="passes over the demonstrations")
    batch: int = Field(128, gt=0, description="conversations of one optimizer step")
    max_length: int = Field(32_768, gt=1, description="the most tokens of a conversation")
    too_long: TooLong = Field(
        "leave out",
        description=(
            "what becomes of longer ones: they are counted either way, but for refuse, which stops"
        ),
    )
    lora: LoraConfig = Field(
        default_factory=lambda: LoraConfig(rank=0),
        description="adapters (LoRA, DoRA) in place of all weights; rank 0: none",
    )
    validation: SftValidationConfig = Field(
        default_factory=SftValidationConfig,
        description="held-out demonstrations, and what their loss decides",
    )


def sft(
    config: SftConfig, start: Path, demonstrations: Path, tokenizer: Tokenizer, place: Place
) -> dict[str, float]:
    """Fine-tune the model at `start` on demonstrations; save to the place's output."""
    generators = Generators(place.seed)
    # Adapters are drawn for a network that is there.
    model = (
        load_model(start, device=best_device()) if config.lora.rank else load_for_training(start)
    )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise OpenQwenError(
            (
                f"The tokenizer has {tokenizer.vocab_size} ids, the network only "
                f"{model.config.vocab_size} rows for them."
            ),
            where=start,
            do="give the tokenizer that the model was trained with",
        )
    limit = min(config.max_length, model.config.max_position_embeddings)
    data = Demonstrations.read(demonstrations, tokenizer, limit, config.too_long)
    held_out = None
    if config.validation.file:
        held_out = Demonstrations.read(config.validation.file, tokenizer, limit, "leave out")
    elif config.validation.share:
        data, held_out = data.part(config.validation.share, generators["data.validation"])
    order = Epochs(len(data.samples), config.epochs, config.batch, generators)
    if config.lora.rank:
        if config.lora.base != "none" and not join().alone:
            raise OpenQwenError(
                "Packed matrices are not sharded.", where="lora.base", do="train in one process"
            )
        add_adapters(model, config.lora, generators.torch("lora"))

    def rows(chosen: Sequence[Sample]) -> list[Rows]:
        packs = pack([len(ids) for ids, _ in chosen], config.micro_tokens)
        return [
            Rows.of([chosen[i] for i in numbers], model.device, share=True) for numbers in packs
        ]

    trainer = Trainer(
        place,
        config,
        model,
        batch=lambda step: rows([data.samples[i] for i in order.batch(step)]),
        loss=lambda rows: next_token(model, rows),
        steps=order.steps,
        generators=generators,
        timed=True,
        name=lambda step: f"records {', '.join(str(data.numbers[i]) for i in order.batch(step))}",
        held_out=(lambda: rows(held_out.samples)) if held_out else None,
        validation=config.validation,
    )
    metrics = trainer.run()
    if config.lora.rank:
        trainer.whole = _merged(trainer, config, start)
    trainer.save_checkpoint(tokenizer, chat=True)
    counts = {"examples": len(data.samples), "held_out": len(held_out.samples) if held_out else 0}
    counts |= {"too_long": data.too_long, "truncated": data.truncated, "empty_answers": data.empty}
    return metrics | counts


@dataclass
class Demonstrations:
    """Demonstrations as token ids. numbers: which records of the file they are, from 1.

    The rest are counts.
    """

    samples: list[Sample]
    numbers: list[int]
    too_long: int
    truncated: int
    empty: int

    @classmethod
    def read(
        cls, path: Path, tokenizer: Tokenizer, limit: int, too_long: TooLong
    ) -> "Demonstrations":
        """Those of a source (see `read_records`) of at most `limit` tokens; of the others
        `too_long` decides.
        """
        whole, places, empty = list[Sample](), list[str](), 0
        for where, record in read_records(path):
            whole.append(encode_demonstration(tokenizer, record, where))
            places.append(where)
            empty += says_nothing(record)
        fitted = [
            (n, fit(s, limit, too_long, where))
            for n, (s, where) in enumerate(zip(whole, places), 1)
        ]
        kept = [(n, sample) for n, sample in fitted if sample is not None]
        if not kept:
            fitting(whole, [len(ids) for ids, _ in whole], limit, str(path))
        cut = sum(len(sample[0]) < len(whole[n - 1][0]) for n, sample in kept)
        return cls(
            [sample for _, sample in kept], [n for n, _ in kept], len(whole) - len(kept), cut, empty
        )

    def part(
        self, share: float, generator: np.random.Generator
    ) -> tuple["Demonstrations", "Demonstrations"]:
        """Two parts, in the file's order: the rest, and a random share of at least one; neither is
        empty.
        """
        if len(self.samples) < 2:
            raise OpenQwenError(
                "One demonstration cannot be learned from and held out.", where="validation.share"
            )
        count = min(max(1, round(share * len(self.samples))), len(self.samples) - 1)
        held = set(generator.permutation(len(self.samples))[:count].tolist())
        parts = (
            [i for i in range(len(self.samples)) if (i in held) == wanted]
            for wanted in (False, True)
        )
        rest, out = ([(self.samples[i], self.numbers[i]) for i in part] for part in parts)
        return tuple(  # type: ignore[return-value]
            replace(self, samples=[s for s, _ in part], numbers=[n for _, n in part])
            for part in (rest, out)
        )


def _merged(trainer: Trainer[Rows], config: SftConfig, start: Path) -> Callable[[], Qwen2 | Scorer]:
    """Write the adapter to `output/adapter`; what gives the network with it merged."""
    whole, folder = trainer.whole(), trainer.output / ADAPTER
    if trainer.world.main:
        save_adapter(whole, config.lora, folder, base=str(start))
        if (
            config.lora.base != "none"
        ):  # what was learned over rounded matrices goes into those that were rounded
            whole = load_model(start)
            load_adapter(whole, folder)
        merge_adapters(whole)
    return lambda: whole


def run_sft(run: StageRun) -> dict[str, float]:
    """A base model and demonstrations D → a chat model."""
    start = run.inputs["model"]
    return sft(run.config, start, run.data("demonstrations"), load_tokenizer(start), Place.of(run))


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    config, made = recipe.sft, recipe.instruct.demonstrations + recipe.instruct.repurposed
    longest = config.max_length
    rows = {CONVERSATION: made * config.epochs * CONVERSATION}
    return Effort(
        rows=rows,
        micro_tokens=max(config.micro_tokens, longest),
        longest=longest,
        data_from="instruct",
    )


STAGE = Stage(
    name="sft",
    help="Supervised fine-tuning on demonstrations.",
    config=SftConfig,
    inputs={"model": MODEL, "demonstrations": DEMONSTRATIONS},
    outputs=["model", CHAT],
    run=run_sft,
    trains_on_ranks=True,
    estimate=_effort,
)
