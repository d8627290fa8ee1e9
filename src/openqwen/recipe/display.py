"""How a run looks: a line a stage, its progress, its result, and two tables."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from openqwen.recipe.artifact import Manifest
from openqwen.recipe.plan import NOT_MADE, Decision
from openqwen.support.progress import console, duration

_INDENT = " " * 7
_KEY_METRICS = 5  # the first ones a stage returns
_SHARES = (
    "accuracy",
    "chance",
    "win_rate",
    "win_rate_checked",
    "acceptance",
    "share",
    "gain",
)  # shown in per cent
_LABELS = {"tokens_per_second": "tokens/s", "checked_accuracy": "checked tasks"}
_ACTION_STYLE = {"reuse": "dim", "run": "bold cyan", "resume": "bold cyan", "blocked": "bold red"}


def heading(number: int, total: int, step: Decision) -> None:
    """` 7/17  sft    train.learning_rate 0.001 -> 0.002`, with `resuming` where a saved state was
    found.
    """
    name = step.node.name
    line = Text(f"{number:>3}/{total:<3}", style="dim")
    if step.artifact is not None:
        line.append(f"{name:<19} ", style="not dim")
        made = step.artifact.manifest
        line.append(
            f"reused (made {made.created.astimezone():%Y-%m-%d %H:%M} in {duration(made.seconds)})"
        )
    else:
        line.append(f"{name:<19} ", style="not dim bold cyan")
        line.append("" if step.why == NOT_MADE else step.why)
        if step.action == "resume":
            line.append("; resuming from its saved state")
    console.print(line)


def result(metrics: Mapping[str, int | float | None], seconds: float) -> None:
    """The key metrics of a stage that just finished, and its duration."""
    line = Text(f"{_INDENT}✓ ", style="green")
    line.append(_key_metrics(metrics), style="default")
    line.append(f"   {duration(seconds)}" if metrics else duration(seconds), style="dim")
    console.print(line)


def note(text: str) -> None:
    """A quiet line."""
    console.print(Text(text, style="dim"))


def results_table(done: Sequence[tuple[Manifest, bool]]) -> None:
    """A line a stage: its key metrics and the time it took; the flag says that it was reused."""
    table = _table("stage", "result", "time")
    for manifest, reused in done:
        time = Text(duration(manifest.seconds), style="dim" if reused else "")
        table.add_row(manifest.stage, _key_metrics(manifest.metrics), time)
    spent = sum(manifest.seconds for manifest, reused in done if not reused)
    table.columns[
        1
    ].footer = f"{sum(not reused for _, reused in done)} made, {sum(r for _, r in done)} reused"
    table.columns[2].footer = duration(spent)
    console.print()
    console.print(table, soft_wrap=False)


def plan_table(steps: Sequence[Decision]) -> None:
    """What would happen, why, and how long it should take."""
    table = _table("stage", "action", "why", "time")
    for step in steps:
        style = "dim" if step.action == "reuse" else ""
        time = (
            ""
            if step.action == "reuse"
            else "unknown"
            if step.seconds is None
            else f"~{duration(step.seconds)}"
        )
        table.add_row(
            step.node.name,
            Text(step.action, style=_ACTION_STYLE[step.action]),
            step.why,
            time,
            style=style,
        )
    todo = [step for step in steps if step.action in ("run", "resume")]
    unknown = sum(step.seconds is None for step in todo)
    table.columns[2].footer = f"{len(todo)} of {len(steps)} to make"
    total = f"~{duration(sum(step.seconds or 0.0 for step in todo))}" if len(todo) > unknown else ""
    table.columns[3].footer = (
        f"{total} + {unknown} unknown" if total and unknown else total or "unknown" * bool(unknown)
    )
    console.print(table, soft_wrap=False)


def _table(*columns: str) -> Table:
    table = Table(
        box=box.SIMPLE, show_footer=True, header_style="dim", footer_style="dim", pad_edge=False
    )
    for name in columns:
        wrap = name in ("result", "why")
        table.add_column(
            name, overflow="fold", no_wrap=not wrap, justify="right" if name == "time" else "left"
        )
    return table


def _key_metrics(metrics: Mapping[str, int | float | None]) -> str:
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high")}
    shown = [item for item in metrics.items() if item[0] not in ends][:_KEY_METRICS]
    return "   ".join(
        f"{_label(name)} {_number(name, value)}{_range(name, metrics)}" for name, value in shown
    )


def _range(name: str, metrics: Mapping[str, int | float | None]) -> str:
    """Its 95 % interval, where the metrics hold one: ` (50.3% to 55.1%)`."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return (
        "" if low is None or high is None else f" ({_number(name, low)} to {_number(name, high)})"
    )


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
