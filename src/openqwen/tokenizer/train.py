"""Byte-pair encoding learned from text: the most frequent pair of neighbours merges, repeatedly.

Sennrich et al. 2016, section 3.2, on bytes instead of characters as in GPT-2. Of equally frequent
pairs the one with the smaller ids merges first, as in Hugging Face's `tokenizers`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from pydantic import Field

from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.tokenizer.fast import library
from openqwen.tokenizer.fast_train import learn_merges
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER, split_words
from openqwen.tokenizer.template import DEFAULT_SYSTEM_PROMPT, chatml_template
from openqwen.tokenizer.tokenizer import Tokenizer
from openqwen.tokenizer.unicode import normalize

Pair = tuple[int, int]
_BYTE_IDS = {token[0]: i for i, token in enumerate(BYTES_IN_ID_ORDER)}


class TokenizerConfig(Settings):
    """How a vocabulary is trained."""

    vocabulary: int = Field(
        4096, ge=256, description="regular tokens with the 256 bytes; control tokens are added"
    )
    max_bytes: int = Field(
        20_000_000, ge=1, description="bytes of text to learn from, by the weights of the mixture"
    )
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="factor on a source's weight in the mixture; 0 leaves it out; default 1",
    )
    min_frequency: int = Field(
        2, ge=1, description="a pair seen less often than this is not merged"
    )
    system_prompt: str = Field(
        DEFAULT_SYSTEM_PROMPT,
        description="system message of the chat template where a chat does not begin with one",
    )


def take_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first `limit` bytes (UTF-8) of `texts`, normalised; the last is cut at a character."""
    for text in texts:
        text = normalize(text)
        size = len(text) if text.isascii() else len(text.encode())
        if size >= limit:
            yield text.encode()[:limit].decode(errors="ignore")
            return
        limit -= size
        yield text


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word of the split expression occurs in normalised texts."""
    counts: Counter[str] = Counter()
    with progress("count words", unit="characters") as work:
        for text in texts:
            counts.update(split_words(text))
            work.advance(len(text))
    return counts


def train_bpe(word_counts: Mapping[str, int], vocabulary: int, min_frequency: int) -> list[Pair]:
    """The merges, at most `vocabulary` - 256, in order; merge k makes id 256 + k.

    There are fewer if no pair is left that occurs `min_frequency` times.
    """
    words = [[_BYTE_IDS[byte] for byte in word.encode()] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: defaultdict[Pair, int] = defaultdict(int)
    places: defaultdict[Pair, set[int]] = defaultdict(set)  # pair -> words that may hold it
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            places[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)

    merges: list[Pair] = []
    with progress("merge pairs", total=vocabulary - 256, unit="merges") as work:
        while heap and len(merges) < vocabulary - 256:
            negative, pair = heappop(heap)
            if -negative != pair_counts[pair]:
                # The count has fallen since the pair was pushed (it never rises): push it again.
                heappush(heap, (-pair_counts[pair], pair))
                continue
            if -negative < min_frequency:
                break
            new = 256 + len(merges)
            merges.append(pair)
            new_pairs: set[Pair] = set()
            for index in places.pop(pair):
                words[index], changes = _merge(words[index], pair, new)
                for changed, change in changes:
                    pair_counts[changed] += change * counts[index]
                    if change > 0:
                        places[changed].add(index)
                        new_pairs.add(changed)
            for new_pair in new_pairs:
                heappush(heap, (-pair_counts[new_pair], new_pair))
            work.advance()
    return merges


def _merge(word: list[int], pair: Pair, new: int) -> tuple[list[int], list[tuple[Pair, int]]]:
    """(`word` with each `pair` replaced by `new` from the left, changes of other pairs' counts)."""
    left, right = pair
    merged: list[int] = []
    changes: list[tuple[Pair, int]] = []
    i, end = 0, len(word)
    while i < end:
        if word[i] != left or i + 1 == end or word[i + 1] != right:
            merged.append(word[i])
            i += 1
            continue
        if merged:
            changes += [((merged[-1], left), -1), ((merged[-1], new), 1)]
        if i + 2 < end:
            changes += [((right, word[i + 2]), -1), ((new, word[i + 2]), 1)]
        merged.append(new)
        i += 2
    return merged, changes


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """A tokenizer trained on the first `config.max_bytes` bytes of `texts`.

    It has Qwen2.5's control tokens and ChatML. The vocabulary is smaller than configured if the
    text has too few pairs. Raises OpenQwenError if there is no text.
    """
    taken, compiled = take_bytes(texts, config.max_bytes), library()
    if compiled:
        words, merges = learn_merges(compiled, taken, config.vocabulary, config.min_frequency)
    else:
        counts = count_words(taken)
        words, merges = len(counts), train_bpe(counts, config.vocabulary, config.min_frequency)
    if not words:
        what = "There is no text to train a tokenizer on."
        raise OpenQwenError(what, do="check what the corpus holds")
    vocabulary = list(BYTES_IN_ID_ORDER)
    for left, right in merges:
        vocabulary.append(vocabulary[left] + vocabulary[right])
    return Tokenizer(vocabulary, merges, template=chatml_template(config.system_prompt))
