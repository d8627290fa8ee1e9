"""The `sweep` stage: many small trainings → a scaling law for learning rate and batch size."""

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from openqwen.model import ModelConfig
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, sha256, write_json, write_text
from openqwen.support.generators import Generators
from openqwen.support.progress import console
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, TOKENIZER, TOKENS, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.optimizer import BadStepConfig, OptimizerConfig
from openqwen.train.packed_batch import Sample
from openqwen.train.packed_dataset import DataConfig, TokenSource
from openqwen.train.parallel import join
from openqwen.train.pretrain import NetworkConfig, PretrainConfig, network_config, pretrain
from openqwen.train.scaling import Bowl, Cell, Fit, Optimum, fit_laws
from openqwen.train.shards import held_out, token_sources, weighted
from openqwen.train.trainer import Place
from openqwen.train.validation import HELD_OUT

_PAGE = Path(__file__).with_name("sweep.html")
_LEAST_HELD = 0.9  # a law is doubtful if a smaller share of the bootstrap's draws gives one
_WIDE = 10  # an interval whose ends have this ratio does not identify a value


def _size(width: int, layers: int) -> NetworkConfig:
    return NetworkConfig(
        hidden_size=width, intermediate_size=8 * width // 3, layers=layers, heads=2, kv_heads=1
    )


class SweepConfig(Settings):
    """Small trainings that predict the learning rate and the batch size of a large one."""

    networks: dict[str, NetworkConfig] = Field(
        default_factory=lambda: {
            "small": _size(36, 2),
            "middle": _size(60, 3),
            "large": _size(84, 3),
        },
        description="the networks to train, dense or with experts",
    )
    amounts: list[int] = Field(
        [30_000, 90_000], min_length=1, description="amounts of data in tokens"
    )
    learning_rates: list[float] = Field(
        [1e-3, 2.5e-3, 6e-3, 1.5e-2], min_length=1, description="peak rates, logarithmically even"
    )
    batch_tokens: list[int] = Field([128, 384, 1_152], min_length=1, description="tokens of a step")
    data: DataConfig = Field(
        default_factory=lambda: DataConfig(context=128),
        description="the text to read; its tokens and batch_tokens vary",
    )
    rope_theta: float = Field(10_000.0, gt=1, description="RoPE base")
    train: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="optimizer; its rate varies"
    )
    heldout_tokens: int = Field(20_000, gt=0, description="held-out tokens to score on")
    draws: int = Field(200, ge=1, description="bootstrap draws behind each interval")
    target_parameters: float = Field(
        3.6e8, gt=0, description="size to predict for, without the embedding and output tables"
    )
    target_tokens: float = Field(1e10, gt=0, description="tokens to predict for")
    earlier: Path | None = Field(None, description="folder of a finished sweep to reuse")


def run_cells(
    config: SweepConfig,
    sources: Mapping[str, TokenSource],
    tokenizer: Tokenizer,
    heldout: Sequence[Sample],
    data_digest: str,
    scratch: Path,
    seed: int,
) -> list[dict[str, Any]]:
    """Train and score every cell of the grid that has no record yet; a killed one goes on.

    data_digest: of the shards and the held-out text; a record of other data is not used.

    Returns:
        The records of all cells, in the grid's order.
    """
    (scratch / "cells").mkdir(parents=True, exist_ok=True)
    earlier = read_json(config.earlier / "sweep.json")["cells"] if config.earlier else []
    known = {cell["key"]: cell for cell in earlier}
    axes = (config.networks, config.amounts, config.batch_tokens, config.learning_rates)
    grid = list(itertools.product(*axes))
    cells = []
    for number, (name, tokens, batch, rate) in enumerate(grid, 1):
        settings = _settings(config, config.networks[name], tokens, batch, rate)
        identity = [settings.model_dump(mode="json"), config.heldout_tokens, seed, data_digest]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        done = scratch / "cells" / f"{key}.json"
        if key not in known and not done.exists():
            work = scratch / f"cell-{key[:12]}"
            place = Place(work / "model", work, seed, f"cell {number}/{len(grid)}")
            metrics = pretrain(
                settings, sources, tokenizer, tokenizer.vocab_size, None, place, heldout
            )
            record = {
                "key": key,
                "network": name,
                "tokens": tokens,
                "batch_tokens": batch,
                "learning_rate": rate,
                "parameters": body_parameters(network_config(settings, tokenizer.vocab_size)),
                "loss": metrics[HELD_OUT],
            }
            write_json(done, record)
            shutil.rmtree(work)
        cells.append({**(known.get(key) or read_json(done)), "network": name})
        text = f"{name}, {tokens:,} tokens, batch {batch:,}, learning rate {rate:.2g}: loss "
        text += f"{cells[-1]['loss']:.3f}{' (known)' if key in known else ''}"
        console.print(f"  cell {number}/{len(grid)}  {text}", markup=False)
    return cells


