"""The text of one data stage as rows of tokens, planned in full before its first step."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from pydantic import Field

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.fill_in_middle import marker_ids
from openqwen.train.fill_in_middle import fill_in_middle
from openqwen.train.packed_batch import Sample, cut_to_budget

_ROW = 4_096  # Qwen2's context in pre-training


class DataConfig(Settings):
    """How much text, in which rows, from which sources."""

    tokens: int = Field(1_500_000, gt=0, description="tokens to train on")
    context: int | None = Field(
        None,
        gt=1,
        description="longest row, in tokens; none: 4,096, or the checkpoint's context if less",
    )
    lengths: dict[int, float] = Field(
        default_factory=dict,
        description=(
            "row length -> its share of the tokens, such as {32768: 0.4, 8192: 0.6}; none: all at "
            "the context"
        ),
    )
    batch_tokens: int = Field(16_384, gt=0, description="tokens of one optimizer step")
    micro_tokens: int = Field(
        8_192, gt=0, description="tokens of one forward call; changes memory and speed alone"
    )
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="share of each source in the tokens; the others split the rest by size",
    )
    isolated: bool = Field(
        True,
        description=(
            "a row is (a piece of) one document; else documents run on into full rows and see each "
            "other"
        ),
    )
    fill_in_middle: dict[str, float] = Field(
        default_factory=dict,
        description="source -> share of its documents that fit in a row to cut for infilling",
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
    """The documents of every source without end: shuffled, and shuffled again when they have all
    been given.

    Shared by the data stages of a run, so that a stage goes on where the one before it stopped.
    """

    def __init__(self, sources: Mapping[str, TokenSource], generators: Generators):
        self.sources, self._generators = sources, generators
        self._left: dict[str, np.ndarray] = {}

    def take(self, name: str, quota: float, worth: np.ndarray, order: str = "") -> np.ndarray:
        """Numbers of documents that give `quota` tokens together; worth: what each gives. order:
        names the shuffle.
        """
        usable = np.flatnonzero(worth)
        if quota > 0 and not len(usable):
            raise OpenQwenError(
                f"The source '{name}' has no usable document.",
                where=f"source {name}, {len(worth):,} documents",
                do=(
                    "each needs two tokens or more: look at the source, or leave it out of the "
                    "mixture (share 0)"
                ),
            )
        key = f"data.{name}{order}"
        chosen, total = [np.empty(0, dtype=np.int64)], 0
        while total < quota:
            left = self._left.get(key, chosen[0])
            left = left if len(left) else self._generators[key].permutation(usable)
            count = int(np.searchsorted(worth[left].cumsum(), quota - total)) + 1
            chosen.append(left[:count])
            total += int(worth[left[:count]].sum())
            self._left[key] = left[count:]
        return np.concatenate(chosen)


class PackedDataset:
    """The rows of one data stage.

    The chosen documents lie end to end in one imagined stream; a row is a stretch of it that
    predicts all its tokens but the first. Isolated rows keep within a document: one that is longer
    than a row is cut, and the pieces overlap by one token, so that every token but a document's
    first is predicted once. Otherwise rows are cut wherever they are full, only the last is
    shorter, and every token but the stream's first is predicted once.
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
        # [D] each: source, number in it, tokens read of it, and the length of the rows that it
        # stands in.
        self._source, self._number, self._sizes, self._row = np.concatenate(parts, axis=1).astype(
            np.int64
        )
        if not len(self._sizes):
            raise OpenQwenError(
                "No source has a usable document.", do="each needs two tokens: look at the corpus"
            )
        shuffle = generators["data.order"]
        if not config.isolated:
            order = shuffle.permutation(len(self._sizes))
            self._source, self._number, self._sizes = (
                x[order] for x in (self._source, self._number, self._sizes)
            )
        self._cuts: dict[
            int, list[float]
        ] = {}  # where the middle begins and ends in the documents cut for infilling
        for name, share in config.fill_in_middle.items():
            self._choose_infilling(name, share, generators["data.fill_in_middle"])
        self._offsets = np.concatenate(
            [[0], self._sizes.cumsum()]
        )  # of each document in the stream
        self.rows = (
            self._isolated_rows() if config.isolated else self._full_rows(shuffle)
        )  # [R, 2]: first token, tokens
        shuffle.shuffle(self.rows)
        ends = (self.rows[:, 1] - 1).cumsum()
        batches = max(1, round(int(ends[-1]) / config.batch_tokens))
        starts = np.searchsorted(ends, np.linspace(0, ends[-1], batches + 1)[:-1], side="left")
        # A row of more than `batch_tokens` is a step of its own: none is left empty behind it.
        self._starts = np.append(np.unique(starts), len(self.rows))
        self.steps = len(self._starts) - 1

    def _joined(self, sampler: DocumentSampler) -> list[np.ndarray]:
        parts = []
        for number, (name, quota) in enumerate(_quotas(sampler.sources, self.config).items()):
            lengths = sampler.sources[name].lengths
            documents = sampler.take(name, quota, np.where(lengths < 2, 0, lengths))
            parts.append(_plan(number, documents, lengths[documents], self.config.row))
        return parts

    def _isolated(self, sampler: DocumentSampler) -> list[np.ndarray]:
        """Rows of the longest lengths are full ones from documents that have so many tokens; the
        shortest takes all.
        """
        quotas = _quotas(sampler.sources, self.config)
        *longer, (shortest, _) = sorted(
            self.config.lengths.items() or {self.config.row: 1.0}.items(), reverse=True
        )
        asked = _from_long_documents(sampler.sources, quotas, dict(longer))
        parts = []
        for number, (name, quota) in enumerate(quotas.items()):
            learned = (sampler.sources[name].lengths - 1).clip(0)
            rest = float(quota)
            for length, tokens in asked[name].items():
                full = learned // length * length
                documents = sampler.take(name, tokens, full, f".{length}")
                rest -= full[documents].sum()
                # What is over of a long document is read as a shorter row, as far as there is room
                # for those.
                over = (learned - full)[documents]
                read = full[documents] + np.where(over.cumsum() <= rest, over, 0)
                rest -= (read - full[documents]).sum()
                parts.append(_plan(number, documents, read + 1, length))
            documents = sampler.take(name, rest, learned)
            parts.append(_plan(number, documents, learned[documents] + 1, shortest))
        return parts

    def _choose_infilling(self, name: str, share: float, generator: np.random.Generator) -> None:
        """Draw which documents of a source are cut, and where.

        They grow by the markers, so they are cut once here.
        """
        if name not in self._names or self._tokenizer is None:
            raise OpenQwenError(
                (
                    f"fill_in_middle names '{name}'; there is no such "
                    f"source.{suggestion(name, self._names)}"
                ),
                where="data.fill_in_middle",
            )
        marker_ids(self._tokenizer)
        here = np.flatnonzero(self._source == self._names.index(name))
        for document in here[generator.random(len(here)) < share]:
            cuts = generator.random(2).tolist()
            if self._sizes[document] - 1 > self._row[document]:
                continue  # torn over rows, it would teach nothing about its middle
            size = len(fill_in_middle(self._tokenizer, self._original(document), cuts))
            if size - 1 <= self._row[document]:
                self._cuts[int(document)], self._sizes[document] = cuts, size

    def _isolated_rows(self) -> np.ndarray:
        counts = -(-(self._sizes - 1) // self._row)
        document = np.repeat(np.arange(len(counts)), counts)
        first = (
            np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)
        ) * self._row[document]
        size = np.minimum(self._row[document] + 1, self._sizes[document] - first)
        return np.stack([self._offsets[document] + first, size], axis=1)

    def _full_rows(self, generator: np.random.Generator) -> np.ndarray:
        total = int(self._offsets[-1]) - 1
        lengths = self.config.lengths or {self.config.row: 1.0}
        row = np.concatenate(
            [np.full(int(share * total) // n, n) for n, share in sorted(lengths.items())]
        )
        rest = total - int(row.sum())  # less than one row of each length
        row = np.append(row, [self.config.row] * (rest // self.config.row)).astype(np.int64)
        generator.shuffle(row)
        row = np.append(row, total - row.sum()).astype(np.int64)
        row = row[row > 0]
        return np.stack([row.cumsum() - row, row + 1], axis=1)

    def batch(self, step: int) -> list[list[Sample]]:
        """The samples of one step, cut into micro-batches."""
        rows = self.rows[self._starts[step] : self._starts[step + 1]]
        samples: list[Sample] = [
            (self._read(*row), np.ones(row[1], dtype=bool)) for row in rows.tolist()
        ]
        return [samples[s] for s in cut_to_budget(rows[:, 1].tolist(), self.config.micro_tokens)]

    def name(self, step: int) -> str:
        """The documents that a step reads, for a message."""
        rows = self.rows[self._starts[step] : self._starts[step + 1]].tolist()
        told = (
            f"{self._names[self._source[d]]} {self._number[d]}"
            for row in rows
            for d in self._documents(*row)
        )
        named = list(dict.fromkeys(told))
        return f"documents {', '.join(named[:12])}" + (
            f" and {len(named) - 12} more" if len(named) > 12 else ""
        )

    def _documents(self, first: int, size: int) -> range:
        """The documents of the stream that a row touches."""
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
    """Tokens of each source, by name."""
    found = shares(sources, config.mixture)
    return {name: round(config.tokens * found[name]) for name in sorted(sources)}


def _from_long_documents(
    sources: Mapping[str, TokenSource], quotas: Mapping[str, int], lengths: Mapping[int, float]
) -> dict[str, dict[int, float]]:
    """source -> row length -> tokens in full rows of that length, which only some sources have
    documents for.
    """
    asked: dict[str, dict[int, float]] = {name: {} for name in quotas}
    for length, share in lengths.items():
        able = {
            n: quota for n, quota in quotas.items() if quota and (sources[n].lengths > length).any()
        }
        for name, quota in able.items():
            asked[name][length] = share * sum(quotas.values()) * quota / sum(able.values())
        if sum(able.values()) < share * sum(quotas.values()):
            raise OpenQwenError(
                f"{share:.0%} of the tokens shall stand in rows of {length:,}, but the sources "
                "with documents so long "
                f"({', '.join(able) or 'none'}) give "
                f"{sum(able.values()) / sum(quotas.values()):.0%} of the tokens.",
                where="data.lengths",
                do=(
                    "give them more of the mixture, shorten the rows, or let documents run on "
                    "(isolated: false)"
                ),
            )
    return asked


def shares(sources: Mapping[str, TokenSource], mixture: Mapping[str, float]) -> dict[str, float]:
    """Shares of the sources that sum to one: those named as asked, the rest split by size."""
    for name in mixture:
        if name not in sources:
            raise OpenQwenError(
                f"The mixture names '{name}'; there is no such source.{suggestion(name, sources)}",
                where="data.mixture",
            )
    asked = sum(mixture.values())
    rest = {n: float((sources[n].lengths - 1).clip(0).sum()) for n in sources if n not in mixture}
    if asked > 1 + 1e-9 or (not rest and abs(asked - 1) > 1e-6):
        raise OpenQwenError(
            f"The mixture's shares sum to {asked:.3g}, not 1.", where="data.mixture"
        )
    size = sum(rest.values()) or 1.0
    return dict(mixture) | {n: (1 - asked) * v / size for n, v in rest.items()}
