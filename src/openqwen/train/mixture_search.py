"""The `corpus-mix` stage: many small trainings on random mixtures → the weights of the sources.

RegMix (Liu et al. 2024, arXiv 2407.01492); Qwen2 and Qwen2.5 chose their mixtures by trials on
small models too (Qwen2 report, 3.1).

    random mixtures → proxies → held-out loss of each source → regressions (mixture_fit.py)
    → 100,000 simulated mixtures, in the range of the proxies' → the mean of the best
    → measured beside the natural one

The regressions see losses of proxies of one size and one amount of data. RegMix found that the
order of mixtures stays when the model grows a thousandfold; it is for the user to check.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import read_json, sha256, write_json
from openqwen.support.generators import Generators
from openqwen.support.progress import console
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, TOKENIZER, TOKENS, Stage, StageRun
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.losses import next_token
from openqwen.train.mixture_fit import (
    LossFit,
    best_mixture,
    capped,
    draw_mixtures,
    fit_loss,
    spearman,
    within,
)
from openqwen.train.optimizer import BadStepConfig, OptimizerConfig
from openqwen.train.packed_batch import PackedBatch, Sample
from openqwen.train.packed_dataset import DataConfig, TokenSource
from openqwen.train.parallel import join
from openqwen.train.pretrain import NetworkConfig, PretrainConfig, pretrain
from openqwen.train.shards import held_out, token_sources
from openqwen.train.trainer import Place

_BEST = 100  # simulated mixtures whose mean is proposed (RegMix)
_SKIP = BadStepConfig(action="skip", patience=10**9)
_ROWS = 4  # of the longest piece of a document
_SCORED = 32  # rows that are scored together


class MixtureSearchConfig(Settings):
    """A search of a mixture by small trainings. The defaults are for two CPU cores."""

    network: NetworkConfig = Field(
        default_factory=lambda: NetworkConfig(
            hidden_size=64, intermediate_size=176, layers=2, heads=2, kv_heads=1
        ),
        description="the proxies' network (RegMix: 1 million parameters)",
    )
    proxies: int = Field(48, ge=8, description="small trainings, each on a random mixture")
    strength: tuple[float, float] = Field(
        (0.3, 5.0), description="Dirichlet parameters of the random mixtures: smallest and largest"
    )
    data: DataConfig = Field(
        default_factory=lambda: DataConfig(tokens=100_000, context=128, batch_tokens=1_024),
        description="the text of one training; its mixture varies",
    )
    rope_theta: float = Field(10_000.0, gt=1, description="RoPE base")
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3), description="optimizer"
    )
    heldout_tokens: int = Field(10_000, gt=0, description="held-out tokens of each source")
    targets: dict[str, float] = Field(
        {}, description="source -> its weight in the mean of the losses; none named: all alike"
    )
    simulated: int = Field(100_000, ge=_BEST, description="mixtures that are simulated")
    target_tokens: int | None = Field(
        None, gt=0, description="tokens of the large training, for most_epochs; none: no limit"
    )
    most_epochs: float = Field(
        4.0, gt=0, description="how often a source may be read in it (Muennighoff et al. 2023: 4)"
    )
    checks: int = Field(
        3, ge=0, description="seeds by which the proposed and the natural mixture are measured"
    )


class CutSource:
    """A source whose documents are cut into pieces of at most `longest` tokens.

    A proxy reads few tokens. One long document would have more of them than the mixture allows.
    """

    def __init__(self, source: TokenSource, longest: int):
        self._source, self._longest = source, longest
        counts = -(-source.lengths // longest)
        self._owner = np.repeat(np.arange(len(counts)), counts)
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        self._start = (np.arange(len(self._owner)) - firsts) * longest
        self.lengths = np.minimum(source.lengths[self._owner] - self._start, longest)

    def document(self, number: int) -> np.ndarray:
        """Token ids of one piece."""
        whole = self._source.document(int(self._owner[number]))
        start = int(self._start[number])
        return whole[start : start + self._longest]


class MixtureSearch:
    """Proxies over one set of shards. losses of a mixture: [sources], nats per token."""

    def __init__(
        self,
        config: MixtureSearchConfig,
        sources: Mapping[str, TokenSource],
        tokenizer: Tokenizer,
        heldout: Mapping[str, Sequence[Sample]],
        digest: str,
        scratch: Path,
    ):
        longest = _ROWS * config.data.row
        self.sources = {name: CutSource(source, longest) for name, source in sources.items()}
        self.config, self.tokenizer = config, tokenizer
        self.heldout, self.digest, self.scratch = heldout, digest, scratch
        self.names = sorted(sources)
        (scratch / "proxies").mkdir(parents=True, exist_ok=True)

    def losses(self, weights_S: np.ndarray, seed: int, label: str) -> list[float]:
        """Train on a mixture and score; a training that is recorded is not done again."""
        mixture = dict(zip(self.names, weights_S.tolist(), strict=True))
        settings = PretrainConfig(
            network=self.config.network,
            data=self.config.data.model_copy(update={"mixture": mixture}),
            rope_theta=self.config.rope_theta,
            # One that diverges must have a high loss, and not end the search.
            train=self.config.train.model_copy(update={"bad": _SKIP}),
        )
        identity = [settings.model_dump(mode="json"), self.config.heldout_tokens, seed, self.digest]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        record = self.scratch / "proxies" / f"{key}.json"
        if not record.exists():
            work = self.scratch / f"proxy-{key[:12]}"
            place = Place(work / "model", work, seed, label)
            vocabulary = self.tokenizer.vocab_size
            pretrain(settings, self.sources, self.tokenizer, vocabulary, None, place, [])
            write_json(record, [self._score(work / "model", name) for name in self.names])
            shutil.rmtree(work)
        losses: list[float] = read_json(record)
        shown = ", ".join(f"{n} {w:.2f}: {x:.3f}" for (n, w), x in zip(mixture.items(), losses))
        console.print(f"  {label}  {shown}", markup=False)
        return losses

    @torch.no_grad()
    def _score(self, folder: Path, name: str) -> float:
        model = load_model(folder, device=best_device())
        samples, total, count = self.heldout[name], 0.0, 0
        for start in range(0, len(samples), _SCORED):
            batch = PackedBatch.of(samples[start : start + _SCORED], model.device)
            loss = next_token(model, batch)
            total, count = total + float(loss.sum), count + loss.count
        return total / count


def search(found: MixtureSearch, targets_S: np.ndarray, seed: int) -> dict[str, Any]:
    """Train the proxies, fit, propose and measure: the content of mixture.json."""
    config, generators = found.config, Generators(seed)
    tokens_S = np.array([float(found.sources[name].lengths.sum()) for name in found.names])
    natural_S = tokens_S / tokens_S.sum()
    most_S = np.ones(len(tokens_S))
    if config.target_tokens:
        most_S = np.minimum(config.most_epochs * tokens_S / config.target_tokens, 1.0)
    capped(natural_S[None], most_S)  # an error is better now than after the proxies
    rng = generators["mixture.proxies"]
    mixtures_RS = draw_mixtures(natural_S, config.strength, config.proxies, rng)
    losses_RS = np.array(
        [
            found.losses(weights, seed, f"proxy {n}/{config.proxies}")  # they differ in data alone
            for n, weights in enumerate(mixtures_RS, 1)
        ]
    )
    fits = [fit_loss(mixtures_RS, losses_R) for losses_R in losses_RS.T]
    simulated = draw_mixtures(
        natural_S, config.strength, config.simulated, generators["mixture.simulated"]
    )
    seen = within(capped(simulated, most_S), mixtures_RS)
    proposed_S = best_mixture(fits, targets_S, seen, _BEST)
    result: dict[str, Any] = {
        "sources": found.names,
        "targets": targets_S.tolist(),
        "proxies": [
            {"weights": weights, "losses": losses}
            for weights, losses in zip(mixtures_RS.tolist(), losses_RS.tolist(), strict=True)
        ],
        "fits": {name: _fit_record(fit) for name, fit in zip(found.names, fits, strict=True)},
        "natural_share": dict(zip(found.names, natural_S.tolist(), strict=True)),
        "mixture": dict(zip(found.names, proposed_S.tolist(), strict=True)),
    }
    seeds = range(seed + 1, seed + 1 + config.checks)  # no proxy has them
    for name, weights_S in (("natural", natural_S), ("proposed", proposed_S)):
        predicted = np.array([fit.at(weights_S[None])[0] for fit in fits])
        measured = [found.losses(weights_S, one, f"{name}, seed {one}") for one in seeds]
        result[name] = {
            "weights": weights_S.tolist(),
            "predicted": predicted.tolist(),
            "predicted_mean": float(predicted @ targets_S),
            "measured": measured,
            "measured_means": [float(np.array(losses) @ targets_S) for losses in measured],
        }
    means_R = losses_RS @ targets_S
    best = int(np.argmin(means_R))
    result["best_proxy"] = {"weights": mixtures_RS[best].tolist(), "mean": float(means_R[best])}
    result["predicted_rank"] = spearman(
        np.stack([fit.at(mixtures_RS) for fit in fits], axis=1) @ targets_S, means_R
    )
    return result


def _fit_record(fit: LossFit) -> dict[str, Any]:
    return {"form": fit.form, "ridge": fit.ridge, "error": fit.error, "rank": fit.rank}


def run_mixture_search(run: StageRun) -> dict[str, float]:
    """Token shards → mixture.json: the proposed weights, and what was predicted and measured."""
    if not join().alone:
        do = "run the same command without torchrun"
        raise OpenQwenError("'corpus-mix' trains in one process only.", run.label, do)
    config: MixtureSearchConfig = run.config
    folder, corpus = run.inputs["tokens"], run.inputs["corpus"]
    tokenizer, sources = load_tokenizer(run.inputs["tokenizer"]), token_sources(folder)
    names = sorted(sources)
    targets = _targets(config.targets, names)
    if len(names) < 2:
        do = "put the documents of each domain into a folder of its own"
        raise OpenQwenError("A mixture needs two sources or more.", folder, do)
    heldout = {}
    for name in names:
        order = Generators(run.seed)[f"mixture.heldout.{name}"]
        heldout[name] = held_out(
            corpus, tokenizer, config.data.row, config.heldout_tokens, order, name
        )
    files = [*sorted(folder.glob("*.json")), corpus / "heldout.parquet"]
    digest = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    found = MixtureSearch(config, sources, tokenizer, heldout, digest, run.scratch)
    result = search(found, targets, run.seed)
    write_json(run.output / "mixture.json", result)
    _show(result)
    metrics = {"predicted_loss": result["proposed"]["predicted_mean"], "proxies": config.proxies}
    for name in ("proposed", "natural"):
        if means := result[name]["measured_means"]:
            metrics[f"{name}_loss"] = float(np.mean(means))
    return metrics


def _targets(given: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    """The weight of each source in the mean; they sum to 1."""
    if unknown := sorted(given.keys() - set(names)):
        what = f"There is no source '{unknown[0]}'.{suggestion(unknown[0], names)}"
        raise OpenQwenError(what, "targets", f"the sources are {', '.join(names)}")
    weights = np.array([given.get(name, 0.0) if given else 1.0 for name in names])
    if (weights < 0).any() or not weights.sum() > 0:
        raise OpenQwenError("The targets must be positive numbers.", "targets")
    normal: np.ndarray = weights / weights.sum()
    return normal


def _show(result: Mapping[str, Any]) -> None:
    """Print the weights, and the predicted and the measured loss of both mixtures."""
    for source, fit in result["fits"].items():
        text = f"  loss of {source}: leave-one-out error {fit['error']:.3f}, rank correlation "
        console.print(f"{text}{fit['rank']:.2f}", markup=False)
    for name in ("natural", "proposed"):
        entry = result[name]
        weights = ", ".join(
            f"{source} {weight:.3f}" for source, weight in zip(result["sources"], entry["weights"])
        )
        measured = ", ".join(f"{mean:.4f}" for mean in entry["measured_means"]) or "not"
        text = f"  {name}: {weights}; mean loss predicted {entry['predicted_mean']:.4f}, measured "
        console.print(text + measured, markup=False)


STAGE = Stage(
    name="corpus-mix",
    help="Search the weights of a corpus's sources by small trainings on random mixtures.",
    config=MixtureSearchConfig,
    inputs={"tokens": TOKENS, "tokenizer": TOKENIZER, "corpus": CORPUS},
    outputs=[],
    run=run_mixture_search,
)