def _settings(
    config: SweepConfig, network: NetworkConfig, tokens: int, batch: int, rate: float
) -> PretrainConfig:
    """The settings of one cell. A diverging one must give a high loss, and not end the sweep."""
    bad = BadStepConfig(action="skip", patience=10**9)
    return PretrainConfig(
        network=network,
        data=config.data.model_copy(update={"tokens": tokens, "batch_tokens": batch}),
        rope_theta=config.rope_theta,
        train=config.train.model_copy(update={"learning_rate": rate, "bad": bad}),
    )


def body_parameters(config: ModelConfig) -> int:
    """Parameters that a token passes, without embedding and output tables: the N of the law."""
    tables = 1 if config.tie_word_embeddings else 2
    return config.parameters(active=True) - tables * config.vocab_size * config.hidden_size


def run_sweep(run: StageRun) -> dict[str, float]:
    """Token shards → sweep.json and sweep.html: the cells, the laws and their predictions."""
    if not join().alone:
        raise OpenQwenError(
            "'sweep' trains in one process only.",
            where=run.label,
            do="run the same command without torchrun",
        )
    config: SweepConfig = run.config
    folder, corpus = run.inputs["tokens"], run.inputs["corpus"]
    tokenizer, sources = load_tokenizer(run.inputs["tokenizer"]), token_sources(folder)
    settings = config.model_copy(update={"data": weighted(config.data, corpus, sources)})
    order = Generators(run.seed)["sweep.heldout"]
    heldout = held_out(corpus, tokenizer, config.data.row, config.heldout_tokens, order)
    files = [*sorted(folder.glob("*.json")), corpus / "heldout.parquet"]
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    cells = run_cells(settings, sources, tokenizer, heldout, digest, run.scratch, run.seed)
    result = judge(cells, config, run.seed)
    write_json(run.output / "sweep.json", result)
    page = _PAGE.read_text(encoding="utf-8").replace(
        "DATA", json.dumps(result).replace("<", "\\u003c")
    )
    write_text(run.output / "sweep.html", page)
    for line in result["notes"]:
        console.print(f"  {line}", markup=False)
    laws = {name: result[name] for name in ("learning_rate", "batch_tokens")}
    return {name: law["predicted"] if law else math.nan for name, law in laws.items()} | {
        "cells": len(cells)
    }


