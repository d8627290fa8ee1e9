"""The report page of a step before annotation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openqwen.support.files import write_text
from openqwen.support.page import environment
from openqwen.support.page.charts import LineChart


@dataclass(frozen=True)
class Section:
    """A part of the page: a table, and charts above it.

    rows: texts and numbers; a float is a share, drawn as a bar. Without rows and charts the section
    is left out.
    """

    title: str
    hint: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    charts: Sequence[LineChart | None] = field(default_factory=list)


def write_page(folder: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write report.html, which loads nothing from elsewhere."""
    page = environment(__name__.rpartition(".")[0]).get_template("step.html.j2")
    shown = [section for section in sections if section.rows or section.charts]
    text = page.render(title=title, lead=lead, sections=shown)
    write_text(folder / "report.html", text)
