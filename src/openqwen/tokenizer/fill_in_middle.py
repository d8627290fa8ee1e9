"""The prompt of fill-in-the-middle, in the format of Qwen2.5-Coder (its report, section 3.2.1).

<|fim_prefix|>PREFIX<|fim_suffix|>SUFFIX<|fim_middle|>MIDDLE<|endoftext|>
"""

from typing import TYPE_CHECKING

from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.tokenizer.tokenizer import Tokenizer

MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_OF_CODE = (*MARKERS, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


def marker_ids(tokenizer: "Tokenizer") -> list[int]:
    """Ids of the three markers, in order; OpenQwenError if there are none, as in Qwen2."""
    if missing := [name for name in MARKERS if name not in tokenizer.control_ids]:
        raise OpenQwenError(
            f"This tokenizer has no {missing[0]}, which fill-in-the-middle needs.",
            where="fill_in_middle",
            do="leave it out, or use a tokenizer with Qwen2.5's control tokens",
        )
    return [tokenizer.control_ids[name] for name in MARKERS]


def middle_prompt(tokenizer: "Tokenizer", prefix: list[int], suffix: list[int]) -> list[int]:
    """Ids of a prompt after which a model writes the middle."""
    before, after, middle = marker_ids(tokenizer)
    return [before, *prefix, after, *suffix, middle]


def code_ids(tokenizer: "Tokenizer") -> tuple[int, ...]:
    """Ids that end a middle, besides those that end all answers: new code begins there."""
    return tuple(tokenizer.control_ids[name] for name in _OF_CODE if name in tokenizer.control_ids)
