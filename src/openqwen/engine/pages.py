"""The cache's pages: which requests reference them, and which prefix they hold.

A full page is registered under its prefix hash, which covers its tokens, all tokens before them and
how they were read, so that requests with the same prefix share it. A page without references
keeps its hash until it is allocated again: the list of cached pages is the eviction order.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def prefix_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash a page's tokens and the hash of the page before it.

    128 bits of BLAKE2b: equal hashes mean equal tokens.
    """
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Allocates `count` pages of `page_size` tokens each.

    A page is free (no references, content unknown), cached (no references, but registered under a
    prefix hash) or referenced by one or more requests.
    """

    def __init__(self, count: int, page_size: int):
        self.count, self.page_size = count, page_size
        self.references = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Number of pages that can be allocated."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Number of pages without references whose content can still be found."""
        return len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """Number of pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The registered pages of the longest prefix of these hashes; adds no references."""
        pages = []
        for prefix in hashes:
            if (page := self._page_of.get(prefix)) is None:
                break
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int]:
        """Pages for new content, one reference each: free ones, then the oldest cached ones."""
        assert count <= self.available, "the caller checks that enough pages are available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._unregister(page)
            self.references[page] = 1
            pages.append(page)
        return pages

    def writable(self, pages: Sequence[int]) -> list[int]:
        """For each of these pages, which the caller references, a page that it may write to.

        While free pages suffice, each is a new page. Otherwise a page that nobody else references
        is returned itself, no longer registered. The caller copies the content of the others and
        releases them. As many pages as are shared must be available.
        """
        enough = len(self._free) >= len(pages)
        writable = []
        for page in pages:
            if enough or self.references[page] > 1:
                writable += self.allocate(1)
            else:
                self._unregister(page)
                writable.append(page)
        return writable

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to pages that `match` has found."""
        for page in pages:
            assert page in self._hash_of
            self.references[page] += 1
            self._cached.pop(page, None)

    def register_prefix(self, page: int, prefix: bytes) -> None:
        """Let `match` find a full page; the first page that is registered under a hash stays."""
        if prefix not in self._page_of:
            self._page_of[prefix] = page
            self._hash_of[page] = prefix

    def release(self, pages: Sequence[int]) -> None:
        """Remove a reference from each page.

        The last page goes first, so that the end of a sequence is evicted before its beginning,
        which more requests can share.
        """
        for page in reversed(pages):
            assert self.references[page] > 0
            self.references[page] -= 1
            if not self.references[page]:
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def clear_prefixes(self) -> None:
        """Remove all pages from the prefix cache; references stay."""
        self._free += self._cached
        self._cached.clear()
        self._page_of.clear()
        self._hash_of.clear()

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that the pages add up. holders: the pages that each request references."""
        referenced = Counter(page for pages in holders for page in pages)
        for page, count in enumerate(self.references):
            assert count == referenced[page], f"page {page}: {count}, held {referenced[page]} times"
        free, cached = set(self._free), set(self._cached)
        assert free | cached | referenced.keys() == set(range(self.count))
        assert len(self._free) + len(cached) + len(referenced) == self.count
        assert self._page_of == {prefix: page for page, prefix in self._hash_of.items()}
        assert cached <= self._hash_of.keys(), "a cached page can be found"
        assert not free & self._hash_of.keys(), "a free page cannot be found"

    def _unregister(self, page: int) -> None:
        if prefix := self._hash_of.pop(page, None):
            del self._page_of[prefix]
