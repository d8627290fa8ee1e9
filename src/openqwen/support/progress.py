"""Progress and remaining time: a live line on a terminal, regular lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

console = Console(stderr=False, highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

_BAR = 24  # characters
_LOG_EVERY = 10.0  # seconds between lines where there is no terminal


def notice(text: str, where: str | Path) -> None:
    """Print a note on stderr, such as how a contradiction in a file was resolved."""
    _errors.print(f"note: {text} ({where})", style="dim", markup=False)


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m05s` or `2h07m`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"


class Progress:
    """The progress of one piece of work; made by `progress`.

    Args:
        label: its name.
        total: units in all; None where that is unknown.
        unit: name of a unit.
        done: units that were done before, which do not count for the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._done_before = done
        self.notes: dict[str, str] = {}
        self._start = self._shown = time.monotonic()
        self._live: Live | None = None

    def skip(self, amount: float) -> None:
        """Count `amount` units as done before: they do not count for the rate."""
        self.done += amount
        self._done_before += amount

    def advance(self, amount: float = 1, **notes: object) -> None:
        """Count `amount` more units as done; notes (loss="3.21") are shown behind the numbers."""
        self.done += amount
        self.notes |= {k: str(v) for k, v in notes.items()}
        now = time.monotonic()
        if self._live is not None:
            if now - self._shown > 0.1:
                self._live.update(self._line(now))
                self._shown = now
        elif now - self._shown > _LOG_EVERY:
            console.print(self._line(now))
            self._shown = now

    def _line(self, now: float) -> Text:
        elapsed = now - self._start
        rate = (self.done - self._done_before) / elapsed if elapsed > 0 else 0.0
        parts = [f"  {self.label:<14}"]
        if self.total:
            share = min(self.done / self.total, 1.0)
            filled = round(share * _BAR)
            left = (self.total - self.done) / rate if rate > 0 else None
            parts.append(f"[{'━' * filled}{' ' * (_BAR - filled)}] {share:4.0%}")
            parts.append(f"{self.done:,.0f}/{self.total:,.0f} {self.unit}")
            parts.append(f"{duration(max(left, 0))} left" if left is not None else "…")
        else:
            parts.append(f"{self.done:,.0f} {self.unit}  {duration(elapsed)}")
        parts += [f"{k} {v}" for k, v in self.notes.items()]
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


@contextmanager
def progress(
    label: str, total: float | None = None, unit: str = "steps", done: float = 0
) -> Iterator[Progress]:
    """Show progress during the block; on a terminal nothing remains afterwards. See `Progress`."""
    work = Progress(label, total, unit, done)
    if not sys.stdout.isatty():
        yield work
        return
    with Live(
        work._line(time.monotonic()), console=console, transient=True, auto_refresh=False
    ) as live:
        work._live = live
        yield work
        work._live = None
