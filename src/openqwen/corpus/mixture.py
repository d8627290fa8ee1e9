"""How much of each source is taken, held out, and seen in training: all by hashes, so that no order
matters.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import xxhash

from openqwen.corpus.read import Document


def _draw(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on its arguments alone: adding a document moves no other."""
    return xxhash.xxh3_64_intdigest(f"{purpose}/{name}".encode(), seed=seed % 2**64) / 2**64


def beyond_cap(
    documents: list[Document], sizes: list[int], max_bytes: dict[str, int], seed: int
) -> set[int]:
    """Positions of the documents that a source's byte limit leaves out: those with the largest
    draws.
    """
    left_out = set()
    room = dict(max_bytes)
    for position in sorted(
        range(len(documents)), key=lambda i: (_draw(seed, "cap", documents[i]["id"]), i)
    ):
        source = documents[position]["source"]
        if source not in room:
            continue
        if sizes[position] <= room[source]:
            room[source] -= sizes[position]
        else:
            left_out.add(position)
    return left_out


def heldout(
    documents: list[Document], sizes: list[int], share: float, max_bytes: int, seed: int
) -> set[int]:
    """Positions of the documents that training never sees: a `share` by hash, at most `max_bytes`
    of each source.

    Documents with one meta["group"] (a module and its reference page) are held out together or not
    at all. A source with two groups or more always gives at least one, unless its smallest is over
    the limit, so that it can be scored.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for position, document in enumerate(documents):
        groups[document["meta"].get("group") or document["id"]].append(position)
    groups_of: dict[str, set[str]] = defaultdict(set)
    for name, members in groups.items():
        for position in members:
            groups_of[documents[position]["source"]].add(name)
    taken: set[int] = set()
    used: dict[str, int] = defaultdict(int)
    for name in sorted(groups, key=lambda n: (_draw(seed, "heldout", n), n)):
        members = groups[name]
        within = _draw(seed, "heldout", name) < share
        needed = any(
            not used[documents[i]["source"]] and len(groups_of[documents[i]["source"]]) > 1
            for i in members
        )
        if not within and not needed:
            continue
        size: dict[str, int] = defaultdict(int)
        for position in members:
            size[documents[position]["source"]] += sizes[position]
        if all(used[source] + more <= max_bytes for source, more in size.items()):
            taken.update(members)
            for source, more in size.items():
                used[source] += more
    return taken


def sample(
    documents: Iterable[Document],
    weights: dict[str, float],
    max_bytes: int,
    seed: int,
) -> set[int]:
    """Positions of documents that hold `max_bytes` or a little more, drawn by their sources'
    weights.

    Weighted sampling without replacement: the documents with the smallest keys −ln(u) / weight
    (Efraimidis and Spirakis 2006). A source gets a share that is proportional to its bytes times
    its weight, until all of it is taken. Sources without a weight are left out.
    """
    keys: list[tuple[float, int, int]] = []
    for position, document in enumerate(documents):
        if weight := weights.get(document["source"], 0.0):
            key = -math.log1p(-_draw(seed, "sample", document["id"])) / weight
            keys.append((key, position, len(document["text"].encode())))
    chosen: set[int] = set()
    for _, position, size in sorted(keys):
        if max_bytes <= 0:
            break
        chosen.add(position)
        max_bytes -= size
    return chosen


def shares(train_bytes: dict[str, int], weights: dict[str, float]) -> dict[str, float]:
    """The share of training that each source gets: its bytes times its weight (1 where none is
    given), summing to 1.
    """
    raw = {source: size * weights.get(source, 1.0) for source, size in train_bytes.items()}
    total = sum(raw.values())
    return {source: value / total if total else 0.0 for source, value in raw.items()}
