"""How much of each source is taken, held out, and seen in training.

Every decision is by a hash of the document's id, so the order of the documents does not matter.
"""

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping

import numpy as np
import xxhash

from openqwen.corpus.documents import DocumentEntry

_BLOCK = 1 << 16


def in_sample(seed: int, share: float, name: str) -> bool:
    """Whether a document is in a sample of the corpus; by its id alone."""
    return share >= 1 or _draw(seed, "trial", name) < share


def _draw(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on its arguments alone: adding a document moves no other."""
    return xxhash.xxh3_64_intdigest(f"{purpose}/{name}".encode(), seed=seed % 2**64) / 2**64


def beyond_cap(
    entries: Iterable[DocumentEntry], max_bytes: Mapping[str, int], seed: int
) -> np.ndarray:
    """bool [entries]: which documents a source's byte limit leaves out, those with large draws.

    Memory: 32 bytes for each document of a source with a limit, and one for each other.
    """
    room = dict(max_bytes)
    sources = list(room)
    rows: list[np.ndarray] = []
    block: list[tuple[int, int, int]] = []
    draws = []
    number = -1
    for number, entry in enumerate(entries):
        if entry.source in room:
            block.append((number, entry.size, sources.index(entry.source)))
            draws.append(_draw(seed, "cap", entry.id))
            if len(block) == _BLOCK:
                rows.append(np.array(block, np.int64))
                block = []
    rows.append(np.array(block, np.int64).reshape(-1, 3))
    table = np.concatenate(rows)
    left_out = np.zeros(number + 1, dtype=bool)
    for row in np.argsort(np.array(draws), kind="stable"):
        position, size, index = table[row].tolist()
        if size <= room[sources[index]]:
            room[sources[index]] -= size
        else:
            left_out[position] = True
    return left_out


def heldout(entries: Iterable[DocumentEntry], share: float, max_bytes: int, seed: int) -> set[str]:
    """Ids of the documents that training never sees.

    A `share` of the groups is drawn by a hash, at most `max_bytes` of each source. A source with
    two groups or more always gives at least one, so that it can be scored, unless its smallest is
    over the limit.

    Args:
        entries: can be iterated over several times. Only those of drawn groups are held in memory.
    """
    taken: set[str] = set()
    used: dict[str, int] = defaultdict(int)

    def take(groups: Mapping[str, list[DocumentEntry]], needed: Container[str] | None) -> None:
        for name in sorted(groups, key=lambda name: (_draw(seed, "heldout", name), name)):
            size: dict[str, int] = defaultdict(int)
            for entry in groups[name]:
                size[entry.source] += entry.size
            wanted = needed is None or any(s in needed and not used[s] for s in size)
            if wanted and all(used[source] + more <= max_bytes for source, more in size.items()):
                taken.update(entry.id for entry in groups[name])
                for source, more in size.items():
                    used[source] += more

    first: dict[str, str] = {}  # source -> its first group
    several: set[str] = set()  # sources with more groups
    drawn: dict[str, list[DocumentEntry]] = defaultdict(list)
    for entry in entries:
        if first.setdefault(entry.source, entry.group) != entry.group:
            several.add(entry.source)
        if _draw(seed, "heldout", entry.group) < share:
            drawn[entry.group].append(entry)
    take(drawn, None)
    if without := {source for source in several if not used[source]}:
        # Their groups are few, or too large to be taken.
        names = {e.group for e in entries if e.source in without and e.size <= max_bytes}
        others: dict[str, list[DocumentEntry]] = defaultdict(list)
        for entry in entries:
            if entry.group in names and entry.group not in drawn:
                others[entry.group].append(entry)
        take(others, without)
    return taken


def sample(
    entries: Iterable[DocumentEntry], weights: Mapping[str, float], max_bytes: int, seed: int
) -> set[str]:
    """Ids of documents that hold `max_bytes` or a little more, drawn by their sources' weights.

    Weighted sampling without replacement: the documents with the smallest keys −ln(u) / weight
    (Efraimidis and Spirakis 2006). A source gets a share that is proportional to its bytes times
    its weight, until all of it is taken. Sources without a weight are left out.
    """
    keys: list[tuple[float, int, DocumentEntry]] = []
    for position, entry in enumerate(entries):
        if weight := weights.get(entry.source, 0.0):
            key = -math.log1p(-_draw(seed, "sample", entry.id)) / weight
            keys.append((key, position, entry))
    chosen: set[str] = set()
    for _, _, entry in sorted(keys):
        if max_bytes <= 0:
            break
        chosen.add(entry.id)
        max_bytes -= entry.size
    return chosen


def shares(train_bytes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """The share of training that each source gets, in proportion to its bytes times its weight.

    A source without a weight has 1. The shares sum to 1.
    """
    raw = {source: size * weights.get(source, 1.0) for source, size in train_bytes.items()}
    total = sum(raw.values())
    return {source: value / total if total else 0.0 for source, value in raw.items()}
