"""Answers that must fit a JSON schema, a regular expression or a grammar.

llguidance computes, at each position, the mask of the tokens that may come next.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openqwen.engine.generator import Structure
from openqwen.engine.schema import LENIENT, faults, ready
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer

try:
    import llguidance
except ImportError:  # an extra
    llguidance = None  # type: ignore[assignment]

# JSON without white space: a model that may write it sometimes writes nothing else.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_COMPACT |= LENIENT


class _Vocabulary:
    """The tokenizer in the form that llguidance takes."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        # An added token whose id is also in the regular vocabulary may be part of JSON.
        added = tokenizer.control_ids.values()
        self.special_token_ids = sorted(i for i in added if i >= len(tokenizer.vocabulary))

    def __call__(self, text: str | bytes) -> list[int]:
        # Within a structure the text of an added token is plain text, made of byte pairs.
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode_plain(text)


class Structures:
    """Makes matchers for one tokenizer. stops: the ids that end an answer."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[int]):
        self._tokenizer, self._stops = tokenizer, sorted(stops)

    @cached_property
    def _vocabulary(self) -> Any:
        """Built on first use, which takes about a second."""
        if llguidance is None:
            raise OpenQwenError(
                "Structured output needs the library llguidance.",
                where="sampling, structure",
                do=pip_install("openqwen[serve]"),
            )
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
        return llguidance.LLTokenizer(wrapper, eos_token=self._stops)

    def matcher(self, structure: Structure) -> "Matcher":
        """A matcher for one answer, at its start.

        Raises:
            OpenQwenError: the structure cannot be followed, or llguidance is not installed.
        """
        vocabulary, make = self._vocabulary, llguidance.LLMatcher
        try:
            if structure.kind == "json_schema":
                schema = json.loads(structure.source)
                if not isinstance(schema, dict):
                    raise ValueError("A JSON schema is an object.")
                schema = ready(schema)
                grammar = make.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
            elif structure.kind == "regex":
                grammar = make.grammar_from_regex(structure.source)
            else:
                grammar = make.grammar_from_lark(structure.source)
            inner = make(vocabulary, grammar, log_level=0)
            fault = inner.get_error()
            if fault and structure.kind == "json_schema":  # name the keywords
                fault = "; ".join(faults(schema)) or fault
        except (ValueError, RecursionError) as error:
            fault = str(error)
        if fault:
            raise OpenQwenError(
                f"This {structure.kind} cannot be followed: {' '.join(fault.split())[:300]}",
                where="sampling, structure",
            )
        return Matcher(inner, self._tokenizer.vocab_size)


class Matcher:
    """Follows one answer, token by token."""

    def __init__(self, inner: Any, vocabulary: int):
        self._inner, self._vocabulary = inner, vocabulary

    @property
    def complete(self) -> bool:
        """Whether the answer must end here."""
        return self._inner.is_stopped()

    @property
    def fault(self) -> str:
        """Why the library cannot go on (such as a limit of its own); empty while it can."""
        return self._inner.get_error()

    def accept(self, token: int) -> None:
        """Add this token to the answer."""
        self._inner.consume_token(token)

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where there is a choice."""
        return self._inner.compute_ff_tokens()

    def fitting(self, drafts: Sequence[int]) -> list[int]:
        """The draft tokens before the first that does not fit."""
        return list(drafts[: self._inner.validate_tokens(list(drafts))])

    def masks(self, drafts: Sequence[int], width: int) -> list[Tensor]:
        """The tokens that may come next, and after each draft token: bool [width] each.

        drafts: draft tokens, all of which fit.
        """
        masks = [self._mask(width)]
        for number, token in enumerate(drafts):
            self._inner.consume_token(token)
            if self.complete:  # the answer ends there, so that later masks do not matter
                masks += [masks[-1]] * (len(drafts) - number)
                drafts = drafts[: number + 1]
                break
            masks.append(self._mask(width))
        if drafts:
            self._inner.rollback(len(drafts))
        return masks

    def _mask(self, width: int) -> Tensor:
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
        return torch.from_numpy(np.pad(allowed, (0, width - len(allowed))))
