"""Verification functions that a model wrote (AutoIF, Dong et al. 2024), run in the sandbox."""

import json
from collections.abc import Iterable

from openqwen.sandbox import Limits, Program, Verdict, open_pool

_LIMITS = Limits(seconds=3)
_TEST = """\
import json
def check(candidate):
    assert candidate(json.loads({response!r})) is True"""


def run_verifiers(asked: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool | str]:
    """Call `evaluate(response)` of each pair (source, response).

    Returns:
        For each pair whether it returned True; a text says why there is no verdict: the function
        is missing, raised, took too long, or the sandbox failed.

    Raises:
        OpenQwenError: the sandbox cannot be built here.
    """
    pairs = list(dict.fromkeys(asked))
    if not pairs:
        return {}
    programs = [
        Program(
            source,
            tests=_TEST.format(response=json.dumps(response)),
            entry="evaluate",
            limits=_LIMITS,
        )
        for source, response in pairs
    ]
    with open_pool() as pool:
        return dict(zip(pairs, map(_outcome, pool.run(programs)), strict=True))


def _outcome(verdict: Verdict) -> bool | str:
    if verdict.passed or verdict.reason.startswith("a test failed"):
        return verdict.passed
    return f"{verdict.status}: {verdict.reason}"
