"""Numbers and untrusted text, made fit for a page."""

import math
import unicodedata
from typing import Any, NamedTuple

import yaml

from openqwen.support.progress import duration as _duration

_KEPT = {"\n", "\t"}
_UNITS = ("B", "kB", "MB", "GB", "TB")
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MISSING = "–"
THIN = "\u202f"  # a narrow space that does not break: between a number and its unit


def visible(text: str) -> str:
    """Control, format and surrogate characters as something that can be seen; newline and tab stay.

    A model may write a right-to-left override, a zero-width space or half a surrogate pair: the
    first would rearrange the page, the second hide, the third cannot be written as UTF-8 at all.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _shown(c) for c in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Zs", "Mn", "Mc"):
        return character
    return f"‹U+{ord(character):04X}›"


class Shortened(NamedTuple):
    """A text and how much of it is shown: `note` is empty where nothing was cut."""

    text: str
    note: str


def shortened(value: object, limit: int = 600) -> Shortened:
    """The first `limit` characters, with a note of what was left out."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= limit:
        return Shortened(text, "")
    return Shortened(text[:limit], f"cut: {limit:,} of {len(text):,} characters")


def _finite(value: object) -> float | None:
    """A finite number as a float; None for anything else, booleans among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: object, digits: int = 3) -> str:
    """A fixed number of decimals; scientific where those would show nothing; a dash where there is
    no number.
    """
    finite = _finite(value)
    if finite is None:
        return _MISSING if value is None else str(value)
    if finite and abs(finite) < 0.5 * 10**-digits:
        return scientific(finite)
    return f"{finite:,.{digits}f}"


def scientific(value: float) -> str:
    """3e-04 → 3e-4; as many decimals as are not zero, one at most."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign: a true minus, which is as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: object, digits: int = 1) -> str:
    """A share from 0 to 1 as a percentage."""
    finite = _finite(value)
    return _MISSING if finite is None else f"{finite:.{digits}%}".replace("%", THIN + "%")


def count(value: object) -> str:
    """1234 → 1,234; 1,234,567 → 1.23M."""
    finite = _finite(value)
    if finite is None:
        return _MISSING if value is None else str(value)
    for scale, suffix in _SCALES:
        if abs(finite) >= max(scale, 1e4):
            return f"{finite / scale:.3g}{suffix}"
    return f"{finite:,.0f}"


def size(value: object) -> str:
    """Bytes in decimal units with three figures: 1234567 → 1.23 MB."""
    finite = _finite(value)
    if finite is None:
        return _MISSING
    for unit in _UNITS:
        if abs(finite) < 999.5 or unit == _UNITS[-1]:
            break
        finite /= 1000
    return f"{finite:.3g}{THIN}{unit}"


def duration(value: object) -> str:
    """Seconds as `4.2s`, `42s`, `3m05s`, `2h07m`."""
    finite = _finite(value)
    if finite is None:
        return _MISSING
    return f"{finite:.1f}s" if finite < 9.95 else _duration(finite)


def yaml_text(value: Any) -> str:
    """A configuration as the YAML that a recipe would hold; the order of its fields is kept."""
    return (
        yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000)
        if value
        else "(empty)\n"
    )
