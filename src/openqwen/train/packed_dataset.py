"""The text of one data stage as rows of tokens, all planned before its first step."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from pydantic import Field

from openqwen.support.batching import cut_to_budget
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.fill_in_middle import marker_ids
from openqwen.train.fill_in_middle import fill_in_middle
from openqwen.train.packed_batch import Sample
from openqwen.train.packing import MicroBatchConfig

_ROW = 4_096  # Qwen2's context in pre-training


class DataConfig(MicroBatchConfig):
    """How much text to read, from which sources, in rows of which lengths."""

    tokens: int = Field(1_500_000, gt=0, description="tokens to train on")
    context: int | None = Field(
        None,
        gt=1,
        description="longest row, in tokens; none: 4,096, or the checkpoint's context if less",
    )
    lengths: dict[int, float] = Field(
        default_factory=dict,
        description="row length -> its share of the tokens, such as {32768: 0.4, 8192: 0.6}; "
        "none: all rows have the context's length",
    )
    batch_tokens: int = Field(16_384, gt=0, description="tokens of one optimizer step")
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="share of each source in the tokens; the others split the rest by size",
    )
    isolated: bool = Field(
        True,
        description="a row holds one document or a part of it; false: documents follow each other "
        "in full rows and see each other",
    )
    fill_in_middle: dict[str, float] = Field(
        default_factory=dict,
        description="source -> share of its documents to cut for infilling, where they fit a row",
    )

    @property
    def row(self) -> int:
        """Tokens of the longest row."""
        return _ROW if self.context is None else self.context


class TokenSource(Protocol):
    """Tokenized documents of one source, each ending in `<|endoftext|>`."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        ...

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document."""
        ...


class DocumentSampler:
    """Samples documents of every source without replacement, and starts over when all are taken.

    The data stages of a run share one sampler: each goes on where the one before it stopped.
    """

    def __init__(self, sources: Mapping[str, TokenSource], generators: Generators):
        self.sources, self._generators = sources, generators
        self._left: dict[str, np.ndarray] = {}

    def take(self, name: str, quota: float, sizes: np.ndarray, order: str = "") -> np.ndarray:
        """Take documents of a source that have `quota` tokens together.

        Args:
            name: The source.
            quota: Tokens to take; the last document may exceed it.
            sizes: Tokens to count for each document; one of 0 tokens is never taken.
            order: Names a shuffle of its own.

        Returns:
            The documents' numbers in the source.
        """
        usable = np.flatnonzero(sizes)
        if quota > 0 and not len(usable):
            raise OpenQwenError(
                f"The source '{name}' has no usable document.",
                where=f"source {name}, {len(sizes):,} documents",
                do="a document needs two tokens: look at the source, or give it the share 0",
            )
        key = f"data.{name}{order}"
        chosen, total = [np.empty(0, dtype=np.int64)], 0
        while total < quota:
            left = self._left.get(key, chosen[0])
            left = left if len(left) else self._generators[key].permutation(usable)
            count = int(np.searchsorted(sizes[left].cumsum(), quota - total)) + 1
            chosen.append(left[:count])
            total += int(sizes[left[:count]].sum())
            self._left[key] = left[count:]
        return np.concatenate(chosen)


class PackedDataset:
    """The rows of one data stage.

    The chosen documents lie end to end in one virtual stream, and a row is a part of it. All tokens
    of a row but the first are targets. Isolated rows do not cross documents: a document longer than
    a row is cut into parts that overlap by one token, so every token but a document's first is a
    target once. Otherwise the stream is cut wherever a row is full; only the last row is shorter,
    and every token but the stream's first is a target once.
    """

    def __init__(
        self,
        sampler: DocumentSampler,
        config: DataConfig,
        generators: Generators,
        tokenizer: Tokenizer | None = None,
    ):
        self._names = sorted(sampler.sources)
        self.sources = [sampler.sources[name] for name in self._names]
        self.config, self._tokenizer = config, tokenizer
        parts = self._isolated(sampler) if config.isolated else self._joined(sampler)
        # For each document [D]: its source, its number there, tokens to read, length of its rows.
        documents = np.concatenate(parts, axis=1).astype(np.int64)
        self._source, self._number, self._sizes, self._row = documents
        if not len(self._sizes):
            raise OpenQwenError(
                "No source has a usable document.",
                do="a document needs two tokens: look at the corpus",
            )
        shuffle = generators["data.order"]
        if not config.isolated:
            order = shuffle.permutation(len(self._sizes))
            self._source, self._number = self._source[order], self._number[order]
            self._sizes = self._sizes[order]
        # Document -> where its middle begins and ends, for those cut for infilling.
        self._cuts: dict[int, list[float]] = {}
        for name, share in config.fill_in_middle.items():
            self._choose_infilling(name, share, generators["data.fill_in_middle"])
        self._offsets = np.concatenate([[0], self._sizes.cumsum()])  # of documents in the stream
        # [R, 2]: offset of the row's first token in the stream, and its number of tokens.
        self.rows = self._isolated_rows() if config.isolated else self._full_rows(shuffle)
        shuffle.shuffle(self.rows)
        ends = (self.rows[:, 1] - 1).cumsum()
        batches = max(1, round(int(ends[-1]) / config.batch_tokens))
        starts = np.searchsorted(ends, np.linspace(0, ends[-1], batches + 1)[:-1], side="left")
        # A row of more than `batch_tokens` is a step of its own; `unique` drops empty steps.
        self._starts = np.append(np.unique(starts), len(self.rows))
        self.steps = len(self._starts) - 1

    def _joined(self, sampler: DocumentSampler) -> list[np.ndarray]:
        """The documents of each source, to be read in rows that cross documents."""
        parts = []
        for number, (name, quota) in enumerate(_quotas(sampler.sources, self.config).items()):
            lengths = sampler.sources[name].lengths
            documents = sampler.take(name, quota, np.where(lengths < 2, 0, lengths))
            parts.append(_plan(number, documents, lengths[documents], self.config.row))
        return parts

    def _isolated(self, sampler: DocumentSampler) -> list[np.ndarray]:
        """The documents of each source, to be read in rows within documents.

        Rows of the longer lengths are full rows, from documents that have so many tokens. Rows of
        the shortest length take the rest from all documents.
        """
        quotas = _quotas(sampler.sources, self.config)
        *longer, (shortest, _) = sorted(
            self.config.lengths.items() or {self.config.row: 1.0}.items(), reverse=True
        )
        long_rows = _from_long_documents(sampler.sources, quotas, dict(longer))
        parts = []
        for number, (name, quota) in enumerate(quotas.items()):
            targets = (sampler.sources[name].lengths - 1).clip(0)
            rest = float(quota)
            for length, tokens in long_rows[name].items():
                full = targets // length * length
                documents = sampler.take(name, tokens, full, f".{length}")
                rest -= full[documents].sum()
                # The end of a long document is a shorter row, while the quota has room for it.
                end = (targets - full)[documents]
                read = full[documents] + np.where(end.cumsum() <= rest, end, 0)
                rest -= (read - full[documents]).sum()
                parts.append(_plan(number, documents, read + 1, length))
            documents = sampler.take(name, rest, targets)
            parts.append(_plan(number, documents, targets[documents] + 1, shortest))
        return parts

    def _choose_infilling(self, name: str, share: float, generator: np.random.Generator) -> None:
        """Draw which documents of a source are cut for infilling, and where.

        A document grows by the markers, so it is cut once here to learn its new size.
        """
        if name not in self._names:
            known = suggestion(name, self._names)
            raise OpenQwenError(
                f"fill_in_middle names '{name}'; there is no such source.{known}",
                where="data.fill_in_middle",
            )
        assert self._tokenizer is not None
        marker_ids(self._tokenizer)
        here = np.flatnonzero(self._source == self._names.index(name))
        for document in here[generator.random(len(here)) < share]:
            cuts = generator.random(2).tolist()
            if self._sizes[document] - 1 > self._row[document]:
                continue  # cut over several rows, it would teach nothing about its middle
            size = len(fill_in_middle(self._tokenizer, self._original(document), cuts))
            if size - 1 <= self._row[document]:
                self._cuts[int(document)], self._sizes[document] = cuts, size

    def _isolated_rows(self) -> np.ndarray:
        counts = -(-(self._sizes - 1) // self._row)  # rows of each document
        document = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)
        first = number * self._row[document]
        size = np.minimum(self._row[document] + 1, self._sizes[document] - first)
        return np.stack([self._offsets[document] + first, size], axis=1)

    def _full_rows(self, generator: np.random.Generator) -> np.ndarray:
        total = int(self._offsets[-1]) - 1
        lengths = self.config.lengths or {self.config.row: 1.0}
        row = np.concatenate(
            [np.full(int(share * total) // n, n) for n, share in sorted(lengths.items())]
        )
        rest = total - int(row.sum())  # less than one row of each length is left
        row = np.append(row, [self.config.row] * (rest // self.config.row)).astype(np.int64)
        generator.shuffle(row)
        row = np.append(row, total - row.sum()).astype(np.int64)
        row = row[row > 0]
        return np.stack([row.cumsum() - row, row + 1], axis=1)

    def batch(self, step: int) -> list[list[Sample]]:
        """The samples of one step, cut into micro-batches."""
        rows = self.rows[self._starts[step] : self._starts[step + 1]].tolist()
        samples: list[Sample] = [
            (self._read(first, size), np.ones(size, dtype=bool)) for first, size in rows
        ]
        cuts = cut_to_budget([size for _, size in rows], self.config.micro_tokens)
        return [samples[cut] for cut in cuts]

    def name(self, step: int) -> str:
        """The documents that a step reads, for a message."""
        rows = self.rows[self._starts[step] : self._starts[step + 1]].tolist()
        documents = dict.fromkeys(d for row in rows for d in self._documents(*row))
        names = [f"{self._names[self._source[d]]} {self._number[d]}" for d in documents]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        return f"documents {', '.join(names[:12])}{more}"

    def _documents(self, first: int, size: int) -> range:
        """The documents that a row of the stream holds parts of."""
        start, end = np.searchsorted(self._offsets, [first, first + size - 1], side="right")
        return range(start - 1, end)

    def _read(self, first: int, size: int) -> np.ndarray:
        """Token ids of a row, int64 [size]."""
        parts = []
        for document in self._documents(first, size):
            start = first - int(self._offsets[document])
            parts.append(self._tokens(document)[max(start, 0) : start + size])
        return np.concatenate(parts).astype(np.int64)

    def _tokens(self, document: int) -> np.ndarray:
        if document in self._cuts and self._tokenizer is not None:
            return fill_in_middle(self._tokenizer, self._original(document), self._cuts[document])
        return self._original(document)[: self._sizes[document]]

    def _original(self, document: int) -> np.ndarray:
        return self.sources[self._source[document]].document(int(self._number[document]))


def _plan(source: int, documents: np.ndarray, sizes: np.ndarray, row: int) -> np.ndarray:
    return np.stack(
        [np.full(len(documents), source), documents, sizes, np.full(len(documents), row)]
    )


def _quotas(sources: Mapping[str, TokenSource], config: DataConfig) -> dict[str, int]:
    """Tokens to read of each source, by name."""
    share = shares(sources, config.mixture)
    return {name: round(config.tokens * share[name]) for name in sorted(sources)}


def _from_long_documents(
    sources: Mapping[str, TokenSource], quotas: Mapping[str, int], lengths: Mapping[int, float]
) -> dict[str, dict[int, float]]:
    """Divide the tokens of each row length among the sources that have documents so long.

    Returns:
        source -> row length -> tokens in full rows of that length.
    """
    tokens: dict[str, dict[int, float]] = {name: {} for name in quotas}
    total = sum(quotas.values())
    for length, share in lengths.items():
        able = {n: q for n, q in quotas.items() if q and (sources[n].lengths > length).any()}
        available = sum(able.values())
        for name, quota in able.items():
            tokens[name][length] = share * total * quota / available
        if available < share * total:
            raise OpenQwenError(
                f"data.lengths asks for {share:.0%} of the tokens in rows of {length:,}, but the "
                f"sources with documents that long ({', '.join(able) or 'none'}) have only "
                f"{available / total:.0%}.",
                where="data.lengths",
                do="give these sources a larger share of the mixture, shorten the rows, or join "
                "documents (isolated: false)",
            )
    return tokens


def shares(sources: Mapping[str, TokenSource], mixture: Mapping[str, float]) -> dict[str, float]:
    """Shares of all sources, of sum 1: those of the mixture; the others split the rest by size."""
    for name in mixture:
        if name not in sources:
            raise OpenQwenError(
                f"The mixture names '{name}'; there is no such source.{suggestion(name, sources)}",
                where="data.mixture",
            )
    named = sum(mixture.values())
    rest = {n: float((sources[n].lengths - 1).clip(0).sum()) for n in sources if n not in mixture}
    if named > 1 + 1e-9 or (not rest and abs(named - 1) > 1e-6):
        raise OpenQwenError(
            f"The mixture's shares sum to {named:.3g}, not 1.", where="data.mixture"
        )
    size = sum(rest.values()) or 1.0
    return dict(mixture) | {n: (1 - named) * v / size for n, v in rest.items()}
