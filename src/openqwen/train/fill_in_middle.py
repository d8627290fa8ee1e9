"""Fill-in-the-middle for code, in the format of Qwen2.5-Coder (its report, section 3.2.1).

    <|fim_prefix|>PREFIX<|fim_suffix|>SUFFIX<|fim_middle|>MIDDLE<|endoftext|>

The cuts fall between characters, not between tokens: whoever asks for a completion stops typing anywhere, and a model
that has only seen cuts at token borders fails in the middle of a word (Bavarian et al. 2022, section 4.4). So the
three parts are encoded anew. Every token is learned, the markers too: it is plain next-token prediction.
"""

from collections.abc import Sequence

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer

MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def marker_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the three markers, in the order in which they stand; an error where the tokenizer has none (Qwen2's)."""
    if missing := [name for name in MARKERS if name not in tokenizer.control_ids]:
        raise OpenQwenError(
            f"This tokenizer has no {missing[0]}, so nothing can be cut for fill-in-the-middle.",
            where="fill_in_middle",
            do="leave fill_in_middle empty, or use a tokenizer with Qwen2.5's control tokens",
        )
    return [tokenizer.control_ids[name] for name in MARKERS]


def fill_in_middle(tokenizer: Tokenizer, ids: np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """One document, closed by `<|endoftext|>`, with its middle moved to the end: uint32 [about T + 3].

    cuts: two numbers in [0, 1), where the middle begins and ends as shares of the characters, in any order.
    """
    text = tokenizer.decode(ids[:-1].tolist())
    start, end = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    parts = (text[:start], text[end:], text[start:end])
    moved = [[marker, *tokenizer.encode(part)] for marker, part in zip(marker_ids(tokenizer), parts, strict=True)]
    return np.array([*moved[0], *moved[1], *moved[2], ids[-1]], dtype=np.uint32)
