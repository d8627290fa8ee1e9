"""Guesses of what comes next, which one call then checks all at once.

A guess is kept where the token that the sampler chooses, with the draw that belongs to its place, is the guessed one.
So an answer is the same with drafts as without, sampled ones too: for a guess without chance of its own this is
rejection sampling (Leviathan et al. 2023), and here even the draw is that of the plain run.
"""

from collections.abc import Sequence

_GRAM = 3  # tokens that must have come before in the same order
_PAUSE = 32  # tokens without drafts after guesses have failed


class Lookup:
    """Prompt lookup (Saxena 2023): the last tokens, where they have come before, go on as they did then.

    How far it guesses adapts to the request: twice as far after a guess that was right to its end, half as far after
    one that failed at once; when even one token is too far it pauses.
    """

    def __init__(self, most: int):
        self._most, self._length, self._pause = most, min(4, most), 0
        self._after: dict[tuple[int, ...], int] = {}  # where the latest occurrence of each n-gram ends
        self._known: list[int] = []

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`, which must begin with the ids of the last call."""
        new = ids[len(self._known) :]
        self._pause = max(0, self._pause - len(new))
        for token in new:
            # An n-gram becomes known when its successor comes: it never finds itself.
            if len(self._known) >= _GRAM:
                self._after[tuple(self._known[-_GRAM:])] = len(self._known)
            self._known.append(token)
        at = self._after.get(tuple(self._known[-_GRAM:]))
        if at is None or self._pause:
            return []
        return self._known[at : at + min(self._length, most)]

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of the last guess were right."""
        if right == guessed:
            self._length = min(2 * self._length, self._most)
        elif right == 0:
            self._length //= 2
            if not self._length:
                self._length, self._pause = 1, _PAUSE
