"""Runs programs that nobody trusts: model-written code, tests, checkers.

    from openqwen.sandbox import Limits, run
    run("print(input()[::-1])", stdin="abc", limits=Limits(seconds=2)).stdout      # "cba\n"

A pool keeps one prepared Python process a worker (zygote.py), which forks once a program. The fork
confines itself (confine.py) before it reads the program. The names are loaded when they are first
used: the processes inside of the sandbox have the standard library alone.
"""

from typing import TYPE_CHECKING

from openqwen.support.lazy import lazy_names

if TYPE_CHECKING:
    from openqwen.sandbox.limits import Limits, Verdict
    from openqwen.sandbox.pool import Pool, Program, run
    from openqwen.sandbox.remote import RemotePool, open_pool
    from openqwen.sandbox.tiers import Tier, best_tier

__all__ = [
    "Limits",
    "Pool",
    "Program",
    "RemotePool",
    "Tier",
    "Verdict",
    "best_tier",
    "open_pool",
    "run",
]

_FILES = {
    "Limits": "limits",
    "Verdict": "limits",
    "Pool": "pool",
    "Program": "pool",
    "RemotePool": "remote",
    "open_pool": "remote",
    "run": "pool",
    "Tier": "tiers",
    "best_tier": "tiers",
}

__getattr__ = lazy_names(__name__, _FILES)
