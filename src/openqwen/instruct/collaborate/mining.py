"""Clusters of vectors (DBSCAN), and sets of items that often occur together (FP-Growth)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1_024  # rows of the matrix of distances that are computed at a time
Itemset = frozenset[str]


def dbscan(vectors_ND: np.ndarray, distance: float, neighbours: int) -> np.ndarray:
    """Clusters of unit vectors by cosine distance (Ester et al. 1996).

    Args:
        vectors_ND: rows of length 1.
        distance: two vectors that are no farther apart are neighbours.
        neighbours: a vector with so many neighbours, itself among them, is a core of its cluster.
            With 1 or 2, clusters are the connected components of the neighbours' graph.

    Returns:
        The number of each vector's cluster, int64 [N], in the order of their first cores; -1 where
        it has none.
    """
    near = _neighbours(vectors_ND, distance)
    core = [len(found) >= neighbours for found in near]
    labels = np.full(len(near), -1, dtype=np.int64)
    clusters = 0
    for start in range(len(near)):
        if not core[start] or labels[start] >= 0:
            continue
        labels[start] = clusters
        waiting = [start]
        while waiting:
            for other in near[waiting.pop()]:
                if labels[other] < 0:
                    labels[other] = clusters
                    if core[other]:  # the others lie at the border
                        waiting.append(int(other))
        clusters += 1
    return labels


def _neighbours(vectors_ND: np.ndarray, distance: float) -> list[np.ndarray]:
    near: list[np.ndarray] = []
    for first in range(0, len(vectors_ND), _BLOCK):
        cosines = vectors_ND[first : first + _BLOCK] @ vectors_ND.T
        rows = np.arange(len(cosines))
        cosines[rows, first + rows] = 1.0  # rounding must not part a vector from itself
        near += [np.flatnonzero(row) for row in 1.0 - cosines <= distance]
    return near


class _PrefixNode:
    """An item in a tree of transactions that begin alike."""

    __slots__ = ("children", "count", "item", "parent")

    def __init__(self, item: str, parent: "_PrefixNode | None"):
        self.item, self.parent = item, parent
        self.count = 0
        self.children: dict[str, _PrefixNode] = {}

    def path(self) -> list[str]:
        """The items between the root and this node."""
        items, node = [], self.parent
        while node is not None and node.parent is not None:
            items.append(node.item)
            node = node.parent
        return items


def frequent_sets(
    transactions: Iterable[Iterable[str]], support: int, longest: int
) -> dict[Itemset, int]:
    """The sets of items that occur together in enough transactions: FP-Growth (Han et al. 2000).

    Args:
        transactions: items; one that is repeated counts once.
        support: fewest transactions of a set.
        longest: most items of a set.

    Returns:
        The number of transactions with each set.
    """
    found: dict[Itemset, int] = {}
    _grow([(list(dict.fromkeys(items)), 1) for items in transactions], support, longest, (), found)
    return found


def _grow(
    transactions: Sequence[tuple[list[str], int]],
    support: int,
    longest: int,
    suffix: tuple[str, ...],
    found: dict[Itemset, int],
) -> None:
    """Add the frequent sets that end with `suffix`, from the transactions that contain it."""
    counts: Counter[str] = Counter()
    for items, times in transactions:
        for item in items:
            counts[item] += times
    frequent = sorted((i for i in counts if counts[i] >= support), key=lambda i: (-counts[i], i))
    rank = {item: place for place, item in enumerate(frequent)}
    root, nodes = _PrefixNode("", None), defaultdict[str, list[_PrefixNode]](list)
    for items, times in transactions:
        node = root
        for item in sorted((item for item in items if item in rank), key=rank.__getitem__):
            if item not in node.children:
                node.children[item] = _PrefixNode(item, node)
                nodes[item].append(node.children[item])
            node = node.children[item]
            node.count += times
    for item in reversed(frequent):
        itemset = (*suffix, item)
        found[frozenset(itemset)] = counts[item]
        if len(itemset) < longest:
            before = [(node.path(), node.count) for node in nodes[item]]
            _grow(before, support, longest, itemset, found)


class AssociationRule(NamedTuple):
    """Instructions with all of `given` have `then` too, in a share `confidence` of the cases."""

    given: tuple[str, ...]
    then: str
    support: int
    confidence: float


def association_rules(found: dict[Itemset, int], confidence: float) -> list[AssociationRule]:
    """The rules with one item on the right that hold often enough, the surest first."""
    rules = []
    for itemset, count in found.items():
        for item in itemset if len(itemset) > 1 else ():
            given = itemset - {item}
            if count / found[given] >= confidence:
                share = count / found[given]
                rules.append(AssociationRule(tuple(sorted(given)), item, count, share))
    return sorted(rules, key=lambda rule: (-rule.confidence, -rule.support, rule.given, rule.then))
