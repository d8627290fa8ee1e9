"""What a document is."""

from openqwen.corpus.documents import Document


def identify(document: Document) -> Document:
    """The document."""
    return document
