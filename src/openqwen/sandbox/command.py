"""`openqwen sandbox`: run one program that nobody trusts, or try this machine's sandbox."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from openqwen.sandbox.attacks import Outcome, attacks, try_attacks
from openqwen.sandbox.languages import TABLE, available
from openqwen.sandbox.limits import Limits
from openqwen.sandbox.pool import run
from openqwen.sandbox.tiers import Tier, best_tier, protections, required
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import console, progress


def sandbox(
    file: Annotated[Path | None, tyro.conf.Positional] = None,
    check: bool = False,
    tests: Path | None = None,
    entry: str | None = None,
    tier: Literal["gvisor", "strict", "process"] = "strict",
    limits: Limits = Limits(),  # noqa: B008 - it cannot be changed
) -> None:
    """Run a program that nobody trusts, or try this machine's sandbox.

    The program reads this command's standard input and writes to its outputs.

    Args:
        file: The program: .py, .c, .cpp, .js or .sh.
        check: Run the list of attacks and say which protections are active.
        tests: A file of Python asserts that call the program's functions, in another process.
        entry: The function that the tests are for.
        tier: The least protection: gvisor (a kernel of its own), strict (namespaces) or process
            (Landlock and seccomp alone).
        limits: What the program may use.
    """
    if check:
        _check(tier)
        return
    if file is None:
        raise OpenQwenError("No program is named.", do="name a file, or give --check")
    suffixes = {Path(language.file).suffix: name for name, language in TABLE.items()}
    language = suffixes.get(file.suffix, "python")
    verdict = run(
        file.read_text(encoding="utf-8"),
        "" if sys.stdin.isatty() else sys.stdin.read(),
        limits=limits,
        language=language,
        tests=tests.read_text(encoding="utf-8") if tests else None,
        entry=entry,
        tier=tier,
    )
    sys.stdout.write(verdict.stdout)
    sys.stderr.write(verdict.stderr)
    if not verdict.passed:
        raise OpenQwenError(f"{verdict.status}: {verdict.reason}", where=file)


def _check(tier: Tier) -> None:
    table = Table(
        title=f"sandbox: the strongest tier here is '{best_tier()}'", title_justify="left"
    )
    for column in ("protection", "active", "what it does"):
        table.add_column(column)
    for name, active, about in protections().lines():
        table.add_row(name, "yes" if active else "no", about)
    console.print(table)
    console.print(f"languages: {', '.join(available())}")
    required(tier)
    listed = attacks()
    outcomes: list[Outcome] = []
    with progress("attacks", len(listed), "attacks") as bar:
        for outcome in try_attacks(tier):
            outcomes.append(outcome)
            bar.advance()
    escaped = [outcome for outcome in outcomes if not outcome.contained]
    for outcome in escaped:
        console.print(f"✗ {outcome.attack.part}: {outcome.attack.name}: {outcome.verdict}")
    console.print(f"{len(outcomes) - len(escaped)} of {len(outcomes)} attacks are contained.")
    if escaped:
        do = "run nothing that you do not trust on it; report the lines marked ✗"
        raise OpenQwenError("This machine's sandbox does not hold.", do=do)
