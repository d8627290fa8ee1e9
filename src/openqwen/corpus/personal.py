"""Personal data in text: found by patterns and checked by their own rules, then replaced.

E-mail addresses and public IP addresses as in FineWeb (Penedo et al. 2024, section 3.6), and what
has a check digit: payment cards (Luhn) and bank accounts (IBAN, ISO 13616). Telephone numbers are
only found in the international form (E.164), since others look like any number.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple


class _Kind(NamedTuple):
    """A kind of personal data: its pattern, a test of what it matches, what stands for it.

    needle: text that every match holds; it is looked for first, since that is fast.
    """

    pattern: re.Pattern[str]
    real: Callable[[str], bool]
    mask: str
    needle: str = ""


def mask_personal(text: str) -> tuple[str, Counter[str]]:
    """The text with personal data replaced, and how often each kind was found."""
    found: Counter[str] = Counter()
    for name, kind in _KINDS.items():
        if kind.needle not in text:
            continue

        def masked(match: re.Match[str], name: str = name, kind: _Kind = kind) -> str:
            if not kind.real(match[0]):
                return match[0]
            found[name] += 1
            return kind.mask

        text = kind.pattern.sub(masked, text)
    return text, found


def _real_email(text: str) -> bool:
    return not text.lower().endswith(("@example.com", "@example.org", "@example.net"))


def _public_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _real_card(text: str) -> bool:
    digits = [int(c) for c in text if c.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = (d * 2 - 9 * (d > 4) for d in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _real_account(text: str) -> bool:
    plain = text.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    turned = plain[4:] + plain[:4]
    return int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _real_phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15


# Every repetition is bounded, so that no text takes more than linear time. Masks are addresses that
# are reserved for documentation (RFC 2606, RFC 5737), so masking twice changes nothing.
_KINDS = {
    "email": _Kind(
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
        _real_email,
        "name@example.com",
        "@",
    ),
    "ip address": _Kind(
        re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]{0,8}\d)"),
        _public_address,
        "192.0.2.1",
    ),
    "bank account": _Kind(
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
        _real_account,
        "<bank account>",
    ),
    "card": _Kind(
        re.compile(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![.-]?\d)"), _real_card, "<card number>"
    ),
    "phone": _Kind(
        re.compile(r"(?<![\w+])\+[1-9]\d{0,2}(?:[ .()/-]{0,2}\d){6,13}(?!\d)"),
        _real_phone,
        "<phone number>",
        "+",
    ),
}
