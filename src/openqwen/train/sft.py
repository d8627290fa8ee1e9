"""Supervised fine-tuning on demonstrations D: assistant tokens only (Qwen2 report, 4.2)."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from openqwen.model import load_model
from openqwen.model.lora import LoraConfig, add_adapters
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.records import Record, read_records
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
from openqwen.train.adapters import merged_network
from openqwen.train.conversations import (
    TooLong,
    check_some_fit,
    encode_demonstration,
    says_nothing,
    whole_turns,
)
from openqwen.train.losses import next_token
from openqwen.train.order import Epochs
from openqwen.train.packed_batch import PackedBatch, Sample
from openqwen.train.packing import MicroBatchConfig, pack
from openqwen.train.parallel import join, load_for_training
from openqwen.train.token_cache import TokenCache, encode_records
from openqwen.train.trainer import Place, Trainer, TrainingConfig
from openqwen.train.validation import ValidationConfig


class SftValidationConfig(ValidationConfig):
    """Demonstrations that are held out of training, and when the loss on them is measured."""

    share: float = Field(
        0.0, ge=0, lt=1, description="share of the demonstrations held out, drawn at random"
    )
    file: Path | None = Field(
        None, description="a file of held-out demonstrations, in place of a share"
    )

    @model_validator(mode="after")
    def _has_records(self) -> Self:
        if (self.every or self.outcome == "best") and not (self.share or self.file):
            raise ValueError("nothing is held out: give validation.share, such as 0.05, or file")
        return self


class SftConfig(MicroBatchConfig, TrainingConfig):
    """The report's settings: 2 epochs, 32,768 tokens, weight decay 0.1, clip 1.0.

    The learning rate falls from 7e-6 to 7e-7.
    """

    epochs: float = Field(2.0, gt=0, description="passes over the demonstrations")
    batch: int = Field(128, gt=0, description="conversations of one optimizer step")
    max_length: int = Field(32_768, gt=1, description="the most tokens of a conversation")
    too_long: TooLong = Field(
        "leave out",
        description="what to do with longer conversations: leave out and truncate count them,"
        " refuse stops at the first",
    )
    lora: LoraConfig = Field(
        default_factory=lambda: LoraConfig(rank=0),
        description="train adapters (LoRA, DoRA) in place of all weights; rank 0: none",
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
    # Adapters are initialised from the weights, so these are loaded at once.
    model = (
        load_model(start, device=best_device()) if config.lora.rank else load_for_training(start)
    )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise OpenQwenError(
            f"The tokenizer has {tokenizer.vocab_size} ids, the network only"
            f" {model.config.vocab_size} rows for them.",
            where=start,
            do="give the tokenizer that the model was trained with",
        )
    limit = min(config.max_length, model.config.max_position_embeddings)
    data = Demonstrations.read(demonstrations, tokenizer, limit, config.too_long, place)
    held_out = None
    if path := config.validation.file:
        held_out = Demonstrations.read(path, tokenizer, limit, "leave out", place, "validation")
    elif config.validation.share:
        data, held_out = data.split(config.validation.share, generators["data.validation"])
    order = Epochs(len(data), config.epochs, config.batch, generators)
    if config.lora.rank:
        if config.lora.base != "none" and not join().alone:
            raise OpenQwenError(
                "Packed matrices are not sharded.", where="lora.base", do="train in one process"
            )
        add_adapters(model, config.lora, generators.torch("lora"))

    world = join().with_mesh(config.train.parallel, model)

    def micro_batches(samples: list[Sample]) -> list[PackedBatch]:
        packs = pack([len(ids) for ids, _ in samples], config.micro_tokens)
        return [
            PackedBatch.of([samples[i] for i in numbers], model.device, share=True)
            for numbers in packs
        ]

    trainer = Trainer(
        place,
        config,
        model,
        batch=lambda step: micro_batches([data[i] for i in order.batch(step)]),
        loss=lambda rows: next_token(model, rows, world=world),
        steps=order.steps,
        generators=generators,
        log_mfu=True,
        name=lambda step: f"records {', '.join(str(data.record(i)) for i in order.batch(step))}",
        held_out=None if held_out is None else lambda: micro_batches(held_out.samples()),
        validation=config.validation,
        world=world,
    )
    metrics = trainer.run()
    if config.lora.rank:
        trainer.full_model = merged_network(trainer, config.lora, start)
    trainer.save_checkpoint(tokenizer, chat=True)
    counts = {"examples": len(data), "held_out": 0 if held_out is None else len(held_out)}
    return metrics | counts | data.left_out()


@dataclass
class Demonstrations:
    """Demonstrations as token ids, in the order of their file.

    chosen: their indices in the cache, [demonstrations]. lengths: the tokens to train on of each
    sample of the cache, [samples]; 0: it is left out.
    """

    cache: TokenCache
    chosen: np.ndarray
    lengths: np.ndarray

    @classmethod
    def read(
        cls,
        path: Path,
        tokenizer: Tokenizer,
        limit: int,
        too_long: TooLong,
        place: Place,
        name: str = "demonstrations",
    ) -> "Demonstrations":
        """The demonstrations of a source (see `read_records`), at most `limit` tokens of each.

        Args:
            place: the samples are cached in its `scratch`, in a folder called `name`.

        Raises:
            OpenQwenError: a record cannot be read, or no record is left.
        """

        def encode(record: Record, where: str, counts: Counter[str]) -> list[Sample]:
            sample = encode_demonstration(tokenizer, record, where)
            counts["empty_answers"] += says_nothing(record)
            return [sample]

        cache = encode_records(
            path, tokenizer, encode, place.scratch / name, f"{place.label} tokens"
        )
        lengths = cache.lengths.copy()
        long = np.flatnonzero(lengths > limit)
        if too_long == "refuse" and len(long):
            where, _ = next(islice(read_records(path), int(cache.records[long[0]]) - 1, None))
            raise OpenQwenError(
                f"This conversation has {lengths[long[0]]} tokens, and {limit} fit.",
                where=where,
                do="raise max_length, or shorten it",
            )
        for index in long.tolist():
            _, mask = cache[index]
            lengths[index] = whole_turns(mask, limit) if too_long == "truncate" else 0
        if not lengths.any():
            check_some_fit(cache.lengths, limit, path)
        return cls(cache, np.flatnonzero(lengths), lengths)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        number = self.chosen[index]
        ids, mask = self.cache[number]
        return ids[: self.lengths[number]], mask[: self.lengths[number]]

    def record(self, index: int) -> int:
        """The number of a demonstration's record in the file, from 1."""
        return int(self.cache.records[self.chosen[index]])

    def samples(self) -> list[Sample]:
        """All of them, in memory."""
        return [self[index] for index in range(len(self))]

    def left_out(self) -> dict[str, int]:
        """Counts over the whole file, for the metrics."""
        kept, cached = self.lengths, self.cache.lengths
        return {
            "too_long": int((kept == 0).sum()),
            "truncated": int(((kept > 0) & (kept < cached)).sum()),
            "empty_answers": self.cache.counts["empty_answers"],
        }

    def split(
        self, share: float, generator: np.random.Generator
    ) -> tuple["Demonstrations", "Demonstrations"]:
        """All but a random share, and that share, each in the file's order; neither is empty."""
        if len(self) < 2:
            raise OpenQwenError(
                "A single demonstration cannot be both trained on and held out.",
                where="validation.share",
            )
        count = min(max(1, round(share * len(self))), len(self) - 1)
        held_out = np.zeros(len(self), dtype=bool)
        held_out[generator.permutation(len(self))[:count]] = True
        rest, part = self.chosen[~held_out], self.chosen[held_out]
        return replace(self, chosen=rest), replace(self, chosen=part)


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