def judge(records: Sequence[dict[str, Any]], config: SweepConfig, seed: int) -> dict[str, Any]:
    """The content of sweep.json; `notes` holds every reason to doubt the laws."""
    names = ("parameters", "tokens", "learning_rate", "batch_tokens", "loss")
    cells = [Cell(*(record[name] for name in names)) for record in records]
    bowls, optima, *fits = fit_laws(cells, config.draws, Generators(seed)["sweep.bootstrap"])
    target = (config.target_parameters, config.target_tokens)
    faults = [[o.rate_fault for o in optima], [o.batch_fault for o in optima]]
    notes = []
    for name, fit, fault in zip(("learning rate", "batch size"), fits, faults, strict=True):
        notes += _notes(name, fit, fault, optima, target)
    if conditional := sum(not rate and bool(batch) for rate, batch in zip(*faults, strict=True)):
        notes.append(
            f"{conditional} of the learning rates are optima for a batch size on the edge of the "
            "grid, not for the best one."
        )
    sizes, amounts = max(c.parameters for c in cells), max(c.tokens for c in cells)
    if target[0] > 10 * sizes or target[1] > 10 * amounts:
        notes.append(
            f"This is far beyond the cells: {target[0] / sizes:,.0f} times the largest network and "
            f"{target[1] / amounts:,.0f} times the data. The interval covers their noise, but not "
            "a law that changes beyond them."
        )
    low = min(c.parameters for c in cells)
    return {
        "notes": notes,
        "target": {"parameters": target[0], "tokens": target[1]},
        "learning_rate": _law(fits[0], target, low),
        "batch_tokens": _law(fits[1], target, low),
        "optima": [asdict(optimum) for optimum in optima],
        "bowls": [_curves(bowl) for bowl in bowls],
        "cells": list(records),
    }


def _notes(
    name: str, fit: Fit, faults: list[str], optima: list[Optimum], target: tuple[float, float]
) -> list[str]:
    if fit.law is None:
        known = f"{faults.count('')} of {len(faults)} optima are known"
        lines = [f"No law for the {name}: {known}, and it needs more."]
    else:
        low, high = fit.interval(*target)
        lines = [
            f"{name.capitalize()} for {target[0]:.3g} parameters and {target[1]:.3g} tokens: "
            f"{fit.law.at(*target):.3g} (90 % of the resamples: {low:.3g} to {high:.3g}); law: "
            f"{fit.law}."
        ]
        if fit.held < _LEAST_HELD:
            lines.append(
                f"It is doubtful: only {fit.held:.0%} of the resamples gave a law for the {name}."
            )
        if high >= _WIDE * low:
            lines.append(
                f"The {name} is not identified: the interval spans a factor of {high / low:,.0f}. "
                "It needs more cells."
            )
        exponents = {"size": fit.law.of_parameters, "amount of data": fit.law.of_tokens}
        for what, exponent in exponents.items():
            if math.isnan(exponent):
                lines.append(
                    f"Optima are known at one {what} only: how it changes the {name} is unknown."
                )
    at = (f"At {o.parameters:,.0f} parameters and {o.tokens:,.0f} tokens" for o in optima)
    return lines + [f"{place} {fault}." for place, fault in zip(at, faults, strict=True) if fault]


def _law(fit: Fit, target: tuple[float, float], smallest: float) -> dict[str, Any] | None:
    """A law for sweep.json. band: sizes, each with the interval there at the target's tokens."""
    if fit.law is None:
        return None
    sizes = np.geomspace(min(smallest, target[0]), target[0], 30).tolist()
    values = {"of_parameters": fit.law.of_parameters, "of_tokens": fit.law.of_tokens}
    return {
        "constant": math.exp(fit.law.constant),
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "predicted": fit.law.at(*target),
        "resamples_held": fit.held,
        "band": [
            [size, *(v if math.isfinite(v) else None for v in fit.interval(size, target[1]))]
            for size in sizes
        ],
    }


def _curves(bowl: Bowl) -> dict[str, Any]:
    batches = sorted({c.batch_tokens for c in bowl.cells})
    curves = [{"batch_tokens": b, "points": bowl.curve(b)} for b in batches]
    return {
        "parameters": bowl.cells[0].parameters,
        "tokens": bowl.cells[0].tokens,
        "curves": curves,
    }


STAGE = Stage(
    name="sweep",
    help="Fit a scaling law for learning rate and batch size to many small trainings.",
    config=SweepConfig,
    inputs={"tokens": TOKENS, "tokenizer": TOKENIZER, "corpus": CORPUS},
    outputs=[],
    run=run_sweep,
)
