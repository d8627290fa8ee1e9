"""How much of each source is taken, held out, and seen in training.

Every decision is by a hash of the document's id, so the order of the documents does not matter.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import xxhash

from openqwen.corpus.documents import DocumentEntry


def _draw(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on its arguments alone: adding a document moves no other."""
    return xxhash.xxh3_64_intdigest(f"{purpose}/{name}".encode(), seed=seed % 2**64) / 2**64


def beyond_cap(
    entries: Iterable[DocumentEntry], max_bytes: Mapping[str, int], seed: int
) -> set[str]:
    """Ids of the documents that a source's byte limit leaves out: those with the largest draws."""
    left_out = set()
    room = dict(max_bytes)
    for entry in sorted(entries, key=lambda entry: _draw(seed, "cap", entry.id)):
        if entry.source not in room:
            continue
        if entry.size <= room[entry.source]:
            room[entry.source] -= entry.size
        else:
            left_out.add(entry.id)
    return left_out


def heldout(entries: Sequence[DocumentEntry], share: float, max_bytes: int, seed: int) -> set[str]:
    """Ids of the documents that training never sees.

    A `share` of the groups is drawn by a hash, at most `max_bytes` of each source. A source with
    two groups or more always gives at least one, so that it can be scored, unless its smallest is
    over the limit.
    """
    groups: dict[str, list[DocumentEntry]] = defaultdict(list)
    groups_of: dict[str, set[str]] = defaultdict(set)  # source -> names of its groups
    for entry in entries:
        groups[entry.group].append(entry)
        groups_of[entry.source].add(entry.group)
    taken: set[str] = set()
    used: dict[str, int] = defaultdict(int)
    for name in sorted(groups, key=lambda name: (_draw(seed, "heldout", name), name)):
        size: dict[str, int] = defaultdict(int)
        for entry in groups[name]:
            size[entry.source] += entry.size
        drawn = _draw(seed, "heldout", name) < share
        needed = any(not used[source] and len(groups_of[source]) > 1 for source in size)
        fits = all(used[source] + more <= max_bytes for source, more in size.items())
        if (drawn or needed) and fits:
            taken.update(entry.id for entry in groups[name])
            for source, more in size.items():
                used[source] += more
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
