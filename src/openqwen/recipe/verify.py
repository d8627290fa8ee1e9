"""`openqwen verify`: proofs about training and generation on the user's own model and data.

Each proof computes one quantity in two ways and compares the results. Bounds are relative errors
for float32; where equal bits are promised, bits are compared.
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
_NEW_TOKENS = 32  # of each answer that the engine generates


@dataclass(frozen=True)
class Proof:
    """A statement, the largest difference measured, and the largest allowed (0: the same bits)."""

    statement: str
    difference: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the statement is true here."""
        return self.difference <= self.bound


def verify(model: Path, data: Path, records: int = 16, seed: int = 0, ranks: int = 2) -> bool:
    """Print the proofs, and return whether all of them hold.

    Args:
        model: The model's folder.
        data: A JSONL, JSON or Parquet file of demonstrations, or hub:owner/name:split.
        records: How many demonstrations to use, from the start of the file.
        seed: Seed of every random draw.
        ranks: Processes of the last proof, which divides the network over them; 0: no such proof.
    """
    tokenizer = load_tokenizer(model)
    network = load_model(model, device=best_device()).eval()
    samples = [
        encode_demonstration(tokenizer, record, where)
        for where, record in islice(read_records(data), records)
    ]
    if len(samples) < 2:
        what = "Packing needs at least two demonstrations."
        raise OpenQwenError(what, where=data, do="give more, or --records 2")
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
        lack = f"{short / 2**30:.1f} GiB"
        console.print(f"Not tried: {ranks} processes; they need {lack} more memory than is free.")
    return all(proof.holds for proof in proofs)


def all_proofs(
    model: Qwen2, tokenizer: Tokenizer, samples: Sequence[Sample], seed: int
) -> Iterator[Proof]:
    """Yield the proofs, each as soon as it is computed."""
    yield from packed_equals_unpacked(model, samples)
    yield cuts_do_not_matter(model, samples, seed)
    yield resumed_equals_uninterrupted(model, samples, seed)
    yield from trainer_equals_engine(model, tokenizer, samples, seed)


def packed_equals_unpacked(model: Qwen2, samples: Sequence[Sample]) -> Iterator[Proof]:
    """Compare all documents in one row with each document alone: the loss, then its gradient."""
    packed = _gradient(model, [samples])
    alone = _gradient(model, [[sample] for sample in samples])
    loss, gradient = (_relative(a, b) for a, b in zip(packed, alone, strict=True))
    yield Proof("packed documents give the loss of each alone", loss, _LOSS)
    yield Proof("packed documents give the gradient of each alone", gradient, _GRADIENT)


def cuts_do_not_matter(model: Qwen2, samples: Sequence[Sample], seed: int) -> Proof:
    """Compare one batch with micro-batches of several sizes, reordered and divided over 3 ranks."""
    expected = _gradient(model, [samples])[1]
    order = Generators(seed)["verify.cuts"].permutation(len(samples))
    shuffled = [samples[i] for i in order]
    sizes = [len(ids) for ids, _ in shuffled]
    worst = 0.0
    for budget in (max(sizes), 2 * max(sizes)):
        micros = [shuffled[cut] for cut in cut_to_budget(sizes, budget)]
        reordered = [micro for rank in range(3) for micro in micros[rank::3]]
        worst = max(worst, _relative(_gradient(model, reordered)[1], expected))
    return Proof("any cut into micro-batches and ranks: one gradient", worst, _GRADIENT)


def ranks_do_not_matter(
    model: Qwen2, source: Path, samples: Sequence[Sample], ranks: int = 2
) -> Proof:
    """Compare one batch here with one micro-batch per document over processes that hold shards."""
    by_name = gradient_over_ranks(source, [[sample] for sample in samples], ranks)
    sharded = [by_name[name].to(model.device) for name, _ in model.named_parameters()]
    error = _relative(sharded, _gradient(model, [samples])[1])
    number = {2: "two"}.get(ranks, str(ranks))
    return Proof(f"{number} processes that share the network: one gradient", error, _GRADIENT)


def resumed_equals_uninterrupted(model: Qwen2, samples: Sequence[Sample], seed: int) -> Proof:
    """Compare the weights of 4 steps in one run with those of a run killed after 2 and resumed."""

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
        uninterrupted = train(folder / "uninterrupted")
        try:
            train(folder / "killed", killed_at=2)
        except Kill:
            resumed = train(folder / "killed")
    pairs = zip(uninterrupted.parameters(), resumed.parameters(), strict=True)
    largest = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return Proof("a resumed run gives the weights of an uninterrupted one", largest, 0.0)


def trainer_equals_engine(
    model: Qwen2, tokenizer: Tokenizer, samples: Sequence[Sample], seed: int
) -> Iterator[Proof]:
    """Compare log-probabilities with the trainer's, and greedy tokens with those without cache."""
    prompts = [_prompt(sample) for sample in samples[:8]]
    engine = Engine(model, tokenizer)
    sampled = engine.generate(prompts, Sampling(max_tokens=_NEW_TOKENS, temperature=1.0, seed=seed))
    gap = max(_gap(model, output) for output in sampled)
    yield Proof("the engine's log-probabilities are the trainer's", gap, _LOG_PROB)
    greedy = engine.generate(prompts, Sampling(max_tokens=_NEW_TOKENS))
    wrong = sum(_not_likeliest(model, output, tokenizer.vocab_size) for output in greedy)
    yield Proof("greedy answers with the cache are those without", wrong, 0.0)


def _prompt(sample: Sample) -> list[int]:
    """Return the ids before the first token that is learned."""
    ids, mask = sample
    return list(ids[: max(1, next((n for n, learned in enumerate(mask) if learned), len(ids)))])


@torch.no_grad()
def _gap(model: Qwen2, output: Output) -> float:
    """Return the largest difference of a token's log-probability between engine and trainer."""
    if not output.token_ids:
        return 0.0
    ids = output.prompt_ids + output.token_ids
    learned = [0] * len(output.prompt_ids) + [1] * len(output.token_ids)
    rows = PackedBatch.of([(ids, learned)], model.device)
    return float((token_log_probs(model, rows).cpu() - torch.tensor(output.logprobs)).abs().max())


@torch.no_grad()
def _not_likeliest(model: Qwen2, output: Output, vocabulary: int) -> int:
    """Count the tokens of a greedy answer that are not the likeliest, up to rounding."""
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
    """Return ([mean loss], mean gradient) over all targets of the micro-batches."""
    model.zero_grad()
    total, count = torch.zeros((), device=model.device), 0
    for micro in micros:
        loss = next_token(model, PackedBatch.of(micro, model.device, share=True))
        loss.sum.backward()
        total += loss.sum.detach()
        count += loss.count
    if not count:
        what = "The demonstrations contain nothing to learn."
        raise OpenQwenError(what, do="give some with an assistant turn")
    gradients = [p.grad.clone() / count for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [total / count], gradients


def _relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return ‖a − b‖ / ‖b‖ over all tensors."""
    norm = torch.nn.utils.get_total_norm
    difference = norm([x - y for x, y in zip(a, b, strict=True)])
    return float(difference) / max(float(norm(b)), 1e-30)


def _table(proofs: Sequence[Proof]) -> Table:
    table = Table("", "proof", "difference", "allowed", box=None, pad_edge=False)
    for proof in proofs:
        mark = "[green]✓[/]" if proof.holds else "[red]✗[/]"
        allowed = f"{proof.bound:.0e}" if proof.bound else "none"
        difference = f"{proof.difference:.1e}" if proof.difference else "none"
        table.add_row(mark, proof.statement, difference, allowed)
    return table
