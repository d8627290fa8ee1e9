"""The lineage as a picture: what was made from what. `templates/charts.html.j2` draws it."""

from dataclasses import dataclass

from openqwen.recipe.report.run import EVALUATE, FinishedStage, Run

_BOX, _HIGH = 196, 50  # width and height of a box
_ACROSS, _DOWN = 272, 74  # distance of columns and of rows
_EDGE = 34  # margin at the left for arrows that pass other boxes
_KINDS = ("data", "model", "evaluation")
_DATA, _MODEL, _EVALUATION = 0, 1, 2


@dataclass(frozen=True)
class Box:
    """A stage's place in the grid: a column for its kind, and a row below its inputs."""

    stage: FinishedStage
    column: int
    row: int

    @property
    def x(self) -> int:
        return _EDGE + self.column * _ACROSS

    @property
    def y(self) -> int:
        return 26 + self.row * _DOWN

    @property
    def kind(self) -> str:
        return _KINDS[self.column]


@dataclass(frozen=True)
class Picture:
    """The drawing: boxes, headings with their x, and arrows (an SVG path, whether it is faint)."""

    width: int
    height: int
    headings: list[tuple[str, int]]
    boxes: list[Box]
    arrows: list[tuple[str, bool]]


def draw_lineage(run: Run) -> Picture | None:
    """Return stages as boxes with arrows from their inputs, or None without stages.

    An arrow is faint where a longer path implies it. Evaluations have arrows from models only; the
    page's table of inputs lists the corpus, the tokenizer and so on.
    """
    boxes = _places(run)
    if not boxes:
        return None
    arrows = [
        (_arrow(boxes[name], box), faint)
        for box in boxes.values()
        for name, faint in _inputs(boxes, run, box)
    ]
    return Picture(
        width=_EDGE + 2 * _ACROSS + _BOX + 4,
        height=max(box.y for box in boxes.values()) + _HIGH + 6,
        headings=[
            (name, _EDGE + i * _ACROSS) for i, name in enumerate(("data", "models", "evaluation"))
        ],
        boxes=list(boxes.values()),
        # Faint arrows come first and are drawn below the others.
        arrows=sorted(arrows, key=lambda arrow: not arrow[1]),
    )


def _places(run: Run) -> dict[str, Box]:
    """Place each stage below its inputs, or beside them if its column is further right.

    An evaluation stands beside the stage that it evaluates.
    """
    boxes: dict[str, Box] = {}
    taken: set[tuple[int, int]] = set()
    for stage in run.stages:
        column = _EVALUATION if stage.is_evaluation else _MODEL if stage.is_model else _DATA
        subject = boxes.get(stage.name.removeprefix(EVALUATE))
        inputs = [subject] if subject else [boxes[name] for name in stage.inputs if name in boxes]
        row = max((box.row + (box.column >= column) for box in inputs), default=0)
        while (column, row) in taken:
            row += 1
        taken.add((column, row))
        boxes[stage.name] = Box(stage, column, row)
    return boxes


def _inputs(boxes: dict[str, Box], run: Run, box: Box) -> list[tuple[str, bool]]:
    """Return (input, whether other inputs imply it) for each arrow that ends at a box."""
    inputs = [name for name in box.stage.inputs if name in boxes]
    implied = set().union(*(_ancestors(run, name) for name in inputs))
    if box.column == _EVALUATION:
        models = [name for name in inputs if boxes[name].column == _MODEL]
        return [(name, False) for name in models if name not in implied]
    return [(name, name in implied) for name in inputs]


def _ancestors(run: Run, name: str) -> set[str]:
    stage = run.stage(name)
    inputs = stage.inputs if stage else []
    return set(inputs).union(*(_ancestors(run, given) for given in inputs))


def _arrow(source: Box, target: Box) -> str:
    """Return a straight path between neighbours, else a curve through the space between columns."""
    if source.column == target.column:
        return _same_column(source, target)
    right = target.column > source.column
    x1, x2 = (source.x + _BOX, target.x) if right else (source.x, target.x + _BOX)
    y1, y2 = source.y + _HIGH / 2, target.y + _HIGH / 2
    if y1 != y2:  # the middle of the edge is for the arrow along the row
        y1, y2 = y1 + 9, y2 - 9
    bend = 44 if right else -44
    return f"M{x1},{y1} C{x1 + bend},{y1} {x2 - bend},{y2} {x2},{y2}"


def _same_column(source: Box, target: Box) -> str:
    if target.row == source.row + 1:
        x = source.x + _BOX / 2
        return f"M{x},{source.y + _HIGH} L{x},{target.y}"
    y1, y2 = source.y + _HIGH / 2 + 9, target.y + _HIGH / 2 - 9
    side = source.x if source.column == _DATA else source.x + _BOX
    bulge = min(14 + 8 * abs(target.row - source.row), 44)
    reach = side - bulge if source.column == _DATA else side + bulge
    return f"M{side},{y1} C{reach},{y1} {reach},{y2} {side},{y2}"
