"""Many small trainings over sizes × data × learning rates × batch sizes: what the scaling law is fitted to."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.model import ModelConfig
from openqwen.support.files import read_json, write_json
from openqwen.support.progress import console
from openqwen.support.settings import Settings
from openqwen.tokenizer import Tokenizer
from openqwen.train.optimizer import BadStepConfig, OptimizerConfig
from openqwen.train.pieces import DataConfig, TokenSource
from openqwen.train.pretrain import NetworkConfig, PretrainConfig, network_config, pretrain
from openqwen.train.rows import Sample
from openqwen.train.trainer import Place
from openqwen.train.validation import HELD_OUT


def _size(width: int, layers: int) -> NetworkConfig:
    return NetworkConfig(hidden_size=width, intermediate_size=8 * width // 3, layers=layers, heads=2, kv_heads=1)


class SweepConfig(Settings):
    """Small trainings that tell the learning rate and the batch size of a large one."""

    networks: dict[str, NetworkConfig] = Field(
        default_factory=lambda: {"small": _size(36, 2), "middle": _size(60, 3), "large": _size(84, 3)},
        description="the sizes, dense or with experts",
    )
    amounts: list[int] = Field([30_000, 90_000], min_length=1, description="amounts of data, in tokens")
    learning_rates: list[float] = Field(
        [1e-3, 2.5e-3, 6e-3, 1.5e-2], min_length=1, description="peak learning rates, evenly apart in logarithm"
    )
    batch_tokens: list[int] = Field([128, 384, 1_152], min_length=1, description="tokens of one optimizer step")
    data: DataConfig = Field(
        default_factory=lambda: DataConfig(context=128), description="what is read; its tokens and batch_tokens vary"
    )
    rope_theta: float = Field(10_000.0, gt=1, description="RoPE base")
    train: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer; its learning rate varies")
    heldout_tokens: int = Field(20_000, gt=0, description="held-out tokens that each cell is scored on")
    draws: int = Field(200, ge=1, description="bootstrap draws behind each interval")
    target_parameters: float = Field(3.6e8, gt=0, description="size to predict for, without the vocabulary's tables")
    target_tokens: float = Field(1e10, gt=0, description="tokens to predict for")
    earlier: Path | None = Field(None, description="a finished sweep's folder: its cells are not trained again")


def run_cells(
    config: SweepConfig,
    sources: Mapping[str, TokenSource],
    tokenizer: Tokenizer,
    heldout: Sequence[Sample],
    data_digest: str,
    scratch: Path,
    seed: int,
) -> list[dict[str, Any]]:
    """Train and score every cell that is not there yet; a killed one goes on. The records, in the grid's order.

    data_digest: of the shards and the held-out text, so that a cell of other data is not taken for this one's.
    """
    (scratch / "cells").mkdir(parents=True, exist_ok=True)
    known = {cell["key"]: cell for cell in read_json(config.earlier / "sweep.json")["cells"]} if config.earlier else {}
    grid = list(itertools.product(config.networks, config.amounts, config.batch_tokens, config.learning_rates))
    cells = []
    for number, (name, tokens, batch, rate) in enumerate(grid, 1):
        settings = _settings(config, config.networks[name], tokens, batch, rate)
        identity = [settings.model_dump(mode="json"), config.heldout_tokens, seed, data_digest]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        done = scratch / "cells" / f"{key}.json"
        if key not in known and not done.exists():
            work = scratch / f"cell-{key[:12]}"
            place = Place(work / "model", work, seed, f"cell {number}/{len(grid)}")
            metrics = pretrain(settings, sources, tokenizer, tokenizer.vocab_size, None, place, heldout)
            record = {
                "key": key, "network": name, "tokens": tokens, "batch_tokens": batch, "learning_rate": rate,
                "parameters": body_parameters(network_config(settings, tokenizer.vocab_size)),
                "loss": metrics[HELD_OUT],
            }  # fmt: skip
            write_json(done, record)
            shutil.rmtree(work)
        cells.append({**(known.get(key) or read_json(done)), "network": name})
        told = f"{name}, {tokens:,} tokens, batch {batch:,}, learning rate {rate:.2g}: loss {cells[-1]['loss']:.3f}"
        console.print(f"  cell {number}/{len(grid)}  {told}{' (known)' if key in known else ''}", markup=False)
    return cells


def _settings(config: SweepConfig, network: NetworkConfig, tokens: int, batch: int, rate: float) -> PretrainConfig:
    """One cell as a pre-training. A rate at which it breaks up is to be seen as a high loss, not to end the sweep."""
    bad = BadStepConfig(action="skip", patience=10**9)
    return PretrainConfig(
        network=network,
        data=config.data.model_copy(update={"tokens": tokens, "batch_tokens": batch}),
        rope_theta=config.rope_theta,
        train=config.train.model_copy(update={"learning_rate": rate, "bad": bad}),
    )


def body_parameters(config: ModelConfig) -> int:
    """Parameters that a token passes, without the tables of the vocabulary: the N of the law."""
    tables = 1 if config.tie_word_embeddings else 2
    return config.parameters(active=True) - tables * config.vocab_size * config.hidden_size
