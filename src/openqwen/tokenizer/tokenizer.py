"""Text to ids and back, by Qwen2's rules."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.tokenizer.added import AddedTokens
from openqwen.tokenizer.chat import ChatEncoder
from openqwen.tokenizer.control import (
    CONTROL_TOKENS,
    DOCUMENT_END,
    TURN_END,
    TURN_START,
    ControlToken,
)
from openqwen.tokenizer.fast import best_encoder
from openqwen.tokenizer.files import (
    Parts,
    added_ids,
    named_special_tokens,
    tokenizer_config,
    tokenizer_settings,
    write_tokenizer,
)
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER
from openqwen.tokenizer.sources import read_source
from openqwen.tokenizer.template import Message, choose, render
from openqwen.tokenizer.unicode import normalize


class Tokenizer:
    """A byte-level BPE vocabulary, added tokens, and a chat template.

    Args:
        vocabulary: the bytes of each regular token, by id.
        merges: pairs of ids, best rank first.
        control: the added tokens. One that is in the vocabulary has its id there; the ids of the
            others follow those of the regular tokens.
        template: Jinja source, several by name, or None for a model that does not chat.
        settings: other entries of tokenizer_config.json, to save again.
        template_apart: save the templates in separate files.
    """

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        merges: Sequence[tuple[int, int]],
        control: Sequence[ControlToken] = CONTROL_TOKENS,
        template: str | Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        template_apart: bool = False,
    ):
        self.vocabulary, self.merges, self.control = list(vocabulary), list(merges), tuple(control)
        self.template, self._settings = template, dict(settings or {})
        self._template_apart = template_apart
        ids = {token: i for i, token in enumerate(self.vocabulary)}
        if missing := set(BYTES_IN_ID_ORDER) - ids.keys():
            what = f"This vocabulary lacks {len(missing)} of the 256 bytes."
            raise OpenQwenError(what, do="add them as tokens")
        triples = [(a, b, ids[self.vocabulary[a] + self.vocabulary[b]]) for a, b in self.merges]
        self._encoder = best_encoder(self.vocabulary, triples)
        self.control_ids = added_ids(self.vocabulary, [token.content for token in self.control])
        self._bytes = self.vocabulary + [
            content.encode() for content, i in self.control_ids.items() if i >= len(self.vocabulary)
        ]
        of_control = {token: self.control_ids[token.content] for token in self.control}
        self._hidden = {i for token, i in of_control.items() if token.special}
        # Any text may give the id of a regular token, so those cannot be protected.
        self.added = AddedTokens(of_control, [i for i in self._hidden if i >= len(self.vocabulary)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the parts; they build their own encoder."""
        return Tokenizer, tuple(self._parts())

    @property
    def path(self) -> Literal["native", "python"]:
        """Which encoder works: the compiled one, or the one in Python if that cannot be built."""
        return self._encoder.path

    @property
    def vocab_size(self) -> int:
        """Number of regular and control tokens; a model may have more rows than this."""
        return len(self._bytes)

    @property
    def eos_id(self) -> int:
        """`<|im_end|>`: the end of a turn."""
        return self.control_ids[TURN_END]

    @property
    def endoftext_id(self) -> int:
        """`<|endoftext|>`: the end of a document; also the padding."""
        return self.control_ids[DOCUMENT_END]

    @cached_property
    def stated_eos_id(self) -> int | None:
        """The id of the files' `eos_token`; None if they have none that is one token."""
        stated = self._settings.get("eos_token")
        content = stated.get("content") if isinstance(stated, dict) else stated
        ids = self.encode(content, allow_control=True) if isinstance(content, str) else []
        return ids[0] if len(ids) == 1 else None

    @property
    def im_start_id(self) -> int:
        """`<|im_start|>`: the beginning of a turn."""
        return self.control_ids[TURN_START]

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens by the names that templates use: `eos_token` ..."""
        return named_special_tokens(tokenizer_settings(self._parts()))

    @cached_property
    def turn_ends(self) -> set[int]:
        """The tokens with which a template may end a turn."""
        ends = {TURN_END, DOCUMENT_END, self.special_tokens.get("eos_token", TURN_END)}
        return {self.control_ids[content] for content in ends & self.control_ids.keys()}

    def encode(self, text: str, allow_control: bool = False) -> list[int]:
        """Ids of `text`; lone surrogates become U+FFFD.

        Added tokens in it get their ids; the special ones stay text unless `allow_control`.
        """
        ids: list[int] = []
        for piece, i, _ in self.added.cut(text, lambda _: not allow_control):
            ids += self.encode_plain(piece) if i is None else [i]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` by byte pairs alone."""
        return self._encoder.encode(normalize(text))

    def encode_batch(
        self, texts: Iterable[str], threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets) of many texts: text i is ids[offsets[i]:offsets[i + 1]].

        The ids are those of `encode`, with special tokens as text. Shapes: uint32 [T] and int64
        [texts + 1]. threads: all cores by default.
        """
        added: list[list[int | None]] = []  # for each text: ids of added tokens, None for the rest

        def plain_pieces() -> Iterator[str]:
            for text in texts:
                pieces = list(self.added.cut(text, lambda _: True))
                added.append([i for _, i, _ in pieces])
                yield from (normalize(piece) for piece, i, _ in pieces if i is None)

        ids, offsets = self._encoder.encode_batch(plain_pieces(), threads)
        if all(row == [None] for row in added):
            return ids, offsets
        encoded = iter(np.split(ids, offsets[1:-1]))
        parts: list[np.ndarray] = []
        ends = [0]
        for row in added:
            of_text = [next(encoded) if i is None else np.array([i], np.uint32) for i in row]
            parts += of_text
            ends.append(ends[-1] + sum(map(len, of_text)))
        return np.concatenate(parts), np.array(ends, np.int64)

    def decode(self, ids: Iterable[int], skip_control: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token nothing.

        skip_control leaves out the special control tokens; those of tool calls and code stay, as in
        transformers.
        """
        hidden = self._hidden if skip_control else ()
        table, size = self._bytes, len(self._bytes)
        tokens = [table[i] for i in ids if 0 <= i < size and i not in hidden]
        return b"".join(tokens).decode(errors="replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token; empty for an id without a token (a model's padding rows)."""
        return self._bytes[i] if 0 <= i < len(self._bytes) else b""

    def is_hidden(self, i: int) -> bool:
        """Whether decoding leaves this id out."""
        return i in self._hidden

    def apply_chat_template(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> str:
        """The chat as one text; to encode a chat use `encode_chat`, which knows who wrote what.

        continue_final_message: the text ends where the content of the final message ends, so that
        a model continues it; not together with `add_generation_prompt`.
        """
        template, special = self._chat_template(tools), self.special_tokens
        text, _ = render(
            template, messages, tools, add_generation_prompt, special, continue_final_message
        )
        return text

    def encode_chat(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of the rendered chat; the mask is 1 where an assistant wrote the token.

        Special tokens come from the template only: in a message's content they stay text. If no
        message has one, the ids equal `encode(apply_chat_template(...), allow_control=True)`.
        The assistant's text, with its end token, is what the template's `{% generation %}` blocks
        hold; without such blocks, ChatML's turns; else what the messages add to the text.
        """
        chat = ChatEncoder(self, self._chat_template(tools), messages, tools)
        return chat.encode(add_generation_prompt, continue_final_message)

    def info(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, and the template."""
        return tokenizer_config(self._parts()) | {"chat_template": self.template}

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt for transformers.

        A loaded tokenizer keeps its settings, and its template the file that it came from.
        """
        write_tokenizer(Path(folder), self._parts())

    def _parts(self) -> Parts:
        return Parts(
            self.vocabulary,
            self.merges,
            self.control,
            self.template,
            self._settings,
            self._template_apart,
        )

    def _chat_template(self, tools: Any) -> str:
        if self.template is None:
            raise OpenQwenError(
                "This tokenizer has no chat template.",
                do="use an instruct model, or put a chat_template.jinja into the model's folder",
            )
        return choose(self.template, tools)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer in a model's folder, in one of its files, or of a hub id (`owner/name`).

    Kinds: tokenizer.json; vocab.json with merges.txt; a .tiktoken file of ranks; a .gguf file.
    Raises OpenQwenError, which says what is missing or damaged.
    """
    return Tokenizer(*read_source(local(source)))
