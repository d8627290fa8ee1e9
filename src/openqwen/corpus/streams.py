"""Bytes of files that nobody checked: unpacked within limits, and turned into text.

A packed file may unpack to any size, and a line may never end. Both are noticed while they are
read, before they fill the memory or take hours.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from resiliparse.parse.encoding import detect_encoding

from openqwen.support.files import open_binary

PACKED = (".gz", ".zst")
_CHUNK = 1 << 20
# A file that unpacks to more than this, and to so many times its size, is refused. Text unpacks to
# 3 to 20 times its size; gzip's limit is 1,032.
_BOMB_BYTES, _BOMB_RATIO = 100_000_000, 200
_LONGEST_LINE = 1_000_000_000  # bytes that are passed over in search of a line's end
# UTF-8 that was read as Windows-1252 or Latin-1: "Ã©" for "é", "â€™" for "’".
_MOJIBAKE = re.compile(
    "(?:[\u00c2-\u00df][\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160"
    "\u2039\u0152\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153"
    "\u017e\u0178]|[\u00e0-\u00ef][\u0080-\u00ff\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6"
    "\u2030\u0160\u2039\u0152\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161"
    "\u203a\u0153\u017e\u0178]{2})"
)
_ODD_SHARE = 0.02  # of characters that may be controls or unknown where an encoding was guessed


class HostileFileError(Exception):
    """A file that would unpack without end. `reason` and `why` say what was seen."""

    def __init__(self, reason: str, why: str):
        self.reason, self.why = reason, why
        super().__init__(why)


class _Bounded(io.RawIOBase):
    """A stream that notices a decompression bomb."""

    def __init__(self, stream: IO[bytes], packed: int):
        self._stream, self._packed, self._read = stream, max(packed, 1), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._read

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go forward, by reading: readers of web archives pass over records in this way."""
        target = offset if whence == io.SEEK_SET else self._read + offset
        if whence == io.SEEK_END or target < self._read:
            raise io.UnsupportedOperation("this stream only goes forward")
        buffer = memoryview(bytearray(_CHUNK))
        while self._read < target and self.readinto(buffer[: target - self._read]):
            pass
        return self._read

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > _BOMB_BYTES and self._read > _BOMB_RATIO * self._packed:
            why = f"{self._packed:,} bytes unpack to more than {self._read:,}"
            raise HostileFileError("decompression bomb", why)
        return len(data)


def open_bounded(path: Path) -> io.BufferedReader:
    """Open for reading; .gz and .zst are unpacked, within limits.

    Raises OSError where an archive is damaged, HostileFileError where it is a bomb.
    """
    if path.suffix.lower() not in PACKED:
        return open(path, "rb")
    return bounded(open_binary(path), path.stat().st_size)


@contextmanager
def panics_named() -> Iterator[None]:
    """Turn a panic of a library in Rust, which is no Exception, into an OSError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise OSError(f"the reader gave up: {str(error)[:200]}") from None


def bounded(stream: IO[bytes], packed: int) -> io.BufferedReader:
    """A stream that unpacks `packed` bytes, within limits."""
    return io.BufferedReader(_Bounded(stream, packed), _CHUNK)


def lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines, which end at newline bytes only; None in place of one that is over `limit` bytes.

    Raises HostileFileError at a line of a gigabyte.
    """
    while line := file.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        passed = 0
        while rest := file.readline(_CHUNK):
            passed += len(rest)
            if rest.endswith(b"\n"):
                break
            if passed > _LONGEST_LINE:
                raise HostileFileError("endless line", f"no end after {passed:,} bytes")
        yield None


def decode(raw: bytes, repair: bool) -> tuple[str, str]:
    """(text, the encoding it was in).

    repair: guess the encoding of what is not UTF-8, and mend UTF-8 that was once misread.

    Raises UnicodeDecodeError where the bytes are no text.
    """
    if repair and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16"), "utf-16"
    try:
        text = raw.decode("utf-8-sig")
        return (mend(text), "utf-8") if repair else (text, "utf-8")
    except UnicodeDecodeError:
        name = detect_encoding(raw) if repair else None
        if not name or name == "utf-8":
            raise
        text = raw.decode(name, "replace")
        odd = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f") for c in text)
        if odd > _ODD_SHARE * len(text):
            raise
        return text, name


def mend(text: str) -> str:
    """The text with UTF-8 that was read as Windows-1252 put right, character by character."""
    if "Ã" not in text and "â" not in text and "Â" not in text:
        return text
    return _MOJIBAKE.sub(_mended, text)


def _mended(match: re.Match[str]) -> str:
    raw = bytearray()
    for character in match[0]:
        try:
            raw += character.encode("cp1252")
        except UnicodeEncodeError:
            if ord(character) > 255:
                return match[0]
            raw.append(ord(character))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return match[0]
