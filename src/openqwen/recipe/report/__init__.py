"""The report of a run: one self-contained HTML file, made from the run's artifacts."""

from pathlib import Path
from typing import Any

from openqwen.recipe.graph import last_chat_model
from openqwen.recipe.report import data, reward, scores, training
from openqwen.recipe.report.lineage import draw_lineage
from openqwen.recipe.report.run import Run, load_run
from openqwen.support.command import command
from openqwen.support.files import write_text
from openqwen.support.page import environment


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, atomically, and return its path.

    Stages that have not run are left out. The page depends on the artifacts alone, so the same
    artifacts give the same bytes. Raises OpenQwenError if the folder is missing or an artifact's
    JSON is damaged.
    """
    run = load_run(Path(run_folder))
    page = environment(__name__).get_template("page.html.j2").render(_contents(run))
    target = run.folder / "report.html"
    write_text(target, page)
    return target


def finish(run_folder: Path) -> list[str]:
    """Write the report, and return the lines that a run prints at its end."""
    lines = [f"report   {write_report(run_folder)}"]
    if chat := last_chat_model(run_folder):
        lines.append(f"chat     {command('chat', chat)}")
    return lines


def _contents(run: Run) -> dict[str, Any]:
    """Return the content of each section; a section without artifacts is None or empty."""
    return {
        "run": run,
        "headlines": scores.headlines(run),
        "lineage": draw_lineage(run),
        "table": scores.score_table(run),
        "gains": scores.gain_table(run),
        "tasks": scores.task_table(run),
        "pair_tasks": sorted((run.scores("reward").get("pair_accuracy_by_task") or {}).items()),
        "reward": reward.reward_section(run),
        "source_scores": scores.source_table(run),
        "positions": scores.position_table(run),
        "curves": training.curves(run),
        "corpus": data.corpus(run),
        "tokenizer": run.json("tokenizer", "statistics.json"),
        "demonstrations": data.demonstrations(run),
        "preferences": data.preferences(run),
        "samples": data.samples(run),
    }
