"""`openqwen verify`: the proofs of training and generation on the user's own model and data (law
10).

Each proof computes one thing in two ways and compares. Bounds are relative, for float32; bits are
compared where bits are promised.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from openqwen.engine import Engine, Output, Sampling
from openqwen.engine.score import score_tokens
from openqwen.model import Packed, Qwen2, load_model
from openqwen.recipe.verify_ranks import gradient_over_ranks, missing_memory
from openqwen.support.batching import cut_to_budget
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.progress import console, progress
from openqwen.support.records import read_records
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.train.conversations import encode_demonstration
from openqwen.train.losses import next_token, token_log_probs
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch, Sample
from openqwen.train.trainer import Place, SaveConfig, Trainer, TrainingConfig

_LOSS, _GRADIENT, _LOG_PROB = 1e-5, 1e-4, 1e-4  # relative, relative, absolute
_SPEAK = 32  # tokens of each answer that the engine writes


@dataclass(frozen=True)
class Proof:
    """One statement, the largest difference that was seen, and the one allowed (0: the same
    bits).
    """

    statement: str
    seen: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the statement is true here."""
        return self.seen <= self.bound


def verify(model: Path, data: Path, records: int = 16, seed: int = 0, ranks: int = 2) -> bool:
    """Print the proofs; returns whether all hold.

    Args:
        model: The model's folder.
        data: A JSONL, JSON or Parquet file of demonstrations, or hub:owner/name:split.
        records: How many of them to use, from the start.
        seed: Of every random draw.
        ranks: Processes that share the work in the last proof; 0 leaves it out.
    """
    tokenizer = load_tokenizer(model)
    network = load_model(model, device=best_device()).eval()
    samples = [
        encode_demonstration(tokenizer, record, where)
        for where, record in islice(read_records(data), records)
    ]
    if len(samples) < 2:
        raise OpenQwenError(
            "Packing needs at least two demonstrations.", where=data, do="give more, or --records 2"
        )
    proofs: list[Proof] = []
    with progress("verify", total=6 + (ranks > 0), unit="proofs") as bar:
        for proof in all_proofs(network, tokenizer, samples, seed):
            proofs.append(proof)
            bar.advance()
        short = missing_memory(network.config) if ranks else 0.0
        if ranks and not short:
            proofs.append(ranks_do_not_matter(network, model, samples, ranks))
    console.print(_table(proofs))
    if short:
        console.print(
            f"Not tried: {ranks} processes; they need {short / 2**30:.1f} GiB more memory than "
            "is free."
        )
    return all(proof.holds for proof in proofs)


def all_proofs(
    model: Qwen2, tokenizer: Tokenizer, samples: Sequence[Sample], seed: int
) -> Iterator[Proof]:
    """Yield each proof when it is done."""
    yield from packed_equals_unpacked(model, samples)
    yield cuts_do_not_matter(model, samples, seed)
    yield resumed_equals_uninterrupted(model, samples, seed)
    yield from trainer_equals_engine(model, tokenizer, samples, seed)


def packed_equals_unpacked(model: Qwen2, samples: Sequence[Sample]) -> Iterator[Proof]:
    """All documents in one row against each alone: the loss, then its gradient."""
    together = _gradient(model, [samples])
    alone = _gradient(model, [[sample] for sample in samples])
    yield Proof(
        "packed documents give the loss of each alone", _relative(together[0], alone[0]), _LOSS
    )
    yield Proof(
        "packed documents give the gradient of each alone",
        _relative(together[1], alone[1]),
        _GRADIENT,
    )


def cuts_do_not_matter(model: Qwen2, samples: Sequence[Sample], seed: int) -> Proof:
    """Micro-batches of several sizes, in another order, dealt to three ranks and summed, against
    one batch.
    """
    whole = _gradient(model, [samples])[1]
    order = Generators(seed)["verify.cuts"].permutation(len(samples))
    shuffled = [samples[i] for i in order]
    sizes = [len(ids) for ids, _ in shuffled]
    worst = 0.0
    for budget in (max(sizes), 2 * max(sizes)):
        micros = [shuffled[cut] for cut in cut_to_budget(sizes, budget)]
        ranks = [micros[rank::3] for rank in range(3)]
        worst = max(
            worst, _relative(_gradient(model, [m for rank in ranks for m in rank])[1], whole)
        )
    return Proof("any cut into micro-batches and ranks: one gradient", worst, _GRADIENT)


def ranks_do_not_matter(
    model: Qwen2, source: Path, samples: Sequence[Sample], ranks: int = 2
) -> Proof:
    """A micro-batch for each document, dealt to real processes that hold shards, against one batch
    in this one.
    """
    found = gradient_over_ranks(source, [[sample] for sample in samples], ranks)
    whole = _gradient(model, [samples])[1]
    theirs = [found[name].to(model.device) for name, _ in model.named_parameters()]
    number = {2: "two"}.get(ranks, str(ranks))
    return Proof(
        f"{number} processes that share the network: one gradient",
        _relative(theirs, whole),
        _GRADIENT,
    )


