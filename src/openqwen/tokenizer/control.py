"""Tokens added to a vocabulary; Qwen2.5's mark turns, documents, tool calls and code."""

from dataclasses import dataclass

DOCUMENT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class ControlToken:
    """A token that is found in text before byte pairs are merged, with the flags of `tokenizers`.

    special: decoding leaves it out, and a user's text never gives it; the others (tool calls, words
    that somebody added) are found in any text. single_word: only where no letter or digit touches
    it. lstrip, rstrip: the white space before or after it belongs to it. normalized: it is found in
    the NFC form of the text, not in the text itself.
    """

    content: str
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


# Qwen2.5's 22 in the order of their ids (technical report, section 2; published tokenizer files).
_SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>"""
_VISIBLE = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|>"""
CONTROL_TOKENS = (
    *(ControlToken(content, special=True) for content in _SPECIAL.split()),
    *(ControlToken(content, special=False) for content in _VISIBLE.split()),
)
# Qwen2 has the first three.
QWEN2_CONTROL_TOKENS = CONTROL_TOKENS[:3]
