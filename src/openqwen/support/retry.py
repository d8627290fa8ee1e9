"""When a request that failed is sent again."""

import math
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

_FIRST_WAIT, _LONGEST_BACKOFF = 0.5, 30.0  # seconds between two attempts


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `Retry-After`, which is a number or a date."""
    seconds: float | None = None
    with suppress(ValueError, TypeError, OverflowError):
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            value = headers["retry-after"]
            try:
                seconds = float(value)
            except ValueError:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
    return None if seconds is None or math.isnan(seconds) else max(seconds, 0.0)


def backoff(attempt: int, requested: float | None = None) -> float:
    """Seconds until the next attempt, random so that requests do not all come at once."""
    if requested is not None:
        return requested + random.uniform(0, _FIRST_WAIT)
    return min(_FIRST_WAIT * 2.0 ** min(attempt, 16), _LONGEST_BACKOFF) * random.uniform(0.5, 1)
