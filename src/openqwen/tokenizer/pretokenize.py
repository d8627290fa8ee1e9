"""Text to words, inside which byte pairs merge (Qwen2's expression), and bytes as characters."""

import regex

from openqwen.tokenizer.unicode import mask_newer_letters

# Contractions, words with one leading symbol or space, single digits, symbols, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT = regex.compile(PATTERN)


def split_words(text: str) -> list[str]:
    """Split normalised text into words; joined, they are the text again."""
    masked = mask_newer_letters(text)
    if masked == text:
        return _SPLIT.findall(text)
    return [text[match.start() : match.end()] for match in _SPLIT.finditer(masked)]


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in vocabulary files (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the other 68 take the characters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}
# The first 256 ids, in the order of those characters, as in every byte-level vocabulary.
BYTES_IN_ID_ORDER = [bytes([CHARACTER_TO_BYTE[c]]) for c in sorted(BYTE_TO_CHARACTER)]


def to_characters(token: bytes) -> str:
    """A token as vocabulary files write it: `b" the"` is `"Ġthe"`."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def to_bytes(characters: str) -> bytes:
    """The inverse of `to_characters`; KeyError on a character that stands for no byte."""
    return bytes(CHARACTER_TO_BYTE[character] for character in characters)
