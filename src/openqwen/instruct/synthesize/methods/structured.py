"""The `synthesize structured` method: questions about tables, with answers in JSON.

Qwen2.5 report, section 4.1. The model writes a question with a JSON schema of the answer: to
compute, to verify a statement, to correct a value, or to restructure rows. Answers are checked
against the schema; the JSON value that most of them give counts as right; critique and refinement
are those of `reasoning`.
"""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.method import Item, Steps, Work
from openqwen.instruct.synthesize.methods.reasoning import Voted, VotedConfig, VotedProblem
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError
from openqwen.support.records import read_records
from openqwen.support.stage import Stage, StageRun

try:
    import jsonschema_rs
except ImportError:  # an extra
    jsonschema_rs = None  # type: ignore[assignment]

_KINDS = ("compute", "verify", "correct", "extract")
_FORMATS = ("markdown", "csv", "json")
_WIDEST = 200  # characters of a cell that are shown


class StructuredConfig(VotedConfig):
    """How tables are shown."""

    rows: int = Field(20, ge=1, description="rows of a table that one question is about")
    columns: int = Field(12, ge=1, description="most columns that are shown")
    questions: int = Field(1, ge=1, description="questions about each piece of a table")


class Structured(Voted):
    """One item a piece of a table."""

    name = "structured"

    def __init__(self, config: StructuredConfig, source: Path):
        super().__init__(config)
        self.source = source
        if jsonschema_rs is None:
            what = "Checking JSON against a schema needs the library jsonschema-rs."
            raise OpenQwenError(what, do=pip_install("openqwen[synthesize]"))

    def items(self) -> Iterable[Item]:
        """Pieces of `rows` rows, each as often as there are questions."""
        piece: list[dict[str, Any]] = []
        number = 0
        for row in self._rows():
            piece.append(row)
            if len(piece) == self.config.rows:
                yield from self._questions(piece, number)
                piece, number = [], number + 1
        if piece:
            yield from self._questions(piece, number)

    def _questions(self, piece: list[dict[str, Any]], number: int) -> Iterable[Item]:
        for question in range(self.config.questions):
            fault = "" if any(piece) else "rows without columns"
            yield Item(f"{self.source.name}#{number}/{question}", list(piece), fault)

    def _rows(self) -> Iterable[dict[str, Any]]:
        if self.source.suffix.lower() not in (".csv", ".tsv"):
            yield from (record for _, record in read_records(self.source))
            return
        try:
            with open(self.source, encoding="utf-8-sig", newline="") as file:
                tabs = self.source.suffix.lower() == ".tsv"
                for row in csv.DictReader(file, delimiter="\t" if tabs else ","):
                    yield {str(key): value for key, value in row.items() if key is not None}
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise OpenQwenError(f"This table cannot be read: {error}", self.source) from None

    def problem(self, item: Item, work: Work) -> Steps[VotedProblem | None]:
        """Write a question about a table, with the schema of its answer."""
        kind, form = (str(work.rng.choice(names)) for names in (_KINDS, _FORMATS))
        table = as_text(item.data, form, self.config.columns)
        prompt = work.messages("ask", table=table, kind=kind)
        (output,) = yield from work.ask([prompt], self.config.free)
        value = reading.json_value(output.text)
        value = value if isinstance(value, dict) else {}
        question, schema = value.get("question"), value.get("schema") or {}
        fault = reading.fault(output) or ("" if isinstance(question, str) else "no question")
        fault = fault or schema_fault(schema)
        if not work.gate("question has a schema", not fault, fault, output.text):
            return None
        text = json.dumps(schema, ensure_ascii=False)
        asked = work.messages("solve", table=table, question=question, schema=text)

        def read(answer: str) -> str | None:
            found = reading.json_value(answer)
            fits = found is not None and fits_schema(found, schema)
            return canonical(found) if work.gate("answer fits the schema", fits) else None

        return VotedProblem(asked, read, {"kind": kind, "format": form})


def as_text(rows: list[dict[str, Any]], form: str, most: int) -> str:
    """A table as Markdown, CSV or JSON Lines: the first `most` columns, long cells cut."""
    names = list(dict.fromkeys(name for row in rows for name in row))[:most]
    if form == "json":
        lines = [{name: _cell(row.get(name)) for name in names} for row in rows]
        return "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    cells = [names, *([str(_cell(row.get(name, ""))) for name in names] for row in rows)]
    if form == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(cells)
        return file.getvalue().strip()
    cells.insert(1, ["---"] * len(names))
    flat = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in flat)


def _cell(value: Any) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}…"


def schema_fault(schema: Any) -> str:
    """Why a model's schema cannot be used, or "": it must describe an object's properties."""
    if not isinstance(schema, dict) or not schema.get("properties"):
        return "no schema with properties"
    try:
        _validator(schema)
    except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
        return f"no valid schema: {str(error).splitlines()[0]}"
    return ""


def fits_schema(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid by a schema."""
    return bool(_validator(schema).is_valid(value))


def _validator(schema: dict[str, Any]) -> Any:
    def refuse(address: str) -> Any:
        raise ValueError(f"it refers to {address}")  # the schema is a model's: nothing is fetched

    # Patterns are a model's too: those that take linear time alone.
    linear = jsonschema_rs.RegexOptions()
    return jsonschema_rs.validator_for(schema, retriever=refuse, pattern_options=linear)


def canonical(value: Any) -> str:
    """JSON in one form: keys in order, 2.0 as 2."""

    def number(text: str) -> float | int:
        return int(float(text)) if float(text).is_integer() else float(text)

    return json.dumps(json.loads(json.dumps(value), parse_float=number), sort_keys=True)


def run_structured(run: StageRun) -> dict[str, float]:
    """Tables → questions with answers in JSON, as demonstrations D and preferences P."""
    return synthesize(Structured(run.config, run.inputs["tables"]), run)


STAGE = Stage(
    name="synthesize-structured",
    help="Questions about tables with answers in JSON, checked by a schema, become D and P.",
    config=StructuredConfig,
    inputs={"tables": "Rows of a table: .csv, .tsv, .jsonl, .json or .parquet."},
    outputs=["demonstrations", "preferences"],
    run=run_structured,
)
