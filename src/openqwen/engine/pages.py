"""The cache's pages: who holds them, and what they hold.

A full page is known by the digest of its tokens, of all tokens before them and of how they were
read (the profile), so that whoever starts alike finds it. A page that nobody holds keeps its digest
until it is taken for something else: the free list, oldest first, is the cache's order of eviction.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a page that follows `parent`; 128 bits of BLAKE2b, so equal digests mean equal
    tokens.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """`count` pages of `page_size` tokens.

    Each is held (references > 0), cached (none, but known) or blank.
    """

    def __init__(self, count: int, page_size: int):
        self.count, self.page_size = count, page_size
        self.references = [0] * count
        self._blank = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds but somebody may find."""
        return len(self._cached)

    def needed(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The known pages of the longest beginning of a chain; they are not held yet."""
        pages = []
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                break
            pages.append(page)
        return pages

    def take(self, count: int) -> list[int]:
        """Hold pages for new content, blank ones first, then the oldest; the caller has seen that
        enough are free.
        """
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self.references[page] = 1
            pages.append(page)
        return pages

    def own(self, pages: Sequence[int]) -> list[int]:
        """Hold pages to fill with what these hold, which the caller holds, and to change: new ones
        where enough are blank; else the same, unknown from now on, where nobody else holds them. So
        many as are shared must be free. The caller lets go of those that it has copied.
        """
        roomy = len(self._blank) >= len(pages)
        same = [not roomy and self.references[page] == 1 for page in pages]
        for page in (page for page, stays in zip(pages, same) if stays):
            if digest := self._digest_of.pop(page, None):
                del self._page_of[digest]
        new = iter(self.take(same.count(False)))
        return [page if stays else next(new) for page, stays in zip(pages, same)]

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages that were found."""
        for page in pages:
            self.references[page] += 1
            self._cached.pop(page, None)

    def seal(self, page: int, digest: bytes) -> None:
        """Make a full page known.

        Where its content is known already, by another page, that one stays the one found.
        """
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages, the last first: of a chain, the end is evicted before the beginning that
        others share.
        """
        for page in reversed(pages):
            self.references[page] -= 1
            if not self.references[page]:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._blank.append(page)

    def forget(self) -> None:
        """Make all pages unknown: nobody will find what they hold."""
        self._blank += self._cached
        self._cached.clear()
        self._page_of.clear()
        self._digest_of.clear()
