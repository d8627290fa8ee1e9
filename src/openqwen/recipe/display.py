"""What a run prints: a line and a result for each stage, the table of results, the plan."""

from collections.abc import Mapping, Sequence
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from openqwen.recipe.artifact import Manifest
from openqwen.recipe.plan import NOT_MADE, Decision
from openqwen.support.progress import console, duration

_INDENT = " " * 7
_KEY_METRICS = 5  # how many of the metrics that a stage returns are shown
# Metrics whose names end so are shown in per cent.
_SHARES = ("accuracy", "chance", "win_rate", "win_rate_checked", "style", "share", "gain")
_LABELS = {"tokens_per_second": "tokens/s", "checked_accuracy": "checked tasks"}
_ACTION_STYLE = {"reuse": "dim", "run": "bold cyan", "resume": "bold cyan", "blocked": "bold red"}


def heading(number: int, total: int, step: Decision) -> None:
    """Print a stage and why it runs: ` 7/17  sft    train.learning_rate 0.001 -> 0.002`."""
    name = step.node.name
    line = Text(f"{number:>3}/{total:<3}", style="dim")
    if step.artifact is not None:
        line.append(f"{name:<19} ", style="not dim")
        made = step.artifact.manifest
        when = f"{made.created.astimezone():%Y-%m-%d %H:%M}"
        line.append(f"reused (made {when} in {duration(made.seconds)})")
    else:
        line.append(f"{name:<19} ", style="not dim bold cyan")
        line.append("" if step.why == NOT_MADE else step.why)
        if step.action == "resume":
            line.append("; resuming from its saved state")
    console.print(line)


def result(metrics: Mapping[str, int | float | None], seconds: float) -> None:
    """Print the key metrics of a stage that has just finished, and its duration."""
    line = Text(f"{_INDENT}✓ ", style="green")
    line.append(_key_metrics(metrics), style="default")
    line.append(f"   {duration(seconds)}" if metrics else duration(seconds), style="dim")
    console.print(line)


def note(text: str) -> None:
    """Print a dim line."""
    console.print(Text(text, style="dim"))


def results_table(done: Sequence[tuple[Manifest, bool]]) -> None:
    """Print the key metrics and the time of each stage; done: (manifest, whether it was reused)."""
    table = _table("stage", "result", "time")
    for manifest, reused in done:
        time = Text(duration(manifest.seconds), style="dim" if reused else "")
        table.add_row(manifest.stage, _key_metrics(manifest.metrics), time)
    times = [manifest.seconds for manifest, reused in done if not reused]
    table.columns[1].footer = f"{len(times)} made, {len(done) - len(times)} reused"
    table.columns[2].footer = duration(sum(times))
    console.print()
    console.print(table, soft_wrap=False)


def plan_table(steps: Sequence[Decision]) -> None:
    """Print what a run would do with each stage, why, and how long it should take."""
    table = _table("stage", "action", "why", "time")
    for step in steps:
        action = Text(step.action, style=_ACTION_STYLE[step.action])
        if step.action == "reuse":
            table.add_row(step.node.name, action, step.why, "", style="dim")
        else:
            time = "unknown" if step.seconds is None else f"~{duration(step.seconds)}"
            table.add_row(step.node.name, action, step.why, time)
    todo = [step for step in steps if step.action in ("run", "resume")]
    known = [step.seconds for step in todo if step.seconds is not None]
    sums = [f"~{duration(sum(known))}"] if known else []
    if len(known) < len(todo):
        sums.append(f"{len(todo) - len(known)} unknown")
    table.columns[2].footer = f"{len(todo)} of {len(steps)} to make"
    table.columns[3].footer = " + ".join(sums)
    console.print(table, soft_wrap=False)


def _table(*columns: str) -> Table:
    table = Table(
        box=box.SIMPLE, show_footer=True, header_style="dim", footer_style="dim", pad_edge=False
    )
    for name in columns:
        one_line = name not in ("result", "why")
        side: Literal["left", "right"] = "right" if name == "time" else "left"
        table.add_column(name, overflow="fold", no_wrap=one_line, justify=side)
    return table


def _key_metrics(metrics: Mapping[str, int | float | None]) -> str:
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    shown = [item for item in metrics.items() if item[0] not in ends][:_KEY_METRICS]
    texts = [
        f"{_label(name)} {_number(name, value)}{_range(name, metrics)}" for name, value in shown
    ]
    return "   ".join(texts)


def _range(name: str, metrics: Mapping[str, int | float | None]) -> str:
    """Return the 95 % interval of a metric, ` (50.3% to 55.1%)`, or an empty string."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    if low is None or high is None:
        return ""
    return f" ({_number(name, low)} to {_number(name, high)})"


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _number(name: str, value: int | float | None) -> str:
    if value is None:
        return "—"
    if name.removesuffix("_low").removesuffix("_high").endswith(_SHARES):
        return f"{value:.1%}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
