"""Fill-in-the-middle for code, in the format of Qwen2.5-Coder (its report, section 3.2.1).

    <|fim_prefix|>PREFIX<|fim_suffix|>SUFFIX<|fim_middle|>MIDDLE<|endoftext|>

The cuts fall between characters, not between tokens: a user stops typing anywhere, and a model that
has only seen cuts at token borders fails in the middle of a word (Bavarian et al. 2022, section
4.4). So the three parts are encoded again. Every token is a target, the markers too: this is plain
next-token prediction.
"""

from collections.abc import Sequence

import numpy as np

from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.fill_in_middle import middle_prompt


def fill_in_middle(tokenizer: Tokenizer, ids: np.ndarray, cuts: Sequence[float]) -> np.ndarray:
    """Move a document's middle to its end, before `<|endoftext|>`: uint32, about T + 3.

    cuts: begin and end of the middle as shares of the characters, in [0, 1) and in any order.
    """
    text = tokenizer.decode(ids[:-1].tolist())
    start, end = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    parts = (text[:start], text[end:], text[start:end])
    prefix, suffix, middle = map(tokenizer.encode, parts)
    return np.array([*middle_prompt(tokenizer, prefix, suffix), *middle, ids[-1]], dtype=np.uint32)
