"""`openqwen sandbox --check`: the list of attacks, run on this machine (attacks.toml)."""

import os
import secrets
import socket
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from openqwen.sandbox.limits import Limits, Verdict
from openqwen.sandbox.pool import Pool, Program
from openqwen.sandbox.tiers import Tier

_LIMITS = Limits(seconds=1, wall_seconds=3, memory_mb=256, output_kb=64, disk_mb=16)
_SECRET = 5  # of the tests that the attacks on the checker try to pass
_PROBE = Program("print(6 * 7)")


@dataclass(frozen=True)
class Attack:
    """A program that tries to get out, and the part of the sandbox that it is about."""

    part: str
    name: str
    source: str

    def program(self, marks: dict[str, str]) -> Program:
        """The attack against the caller's things that `marks` names."""
        source = self.source
        for mark, value in marks.items():
            source = source.replace(f"@{mark}@", value)
        if self.part != "checker":
            return Program(source, limits=_LIMITS)
        return Program(source, tests=f"assert add(2, 3) == {_SECRET}", limits=_LIMITS)


@dataclass(frozen=True)
class Outcome:
    """What became of an attack. contained: it got nothing, and the next run was as always."""

    attack: Attack
    verdict: Verdict
    contained: bool


def attacks() -> list[Attack]:
    """The list."""
    text = Path(__file__).with_name("attacks.toml").read_text(encoding="utf-8")
    parts = tomllib.loads(text).items()
    return [Attack(part, name, source) for part, each in parts for name, source in each.items()]


def try_attacks(tier: Tier, chosen: list[Attack] | None = None) -> Iterator[Outcome]:
    """Run attacks one after another, each with an innocent program after it."""
    with _targets() as marks, Pool(1, tier=tier) as pool:
        for attack in attacks() if chosen is None else chosen:
            verdict, probe = pool.run([attack.program(marks), _PROBE])
            kept = Path(marks["SECRET"]).read_text() == marks["CONTENT"]
            quiet = "ESCAPED" not in verdict.stdout and verdict.status != "infra"
            fooled = attack.part == "checker" and verdict.passed
            usual = probe.passed and probe.stdout == "42\n"
            yield Outcome(attack, verdict, quiet and kept and usual and not fooled)


@contextmanager
def _targets() -> Iterator[dict[str, str]]:
    """What the attacks are after: a file, a port, a socket and a variable of this process."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        content, name = secrets.token_hex(8), f"openqwen-{secrets.token_hex(8)}"
        (folder / "secret").write_text(content)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", port))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{name}")
        abstract.listen()
        os.environ["OPENQWEN_CANARY"] = content
        stack.callback(os.environ.pop, "OPENQWEN_CANARY", None)
        yield {
            "SECRET": str(folder / "secret"),
            "CONTENT": content,
            "PORT": str(port),
            "ABSTRACT": name,
            "PID": str(os.getpid()),
        }
