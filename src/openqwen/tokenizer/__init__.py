"""Text to ids and back: training the vocabulary, encoding, decoding, and the chat template."""

from openqwen.tokenizer.control import CONTROL_TOKENS, ControlToken
from openqwen.tokenizer.statistics import tokenizer_statistics
from openqwen.tokenizer.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.train import TokenizerConfig, take_bytes, train_tokenizer

__all__ = [
    "CONTROL_TOKENS",
    "ControlToken",
    "Tokenizer",
    "TokenizerConfig",
    "load_tokenizer",
    "take_bytes",
    "tokenizer_statistics",
    "train_tokenizer",
]
