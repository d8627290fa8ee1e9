"""What is decided about documents by comparing all of them: duplicates, scores, repeats.

Keys of all documents lie in flat files, which are mapped. In memory are 40 bytes for each document
at the most, while one kind of key is sorted; see `first_occurrences`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openqwen.corpus.config import CorpusConfig, ScoreConfig
from openqwen.corpus.deduplicate import Clusters, first_occurrences
from openqwen.corpus.quality import QualityClassifier
from openqwen.corpus.work import EXTRA, MAPPED, Fates
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import fresh_folder, read_json


class _Chunk(NamedTuple):
    """A mapped chunk: its name, and the number of its first document in the corpus."""

    name: str
    first: int


class CorpusComparison:
    """Compares the documents of all mapped chunks.

    Args:
        names: of the chunks, in order; the one of extra documents is the last.
        folder: of the run. Keys are written to its folder "keys".
    """

    def __init__(self, config: CorpusConfig, names: Sequence[str], folder: Path):
        self.config, self.folder = config, folder
        self._keys = fresh_folder(folder / "keys")
        self._chunks: list[_Chunk] = []
        self._least: dict[str, float] = {}
        self._collect(names)
        count = self.count
        self.exact = self._array("exact", count)  # the first document with the same words
        self.near = self._array("near", count)  # the first document of the cluster
        self._repeated = np.zeros(0, bool)  # of each paragraph of the documents that are left

    def duplicate_ids(self) -> int:
        """How many records have an id that an earlier one of their source has."""
        found = first_occurrences(self._mapped("given-ids"))
        return sum(int((first != numbers).sum()) for numbers, first in found)

    def run(self) -> None:
        """Decide about all documents."""
        self.exact[:] = np.arange(self.count)
        if "exact" not in self.config.leave_out:
            keys = self._mapped("exact-keys").reshape(-1, 2)
            for numbers, first in first_occurrences(keys):
                self.exact[numbers] = first
        kept = self.exact == np.arange(self.count)
        kept[self.main :] = False  # extra documents are not compared further: templates look alike
        self._drop_by_content(kept)
        self._compare_near(kept)
        self._compare_pieces(kept)

    def fates(self) -> Iterator[Fates]:
        """The fates of each chunk's documents, in order."""
        start = 0
        for chunk in self._chunks:
            keys, found = self._load(chunk)
            fates = Fates(chunk.name)
            count = len(keys["exact"])
            for position in range(count):
                number = chunk.first + position
                if self.exact[number] != number:
                    fates.exact[position] = self._id(int(self.exact[number]))
                elif self.near[number] != number:
                    fates.near[position] = self._id(int(self.near[number]))
            sources = [entry[1] for entry in found["entries"]]
            for position, match in found["contaminated"].items():
                fates.contaminated[int(position)] = (match[0], match[1])
            for position, ratings in found["scores"].items():
                least = self._least.get(sources[int(position)], -math.inf)
                fates.scores[int(position)] = (ratings, self._score(ratings), least)
            for owner, span in zip(keys["owners"].tolist(), keys["spans"].tolist(), strict=True):
                if self._kept[chunk.first + owner]:
                    if self._repeated[start]:
                        fates.repeated.setdefault(owner, []).append((span[0], span[1]))
                    start += 1
            yield fates

    def _collect(self, names: Sequence[str]) -> None:
        """Write the exact keys and the ids of all documents, one after the other."""
        self.count = self.main = 0
        size = 0
        with ExitStack() as files:
            keys, ids, ends, given = (
                files.enter_context(open(self._keys / name, "wb"))
                for name in ("exact-keys", "ids", "id-ends", "given-ids")
            )
            for name in names:
                chunk = _Chunk(name, self.count)
                self._chunks.append(chunk)
                arrays, found = self._load(chunk)
                keys.write(arrays["exact"].tobytes())
                given.write(arrays["given"].tobytes())
                for entry in found["entries"]:
                    raw = entry[0].encode()
                    ids.write(raw)
                    size += len(raw)
                    ends.write(size.to_bytes(8, "little"))
                self.count += len(arrays["exact"])
                if name != EXTRA:
                    self.main = self.count

    def _drop_by_content(self, kept: np.ndarray) -> None:
        """Leave out documents with an evaluation item or a low score; find the sources' limits."""
        scores: dict[str, list[float]] = {}
        if self.config.classifier:
            for _, source, score in self._scored(kept):
                scores.setdefault(source, []).append(score)
            config = self.config.score
            self._least = {s: _least_score(values, s, config) for s, values in scores.items()}
            for number, source, score in self._scored(kept):
                kept[number] = score >= self._least[source]
        if self.config.decontaminate:
            for chunk in self._chunks:
                for position in self._load(chunk)[1]["contaminated"]:
                    kept[chunk.first + int(position)] = False

    def _scored(self, kept: np.ndarray) -> Iterator[tuple[int, str, float]]:
        for chunk in self._chunks:
            found = self._load(chunk)[1]
            for position, ratings in found["scores"].items():
                number = chunk.first + int(position)
                if kept[number]:
                    yield number, found["entries"][int(position)][1], self._score(ratings)

    def _score(self, ratings: Mapping[str, float]) -> float:
        weights = score_weights(list(ratings), self.config.score.weights)
        return float(np.average(list(ratings.values()), weights=weights))

    def _compare_near(self, kept: np.ndarray) -> None:
        self.near[:] = np.arange(self.count)
        if "near" in self.config.leave_out:
            return
        numbers = np.flatnonzero(kept)
        with ExitStack() as files:
            bands = [
                files.enter_context(open(self._keys / f"band-{band}", "wb"))
                for band in range(self.config.minhash.bands)
            ]
            for chunk, keys in self._main_keys():
                mine = keys["bands"][kept[chunk.first : chunk.first + len(keys["bands"])]]
                for file, column in zip(bands, mine.T, strict=True):
                    file.write(np.ascontiguousarray(column).tobytes())
        clusters = Clusters(self._array("clusters", len(numbers)))
        for band in range(self.config.minhash.bands):
            clusters.link(self._mapped(f"band-{band}"))
        for position, number in enumerate(numbers.tolist()):
            root = clusters.root(position)
            if root != position:
                self.near[number] = numbers[root]
                kept[number] = False

    def _compare_pieces(self, kept: np.ndarray) -> None:
        with (
            open(self._keys / "pieces", "wb") as pieces,
            open(self._keys / "owners", "wb") as owners,
        ):
            for chunk, keys in self._main_keys():
                mine = kept[chunk.first + keys["owners"]]
                pieces.write(keys["pieces"][mine].tobytes())
                owners.write((keys["owners"][mine] + chunk.first).tobytes())
        owner = self._mapped("owners").view(np.int64)
        self._repeated = np.zeros(len(owner), bool)
        self._kept = kept
        if "paragraphs" not in self.config.leave_out:
            for numbers, first in first_occurrences(self._mapped("pieces")):
                self._repeated[numbers] = owner[first] != owner[numbers]

    def _main_keys(self) -> Iterator[tuple[_Chunk, Any]]:
        for chunk in self._chunks:
            if chunk.name != EXTRA:
                yield chunk, self._load(chunk)[0]

    def _load(self, chunk: _Chunk) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        path = self.folder / MAPPED / f"{chunk.name}.json"
        with np.load(path.with_suffix(".npz")) as keys:
            return dict(keys), read_json(path)

    def _id(self, number: int) -> str:
        ends = self._mapped("id-ends")
        start = int(ends[number - 1]) if number else 0
        with open(self._keys / "ids", "rb") as file:
            file.seek(start)
            return file.read(int(ends[number]) - start).decode()

    def _array(self, name: str, count: int) -> np.ndarray:
        if not count:
            return np.zeros(0, np.int64)
        return np.memmap(self._keys / name, np.int64, "w+", shape=(count,))

    def _mapped(self, name: str) -> np.ndarray:
        path = self._keys / name
        if not path.stat().st_size:
            return np.zeros(0, np.uint64)
        return np.memmap(path, np.uint64, "r")


def score_weights(dimensions: Sequence[str], given: Mapping[str, float]) -> list[float]:
    """The weight of each dimension in a document's score."""
    weights = [given.get(name, 1.0) for name in dimensions]
    if unknown := sorted(given.keys() - set(dimensions)):
        what = f"The classifier has no dimension '{unknown[0]}'."
    elif sum(weights) <= 0:
        what = "The weights of the dimensions do not add up to more than 0."
    else:
        return weights
    raise OpenQwenError(what, "score.weights", f"its dimensions are {', '.join(dimensions)}")


def check_classifier(config: CorpusConfig) -> None:
    """Raise OpenQwenError where the classifier or its weights cannot be used, before the work."""
    if config.classifier:
        score_weights(QualityClassifier.load(config.classifier).dimensions, config.score.weights)


def _least_score(scores: list[float], source: str, config: ScoreConfig) -> float:
    """The lowest score of a source's documents that are kept."""
    least = -math.inf if config.least is None else config.least
    if dropped := int(len(scores) * (1 - config.keep.get(source, 1.0))):
        least = max(least, sorted(scores)[min(dropped, len(scores) - 1)])
    return least
