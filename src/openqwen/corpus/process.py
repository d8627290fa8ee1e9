"""The steps of the corpus as pure functions: document → verdict, and the document as it goes on.

One process, several, or a cluster can drive them and gets the same answers. What a step has to know
about other documents, such as which one had the same text first, the driver finds out and passes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from openqwen.corpus.clean import Span, c4_lines, normalize, without
from openqwen.corpus.config import FilterConfig, Preset
from openqwen.corpus.documents import Document, utf8_size
from openqwen.corpus.filters import first_failure
from openqwen.corpus.measure import Measured
from openqwen.corpus.personal import mask_personal
from openqwen.corpus.published import PublishedFilters


class Cut(NamedTuple):
    """Text that a step cut out of a document: the rule, an example of the text, all bytes cut."""

    rule: str
    text: str
    bytes: int

    @property
    def why(self) -> str:
        """What was done, in words."""
        return f"{self.bytes:,} bytes cut"


class Masked(Cut):
    """Personal data that was replaced; `text` says how much of which kind."""

    @property
    def why(self) -> str:
        """What was done, in words."""
        return self.text


class DocumentVerdict(NamedTuple):
    """What one step decided about one document.

    rule: the rule that drops the document, None where it is kept. why: the value that decided, and
    its limit, in words. cut: what was cut out of the document, whether the rest is kept or not.
    value: the number that decided, where a rule measures one.
    """

    step: str
    rule: str | None = None
    why: str = ""
    cut: Cut | None = None
    value: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the document goes on to the next step."""
        return self.rule is None


Result = tuple[DocumentVerdict, Document]
Step = Callable[[Document], Result]


def cap(document: Document, left_out: bool, max_bytes: Mapping[str, int]) -> Result:
    """Drop a document that is left out because its source has more than `max_bytes`."""
    source = document["source"]
    if not left_out:
        return DocumentVerdict("cap"), document
    why = f"source limited to {max_bytes[source]:,} bytes"
    return DocumentVerdict("cap", f"{source} limit", why), document


def clean(document: Document, config: FilterConfig, published: bool = False) -> Result:
    """Normalise the text; cut the lines that C4's rules refuse out of web pages.

    published: the document is filtered by a preset, which has its own line rules.
    """
    text, cut = normalize(document["text"]), None
    # The line rules count words, so scripts without spaces do not meet them.
    web = document["meta"]["profile"] == "web" and not published
    if web and not Measured(text).unspaced:
        shorter, lines = c4_lines(text, config.web.c4)
        if lines:
            cut = Cut("c4 lines", "\n".join(lines), utf8_size(text) - utf8_size(shorter))
        text = shorter
    if not text.strip():
        return DocumentVerdict("clean", "empty", "nothing left after cleaning"), document
    return DocumentVerdict("clean", cut=cut), {**document, "text": text}


def apply_filters(document: Document, config: FilterConfig) -> Result:
    """Drop a cleaned document that fails one of the rules of its profile."""
    found = first_failure(document["text"], document["meta"]["profile"], config)
    if found is None:
        return DocumentVerdict("filter"), document
    rule, failure = found
    return DocumentVerdict("filter", rule, failure.why, value=failure.value), document


def apply_preset(document: Document, filters: PublishedFilters, preset: Preset) -> Result:
    """Take a cleaned document through the published filters of a preset."""
    text = document["text"].removesuffix("\n")
    done = filters.apply(text, preset)
    if done.failed:
        rule, failure = done.failed
        return DocumentVerdict("filter", rule, failure.why, value=failure.value), document
    if done.text == text:
        return DocumentVerdict("filter"), document
    left = done.text + "\n"
    cut = Cut("lines", "\n".join(done.cut), utf8_size(document["text"]) - utf8_size(left))
    return DocumentVerdict("filter", cut=cut), {**document, "text": left}


def treat_personal(document: Document, action: Literal["mask", "drop"]) -> Result:
    """Mask personal data, or drop a document that has some."""
    text, found = mask_personal(document["text"])
    if not found:
        return DocumentVerdict("personal"), document
    why = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    if action == "drop":
        verdict = DocumentVerdict("personal", "personal data", why, value=found.total())
        return verdict, document
    before, after = utf8_size(document["text"]), utf8_size(text)
    cut = Masked("personal data masked", why, max(before - after, 0))
    return DocumentVerdict("personal", cut=cut), {**document, "text": text}


def drop_exact(document: Document, first: str) -> Result:
    """Drop a document that is not the first with its text; `first` is the id of that one."""
    if document["id"] == first:
        return DocumentVerdict("exact"), document
    return DocumentVerdict("exact", "exact duplicate", f"same text as {first}"), document


def drop_contaminated(document: Document, match: tuple[str, int] | None) -> Result:
    """Drop a document that holds an evaluation item; match: (which, its words in common)."""
    if match is None:
        return DocumentVerdict("decontaminate"), document
    why, common = match
    rule = "holds an evaluation item"
    return DocumentVerdict("decontaminate", rule, why, value=common), document


def drop_low_score(
    document: Document, ratings: Mapping[str, float], score: float, least: float
) -> Result:
    """Drop a document whose score is below `least`; the others keep their ratings in `meta`."""
    if score < least:
        why = f"{score:.2f}, at least {least:.2f}"
        return DocumentVerdict("score", "low quality", why, value=score), document
    meta = {**document["meta"], "quality": dict(ratings)}
    return DocumentVerdict("score"), {**document, "meta": meta}


def drop_near(document: Document, first: str) -> Result:
    """Drop a document that is not the first of its near-duplicates; `first` is the id of that."""
    if document["id"] == first:
        return DocumentVerdict("near"), document
    return DocumentVerdict("near", "near-duplicate", f"like {first}"), document


def cut_repeats(document: Document, repeated: Sequence[Span]) -> Result:
    """Cut out the parts that an earlier document has: licence headers and stock paragraphs.

    repeated: where those parts stand in the text, in order.
    """
    cut = None
    if repeated:
        text = document["text"]
        document = {**document, "text": without(text, repeated)}
        code = document["meta"]["profile"] == "code"
        cut = Cut(
            "repeated comment" if code else "repeated paragraph",
            text[slice(*repeated[0])],
            utf8_size(text) - utf8_size(document["text"]),
        )
    if document["text"].strip():
        return DocumentVerdict("paragraphs", cut=cut), document
    why = "every paragraph stands in an earlier document"
    return DocumentVerdict("paragraphs", "nothing else", why, cut), document
