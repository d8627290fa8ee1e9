"""Format numbers and untrusted text for the page."""

import math
import unicodedata
from typing import Any, NamedTuple

import yaml

from openqwen.support.progress import duration as _duration

_KEPT = {"\n", "\t"}
_UNITS = ("B", "kB", "MB", "GB", "TB")
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MISSING = "–"
THIN = "\u202f"  # a narrow no-break space between a number and its unit


def visible(text: str) -> str:
    """Replace control, format and surrogate characters by visible codes, but not newline and tab.

    A model may write a right-to-left override, which would rearrange the page, a zero-width space,
    which would be invisible, or half a surrogate pair, which cannot be encoded as UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _shown(c) for c in text)


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Zs", "Mn", "Mc"):
        return character
    return f"‹U+{ord(character):04X}›"


class Shortened(NamedTuple):
    """A text, and a note that says how much of it is shown; empty if nothing was cut."""

    text: str
    note: str


def shortened(value: object, limit: int = 600) -> Shortened:
    """Return the first `limit` characters, with a note if that is not all."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= limit:
        return Shortened(text, "")
    return Shortened(text[:limit], f"cut: {limit:,} of {len(text):,} characters")


def finite(value: object) -> float | None:
    """Return a finite number as a float, and None for anything else, including booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: object, digits: int = 3) -> str:
    """Format with fixed decimals, scientific where those would all be zero, `–` for no number."""
    known = finite(value)
    if known is None:
        return _MISSING if value is None else str(value)
    if known and abs(known) < 0.5 * 10**-digits:
        return scientific(known)
    return f"{known:,.{digits}f}"


def scientific(value: float) -> str:
    """Format as 3e-4 or 2.5e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def signed(value: float, digits: int = 3) -> str:
    """Format a difference with its sign; the minus sign is as wide as the plus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: object, digits: int = 1) -> str:
    """Format a share from 0 to 1 as a percentage."""
    known = finite(value)
    return _MISSING if known is None else f"{known:.{digits}%}".replace("%", THIN + "%")


def count(value: object) -> str:
    """Format a count: 1234 → 1,234; 1234567 → 1.23M."""
    known = finite(value)
    if known is None:
        return _MISSING if value is None else str(value)
    for scale, suffix in _SCALES:
        if abs(known) >= max(scale, 1e4):
            return f"{known / scale:.3g}{suffix}"
    return f"{known:,.0f}"


def size(value: object) -> str:
    """Format bytes in decimal units with three digits: 1234567 → 1.23 MB."""
    known = finite(value)
    if known is None:
        return _MISSING
    for unit in _UNITS:
        if abs(known) < 999.5 or unit == _UNITS[-1]:
            break
        known /= 1000
    return f"{known:.3g}{THIN}{unit}"


def duration(value: object) -> str:
    """Format seconds: `4.2s`, `42s`, `3m05s`, `2h07m`."""
    known = finite(value)
    if known is None:
        return _MISSING
    return f"{known:.1f}s" if known < 9.95 else _duration(known)


def yaml_text(value: Any) -> str:
    """Format a configuration as the YAML of a recipe, with its fields in order."""
    if not value:
        return "(empty)\n"
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000)