def resumed_equals_uninterrupted(model: Qwen2, samples: Sequence[Sample], seed: int) -> Proof:
    """Four steps in one go against four steps with a kill after the second: the weights, bit by
    bit.
    """

    class Kill(Exception):
        pass

    def train(folder: Path, killed_at: int | None = None) -> Qwen2:
        network = copy.deepcopy(model)

        def batch(step: int) -> list[PackedBatch]:
            if step == killed_at:
                raise Kill
            return [PackedBatch.of(samples[step % len(samples) :][:2], network.device)]

        config = TrainingConfig(
            train=OptimizerConfig(learning_rate=1e-5), save=SaveConfig(seconds=0)
        )
        place = Place(folder / "output", folder, seed, "verify")
        loss = lambda rows: next_token(network, rows)  # noqa: E731
        Trainer(place, config, network, batch, loss, steps=4, generators=Generators(seed)).run()
        return network

    with tempfile.TemporaryDirectory(prefix="openqwen-verify-") as name:
        folder = Path(name)
        whole = train(folder / "whole")
        try:
            train(folder / "cut", killed_at=2)
        except Kill:
            resumed = train(folder / "cut")
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return Proof("a resumed run gives an uninterrupted one's weights", apart, 0.0)


def trainer_equals_engine(
    model: Qwen2, tokenizer: Tokenizer, samples: Sequence[Sample], seed: int
) -> Iterator[Proof]:
    """What the engine samples: its log-probabilities against the trainer's; its greedy tokens
    against no cache.
    """
    prompts = [_prompt(sample) for sample in samples[:8]]
    engine = Engine(model, tokenizer)
    sampled = engine.generate(prompts, Sampling(max_tokens=_SPEAK, temperature=1.0, seed=seed))
    yield Proof(
        "the engine's log-probabilities are the trainer's",
        max(_gap(model, output) for output in sampled),
        _LOG_PROB,
    )
    greedy = engine.generate(prompts, Sampling(max_tokens=_SPEAK))
    wrong = sum(_surprises(model, output, tokenizer.vocab_size) for output in greedy)
    yield Proof("greedy answers with the cache are those without", wrong, 0.0)


def _prompt(sample: Sample) -> list[int]:
    """The ids before the first token that is learned."""
    ids, mask = sample
    return list(ids[: max(1, next((n for n, learned in enumerate(mask) if learned), len(ids)))])


@torch.no_grad()
def _gap(model: Qwen2, output: Output) -> float:
    """The largest difference of a token's log-probability."""
    if not output.token_ids:
        return 0.0
    ids = output.prompt_ids + output.token_ids
    rows = PackedBatch.of(
        [(ids, [0] * len(output.prompt_ids) + [1] * len(output.token_ids))], model.device
    )
    return float((token_log_probs(model, rows).cpu() - torch.tensor(output.logprobs)).abs().max())


@torch.no_grad()
def _surprises(model: Qwen2, output: Output, vocabulary: int) -> int:
    """Tokens of a greedy answer that are not the likeliest; a tie within rounding is none."""
    if not output.token_ids:
        return 0
    ids = torch.tensor(output.prompt_ids + output.token_ids, device=model.device)[:-1]
    packed = Packed.from_lengths([len(ids)]).to(model.device)
    hidden = model(ids, packed.positions.to(model.device), packed)[len(output.prompt_ids) - 1 :]
    chosen = torch.tensor(output.token_ids, device=model.device)
    logprobs, likeliest = score_tokens(model, hidden, chosen, 1, vocabulary)
    best = torch.tensor([top[0][1] for top in likeliest])
    return int((best - logprobs.cpu() > _LOG_PROB).sum())


def _gradient(
    model: Qwen2, micros: Sequence[Sequence[Sample]]
) -> tuple[list[Tensor], list[Tensor]]:
    """([mean loss], mean gradient) of all targets, summed over micro-batches."""
    model.zero_grad()
    total, count = torch.zeros((), device=model.device), 0
    for micro in micros:
        loss = next_token(model, PackedBatch.of(micro, model.device, share=True))
        loss.sum.backward()
        total += loss.sum.detach()
        count += loss.count
    if not count:
        raise OpenQwenError(
            "The demonstrations hold nothing to learn.", do="give some with an assistant turn"
        )
    gradients = [p.grad.clone() / count for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [total / count], gradients


def _relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖ over all tensors."""
    apart, size = map(
        torch.nn.utils.get_total_norm, ([x - y for x, y in zip(a, b, strict=True)], b)
    )
    return float(apart) / max(float(size), 1e-30)


def _table(proofs: Sequence[Proof]) -> Table:
    table = Table("", "proof", "difference", "allowed", box=None, pad_edge=False)
    for proof in proofs:
        mark = "[green]✓[/]" if proof.holds else "[red]✗[/]"
        allowed = f"{proof.bound:.0e}" if proof.bound else "none"
        table.add_row(mark, proof.statement, f"{proof.seen:.1e}" if proof.seen else "none", allowed)
    return table
