"""Every number of the corpus stage, with its source.

Gopher: Rae et al. 2021 (arXiv 2112.11446), appendix A; the repetition limits are its table A1.
C4: Raffel et al. 2020 (arXiv 1910.10683), section 2.2.
FineWeb: Penedo et al. 2024 (arXiv 2406.17557) and its filters in datatrove.
Code: the usual line-length, alphanumeric and generated-file rules (Chen et al. 2021, arXiv
2107.03374, and successors); the smallest file and the share of data are our own choice.
Where a limit differs from the published one, its description says so.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.support.settings import Settings
from openqwen.support.workers import WorkersConfig, WorkKind

Profile = Literal["web", "text", "code"]
Preset = Literal["gopher", "c4", "fineweb", "refinedweb", "code"]


class GopherQuality(Settings):
    """Gopher's quality rules; a word is what stands between white space, as in the paper."""

    min_words: int = Field(50, description="fewest words in a document")
    max_words: int = Field(100_000, description="most words in a document")
    min_word_length: float = Field(3.0, description="smallest mean word length, characters")
    max_word_length: float = Field(10.0, description="largest mean word length, characters")
    max_symbols_per_word: float = Field(
        0.1, description="most '#' per word, and most ellipses per word"
    )
    max_bullet_lines: float = Field(
        0.9, description="largest share of lines that start with a bullet"
    )
    max_ellipsis_lines: float = Field(
        0.3, description="largest share of lines that end in an ellipsis"
    )
    min_alphabetic_words: float = Field(
        0.8, description="smallest share of words that hold a letter"
    )
    stop_words: list[str] = Field(
        ["the", "be", "to", "of", "and", "that", "have", "with"],
        description="words that running English cannot avoid",
    )
    min_stop_words: int = Field(
        2, description="fewest occurrences of stop words; 0 for languages other than English"
    )


class GopherRepetition(Settings):
    """Gopher's repetition rules (table A1): shares of lines, paragraphs or characters."""

    max_duplicate_lines: float = Field(
        0.3, description="largest share of lines that occurred before"
    )
    max_duplicate_line_characters: float = Field(
        0.2, description="largest share of characters in such lines"
    )
    max_duplicate_paragraphs: float = Field(
        0.3, description="largest share of paragraphs that occurred before"
    )
    max_duplicate_paragraph_characters: float = Field(
        0.2, description="largest share of characters in such paragraphs"
    )
    max_top_ngrams: dict[int, float] = Field(
        {2: 0.20, 3: 0.18, 4: 0.16},
        description="for each n, largest share of characters in the most frequent n-gram",
    )
    max_duplicate_ngrams: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="for each n, largest share of characters in n-grams that occurred before",
    )


class C4(Settings):
    """C4's rules without end-of-line punctuation, which costs too much text (FineWeb)."""

    min_line_words: int = Field(3, description="lines of fewer words are cut out")
    max_word_characters: int = Field(1000, description="lines with a longer word are cut out")
    min_sentences: int = Field(5, description="fewest sentences in a document")


class FineWeb(Settings):
    """FineWeb's own rules."""

    min_punctuated_lines: float = Field(
        0.12, description="smallest share of lines that end in punctuation"
    )
    short_line: int = Field(30, description="a line of at most so many characters is short")
    max_short_lines: float = Field(0.67, description="largest share of short lines")
    max_duplicate_line_characters: float = Field(
        0.01, description="largest share of characters in repeated lines"
    )
    max_newlines_per_word: float = Field(0.3, description="most line ends per word")


class WebRules(Settings):
    """Extracted web pages and collections of them: the published limits, on unwrapped lines."""

    gopher: GopherQuality = Field(
        default_factory=GopherQuality, description="Gopher's quality rules"
    )
    c4: C4 = Field(default_factory=C4, description="C4's rules")
    fineweb: FineWeb = Field(default_factory=FineWeb, description="FineWeb's rules")
    repetition: GopherRepetition = Field(
        default_factory=GopherRepetition, description="Gopher's repetition rules"
    )


class TextRules(Settings):
    """Books, notes and documentation: Gopher's and FineWeb's rules, some with wider limits.

    C4's rules do not apply: `{` and lines of two words are signs of a bad web page, not of a bad
    manual.
    """

    gopher: GopherQuality = Field(
        default_factory=lambda: GopherQuality(min_alphabetic_words=0.7),
        description="Gopher's quality rules; manuals hold more operators and numbers than prose "
        "(published: 0.8)",
    )
    fineweb: FineWeb = Field(
        default_factory=lambda: FineWeb(max_duplicate_line_characters=0.2),
        description="FineWeb's rules; refrains and repeated notes are normal in books and manuals "
        "(published: 0.01)",
    )
    repetition: GopherRepetition = Field(
        default_factory=lambda: GopherRepetition(
            max_duplicate_ngrams={5: 0.30, 6: 0.28, 7: 0.26, 8: 0.24, 9: 0.22, 10: 0.20}
        ),
        description="Gopher's repetition rules; a manual describes one parameter in many places "
        "(published: half)",
    )


class UnspacedRules(Settings):
    """Chinese, Japanese, Thai and other scripts without spaces: rules that count characters.

    The limits are those of a published Chinese recipe (datajuicer/data-juicer#30).
    """

    min_characters: int = Field(200, description="fewest characters in a document")
    max_characters: int = Field(65_589, description="most characters in a document")
    ngram: int = Field(10, ge=1, description="characters in a window")
    max_duplicate_ngrams: float = Field(
        0.3, description="largest share of characters in windows that occurred before"
    )


