"""From the tags that a model wrote to a tree of tags: InsTag's aggregation (Lu et al. 2023, 3.2).

    raw → frequency → rules and stems → clusters of meaning → associations → parents

The defaults are the paper's values for 306,044 instructions. A small pool needs lower counts.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
from pydantic import Field

from openqwen.instruct.collaborate.mining import (
    AssociationRule,
    association_rules,
    dbscan,
    frequent_sets,
)
from openqwen.instruct.collaborate.tree import TagNode, TagTree
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Settings

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> unit vectors [N, D]
_SEPARATORS = re.compile(r"[^\w]+|_+")


class AggregationConfig(Settings):
    """How tags become fewer: InsTag's steps with the paper's values."""

    frequency: int = Field(20, ge=1, description="drop tags that fewer instructions have")
    stem: bool = Field(True, description="unite tags whose words have the same stems")
    distance: float = Field(
        0.05, ge=0, le=2, description="unite tags within this cosine distance; 0 leaves that out"
    )
    neighbours: int = Field(
        1,
        ge=1,
        description="tags within that distance, itself included, that make a cluster's core",
    )
    support: int = Field(40, ge=1, description="fewest instructions of an association rule")
    confidence: float = Field(
        0.99, gt=0, le=1, description="unite tags of rules that hold in this share of the cases"
    )
    longest: int = Field(2, ge=2, le=4, description="most tags of a rule")
    parent: float = Field(
        0.8, gt=0.5, le=1, description="a tag is above another that so often comes with it"
    )


class Stemmer:
    """The stems of a tag's English words by Porter's algorithm (1980); other words stay."""

    def __init__(self) -> None:
        try:
            import snowballstemmer
        except ImportError:
            what = "Stems of tags need the library snowballstemmer."
            do = f"{pip_install('openqwen[instructions]')}, or --aggregation.no-stem"
            raise OpenQwenError(what, do=do) from None
        self._stem = snowballstemmer.stemmer("porter").stemWord

    def key(self, tag: str) -> str:
        """What tags that are united have in common."""
        return " ".join(self._stem(word) if word.isascii() else word for word in tag.split())


def plain(tag: str) -> str:
    """A tag in lower case, with spaces in place of special characters."""
    return " ".join(_SEPARATORS.sub(" ", tag.casefold()).split())


def aggregate(
    raw: Sequence[Sequence[str]], config: AggregationConfig, embed: Embed | None
) -> tuple[TagTree, list[AssociationRule]]:
    """Build the tree of tags.

    Args:
        raw: the tags of each instruction, as they were written.
        config: thresholds.
        embed: computes embeddings of tags; not asked where `distance` is 0.

    Returns:
        The tree, whose `steps` count the tags before and after each step, and the rules by which
        tags were united.
    """
    forms = Counter(form for tags in raw for form in set(tags))
    names = {form: form for form in forms}  # form -> the tag that it belongs to
    steps = [_counted("raw", raw, names)]
    names = {form: form for form, count in forms.items() if count >= config.frequency}
    steps.append(_counted("frequency", raw, names))
    stemmer = Stemmer() if config.stem else None
    names = {form: plain(form) for form in names if plain(form)}
    names = _united(raw, names, _by_stem(names.values(), stemmer))
    steps.append(_counted("rules", raw, names))
    if config.distance and embed is not None and names:
        names = _united(raw, names, _by_meaning(sorted(set(names.values())), config, embed))
    steps.append(_counted("meaning", raw, names))
    found = frequent_sets(_tags(raw, names), config.support, config.longest)
    rules = association_rules(found, config.confidence)
    names = _united(raw, names, [(*rule.given, rule.then) for rule in rules])
    steps.append(_counted("associations", raw, names))
    return TagTree(_nodes(raw, names, forms, config.parent), steps), rules


def _tags(raw: Iterable[Iterable[str]], names: dict[str, str]) -> list[list[str]]:
    """The tags of each instruction, each once."""
    return [list(dict.fromkeys(names[f] for f in forms if f in names)) for forms in raw]


def _counted(
    step: str, raw: Sequence[Sequence[str]], names: dict[str, str]
) -> dict[str, int | str]:
    tags = _tags(raw, names)
    uses = sum(map(len, tags))
    tagged = sum(map(bool, tags))
    count = len(set(names.values()))
    return {"step": step, "tags": count, "uses": uses, "instructions": tagged}


def _by_stem(tags: Iterable[str], stemmer: Stemmer | None) -> list[Sequence[str]]:
    groups: dict[str, list[str]] = {}
    for tag in dict.fromkeys(tags):
        groups.setdefault(stemmer.key(tag) if stemmer else tag, []).append(tag)
    return list(groups.values())


def _by_meaning(
    tags: Sequence[str], config: AggregationConfig, embed: Embed
) -> list[Sequence[str]]:
    labels = dbscan(embed(tags), config.distance, config.neighbours)
    clusters = [np.flatnonzero(labels == n) for n in range(labels.max(initial=-1) + 1)]
    return [[tags[place] for place in cluster.tolist()] for cluster in clusters]


def _united(
    raw: Sequence[Sequence[str]], names: dict[str, str], groups: Iterable[Sequence[str]]
) -> dict[str, str]:
    """Unite the tags of each group, and of groups that share one; the most frequent is the name."""
    counts = Counter(tag for tags in _tags(raw, names) for tag in tags)
    head = {tag: tag for tag in counts}

    def top(tag: str) -> str:
        while head[tag] != tag:
            head[tag] = head[head[tag]]
            tag = head[tag]
        return tag

    for first, *others in groups:
        for other in others:
            pair = sorted((top(first), top(other)), key=lambda tag: (-counts[tag], tag))
            head[pair[1]] = pair[0]
    return {form: top(tag) for form, tag in names.items()}


def _nodes(
    raw: Sequence[Sequence[str]], names: dict[str, str], forms: Counter[str], least: float
) -> dict[str, TagNode]:
    """The tags, the most frequent first, with their parents."""
    tags = _tags(raw, names)
    counts = Counter(tag for some in tags for tag in some)
    nodes = {}
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        nodes[name] = TagNode(name, count)
    for form, name in names.items():
        nodes[name].forms[form] = forms[form]
    for name, parent in _parents(tags, counts, least).items():
        nodes[name].parent = parent
    return nodes


def _parents(tags: Sequence[Sequence[str]], counts: Counter[str], least: float) -> dict[str, str]:
    """By subsumption (Sanderson and Croft 1999): x is above y if P(x | y) is high and x is wider.

    Of several, the one with the fewest instructions. A parent has more instructions than its
    child, so that there is no circle.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    for some in tags:
        pairs.update(combinations(sorted(some), 2))
    above: dict[str, str] = {}
    for pair, both in pairs.items():
        lower, upper = sorted(pair, key=lambda tag: counts[tag])
        if counts[lower] == counts[upper] or both < least * counts[lower]:
            continue
        known = above.get(lower)
        if known is None or (counts[upper], upper) < (counts[known], known):
            above[lower] = upper
    return above
