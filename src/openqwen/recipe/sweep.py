"""`openqwen pretrain --sweep`: small trainings → a scaling law for learning rate and batch size, and its picture."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from openqwen.recipe.pretraining import held_out, token_sources, weighted
from openqwen.recipe.stage import Work
from openqwen.support.files import sha256, write_json, write_text
from openqwen.support.generators import Generators
from openqwen.support.progress import console
from openqwen.tokenizer import load_tokenizer
from openqwen.train.scaling import Bowl, Cell, Fit, Optimum, fit_laws
from openqwen.train.sweep import SweepConfig, run_cells

HELP = "Fit a scaling law for learning rate and batch size to many small trainings (pretrain --sweep)."
_PAGE = Path(__file__).parent / "report" / "templates" / "sweep.html"
_SHAKY = 0.9  # share of the bootstrap's draws that must give a law
_WIDE = 10  # upper over lower end of an interval that says nothing


def run_sweep(work: Work) -> dict[str, float]:
    """Token shards → sweep.json and sweep.html: the cells, the laws, and what they predict for the size asked about."""
    config = work.config
    folder, corpus = work.inputs["tokens"], work.inputs["corpus"]
    tokenizer, sources = load_tokenizer(work.inputs["tokenizer"]), token_sources(folder)
    settings = config.model_copy(update={"data": weighted(config.data, corpus, sources)})
    order = Generators(work.seed)["sweep.heldout"]
    heldout = held_out(corpus, tokenizer, config.data.row, config.heldout_tokens, order)
    files = [*sorted(folder.glob("*.json")), corpus / "heldout.parquet"]
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    cells = run_cells(settings, sources, tokenizer, heldout, digest, work.scratch, work.seed)
    result = judge(cells, config, work.seed)
    write_json(work.output / "sweep.json", result)
    page = _PAGE.read_text(encoding="utf-8").replace("DATA", json.dumps(result).replace("<", "\\u003c"))
    write_text(work.output / "sweep.html", page)
    for line in result["notes"]:
        console.print(f"  {line}", markup=False)
    laws = {name: result[name] for name in ("learning_rate", "batch_tokens")}
    return {name: law["predicted"] if law else math.nan for name, law in laws.items()} | {"cells": len(cells)}


def judge(records: Sequence[dict[str, Any]], config: SweepConfig, seed: int) -> dict[str, Any]:
    """What sweep.json says: cells, bowls, optima, laws, and in `notes` every reason to doubt them."""
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
            f"{conditional} of the learning rates hold at a batch size on the edge of the grid, not at the best."
        )
    sizes, amounts = max(c.parameters for c in cells), max(c.tokens for c in cells)
    if target[0] > 10 * sizes or target[1] > 10 * amounts:
        notes.append(
            f"This is far beyond the cells: {target[0] / sizes:,.0f} times the largest network and "
            f"{target[1] / amounts:,.0f} times the data. The interval holds their noise, not that the law may bend."
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


def _notes(name: str, fit: Fit, faults: list[str], optima: list[Optimum], target: tuple[float, float]) -> list[str]:
    if fit.law is None:
        lines = [f"No law for the {name}: {faults.count('')} of {len(faults)} optima are known, and it needs more."]
    else:
        low, high = fit.interval(*target)
        lines = [
            f"{name.capitalize()} for {target[0]:.3g} parameters and {target[1]:.3g} tokens: "
            f"{fit.law.at(*target):.3g} (90 % of the resamples: {low:.3g} to {high:.3g}); law: {fit.law}."
        ]
        if fit.held < _SHAKY:
            lines.append(f"That is doubtful: only {fit.held:.0%} of the resamples gave a law for the {name}.")
        if high >= _WIDE * low:
            lines.append(
                f"That is not identified: the interval spans a factor of {high / low:,.0f}. It needs more cells."
            )
        for what, exponent in (("size", fit.law.of_parameters), ("amount of data", fit.law.of_tokens)):
            if math.isnan(exponent):
                lines.append(f"Optima are known at one {what} only: how the {name} depends on it is not.")
    at = (f"At {o.parameters:,.0f} parameters and {o.tokens:,.0f} tokens" for o in optima)
    return lines + [f"{place} {fault}." for place, fault in zip(at, faults, strict=True) if fault]


def _law(fit: Fit, target: tuple[float, float], smallest: float) -> dict[str, Any] | None:
    """band: size, and the interval there at the tokens asked about."""
    if fit.law is None:
        return None
    sizes = np.geomspace(min(smallest, target[0]), target[0], 30).tolist()
    values = {"of_parameters": fit.law.of_parameters, "of_tokens": fit.law.of_tokens}
    return {
        "constant": math.exp(fit.law.constant),
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "predicted": fit.law.at(*target),
        "resamples_held": fit.held,
        "band": [[size, *(v if math.isfinite(v) else None for v in fit.interval(size, target[1]))] for size in sizes],
    }


def _curves(bowl: Bowl) -> dict[str, Any]:
    batches = sorted({c.batch_tokens for c in bowl.cells})
    curves = [{"batch_tokens": b, "points": bowl.curve(b)} for b in batches]
    return {"parameters": bowl.cells[0].parameters, "tokens": bowl.cells[0].tokens, "curves": curves}