class CodeRules(Settings):
    """Source code: line lengths, character shares, generated files, and files that are data."""

    min_characters: int = Field(200, description="shortest file, characters (our choice)")
    max_mean_line: float = Field(100.0, description="largest mean line length, characters")
    max_line: int = Field(1000, description="longest line, characters")
    min_alphanumeric: float = Field(
        0.25, description="smallest share of characters that are letters or digits"
    )
    max_data: float = Field(
        0.3, description="largest share of characters in number tables, hex and base64 (our choice)"
    )


class PublishedRules(Settings):
    """The limits of the presets, as published; see published.py."""

    gopher: GopherQuality = Field(
        default_factory=GopherQuality,
        description="Gopher's quality rules; here `stop_words` counts different ones",
    )
    repetition: GopherRepetition = Field(
        default_factory=GopherRepetition, description="Gopher's repetition rules"
    )
    c4: C4 = Field(default_factory=C4, description="C4's rules")
    fineweb: FineWeb = Field(default_factory=FineWeb, description="FineWeb's rules")


class FilterConfig(Settings):
    """The rules of each profile. A document's profile follows from its file type or source."""

    web: WebRules = Field(default_factory=WebRules, description="HTML, JSONL and Parquet")
    text: TextRules = Field(
        default_factory=TextRules, description="plain text, Markdown, reStructuredText, docstrings"
    )
    unspaced: UnspacedRules = Field(
        default_factory=UnspacedRules,
        description="web and text documents in scripts without spaces between words",
    )
    code: CodeRules = Field(default_factory=CodeRules, description="source code")
    published: PublishedRules = Field(
        default_factory=PublishedRules, description="the rules of the presets"
    )


class MinHashConfig(Settings):
    """Near-deduplication with FineWeb's banding: it finds half of the pairs at Jaccard 0.68."""

    shingle_words: int = Field(5, ge=1, description="words in a shingle")
    bands: int = Field(
        14,
        ge=1,
        description="bands; two documents that agree in one whole band are near-duplicates",
    )
    rows: int = Field(8, ge=1, description="hashes in a band")


class ScoreConfig(Settings):
    """Filtering by a classifier of quality. A document's score is the mean of its dimensions'."""

    weights: dict[str, float] = Field(
        {}, description="dimension -> its weight in the mean, such as {spam: 0}; not named: 1"
    )
    least: float | None = Field(None, description="documents with a lower score are dropped")
    keep: dict[str, float] = Field(
        {}, description="source -> the share of its documents to keep, those with the best scores"
    )


class CorpusConfig(Settings):
    """The corpus stage: from a folder of raw documents to training and held-out documents."""

    folder: Path | None = Field(
        None,
        description="folder of .txt .md .rst .html .jsonl(.gz .zst) .parquet, code; none: Python's "
        "library",
    )
    sample: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the documents that is read, by hash of id: to try filters on a few",
    )
    leave_out: list[Literal["filter", "exact", "near", "paragraphs"]] = Field(
        [],
        description="steps that do not run, to see what they do: the filters, and the removal of "
        "exact duplicates, near-duplicates and repeated paragraphs",
    )
    identify: bool = Field(
        True,
        description="find language, licence and kind of the documents of a folder, where unknown",
    )
    max_quarantined: float = Field(
        0.2,
        ge=0,
        le=1,
        exclude=True,
        description="largest share of files and records that cannot be read; with more the run "
        "ends with an error",
    )
    engine: WorkKind = Field(
        "single",
        exclude=True,
        description="work in this process, in several processes, or on a Ray cluster",
    )
    workers: WorkersConfig = Field(
        default_factory=WorkersConfig, exclude=True, description="the worker processes"
    )
    max_document_bytes: int = Field(
        10_000_000,
        ge=1,
        description="longer files, JSONL lines and Parquet rows are skipped and counted",
    )
    max_bytes: dict[str, int] = Field(
        {"code": 24_000_000, "docs": 6_000_000},
        description="most bytes of each source named here; the seed chooses the documents",
    )
    profiles: dict[str, Profile] = Field(
        {}, description="source -> web, text or code: the rules for it, whatever its file types"
    )
    presets: dict[str, Preset] = Field(
        {},
        description="source, or * for all -> gopher, c4, fineweb, refinedweb or code: published "
        "filters with datatrove's decisions, in place of the profile's rules (English)",
    )
    filters: FilterConfig = Field(
        default_factory=FilterConfig, description="the rules of each profile"
    )
    personal: Literal["keep", "mask", "drop"] = Field(
        "keep",
        description="e-mail addresses, public IP addresses, cards, bank accounts and phone numbers:"
        " kept, replaced, or the document is dropped",
    )
    paragraph_characters: int = Field(
        200,
        ge=1,
        description="shortest paragraph or comment that is cut where an earlier document has it",
    )
    decontaminate: list[Path] = Field(
        [],
        description="evaluation files, or folders of them; documents that hold one of their texts "
        "are dropped: 13 words in common, in order, and 0.6 of the shorter text (Qwen2)",
    )
    classifier: Path | None = Field(
        None, description="output folder of `openqwen quality`; none: no document is scored"
    )
    score: ScoreConfig = Field(
        default_factory=ScoreConfig, description="filtering by the classifier of quality"
    )
    minhash: MinHashConfig = Field(default_factory=MinHashConfig, description="near-deduplication")
    heldout_share: float = Field(
        0.02, gt=0, lt=1, description="share of documents held out of training, by hash of id"
    )
    heldout_max_bytes: int = Field(250_000, ge=1, description="most held-out bytes of one source")
    weights: dict[str, float] = Field(
        {"docs": 3.0},
        description="how often a source is seen relative to its size; sources not named: 1",
    )


def text_bytes(config: CorpusConfig) -> int:
    """A guess at the bytes of raw text, for estimates."""
    return min(sum(config.max_bytes.values()), 10**9)
