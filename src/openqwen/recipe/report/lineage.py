"""The lineage as a picture: what was made from what."""

from dataclasses import dataclass

from markupsafe import Markup

from openqwen.recipe.report.run import EVALUATE, Run, Stage
from openqwen.recipe.report.text import duration, visible

_BOX, _HIGH = 196, 50
_ACROSS, _DOWN = 272, 74
_EDGE = 34  # room at the left for arrows that pass by other boxes
_DATA, _MODEL, _EVALUATION = 0, 1, 2


@dataclass(frozen=True)
class Box:
    """A stage's place in the grid: data, models and evaluations are columns, rows follow the inputs."""

    stage: Stage
    column: int
    row: int

    @property
    def x(self) -> int:
        return _EDGE + self.column * _ACROSS

    @property
    def y(self) -> int:
        return 26 + self.row * _DOWN


def draw_lineage(run: Run) -> Markup | None:
    """Stages as boxes, arrows from inputs; None where there are none.

    An arrow that longer ways already imply is faint. At an evaluation only the models end in arrows: each reads the
    corpus, the tokenizer and so on as well, and the page's table of inputs has them all.
    """
    boxes = _places(run)
    if not boxes:
        return None
    parts = [
        _arrow(boxes[source], box, faint) for box in boxes.values() for source, faint in _drawn_inputs(boxes, run, box)
    ]
    parts.sort(key=lambda part: "faint" not in part)  # faint ones first, so that they lie below
    parts += [_heading(column, name) for column, name in enumerate(("data", "models", "evaluation"))]
    parts += [_box(box) for box in boxes.values()]
    width = _EDGE + 2 * _ACROSS + _BOX + 4
    height = max(box.y for box in boxes.values()) + _HIGH + 6
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0,0.5 L8,4 L0,7.5 z"/></marker></defs>'
    )
    svg = '<svg class="lineage" viewBox="0 0 {} {}" width="{}" role="img" aria-label="Lineage of the stages">{}{}</svg>'
    return Markup(svg).format(width, height, width, Markup(marker), Markup("").join(parts))


def _places(run: Run) -> dict[str, Box]:
    """A stage stands below its inputs, or right of them in the same row where its column is further right.

    An evaluation stands beside the stage that it looks at.
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


def _drawn_inputs(boxes: dict[str, Box], run: Run, box: Box) -> list[tuple[str, bool]]:
    """(input, whether other inputs already imply it) for the arrows that end at a box."""
    inputs = [name for name in box.stage.inputs if name in boxes]
    implied = set().union(*(_ancestors(run, name) for name in inputs))
    if box.column == _EVALUATION:
        return [(name, False) for name in inputs if boxes[name].column == _MODEL and name not in implied]
    return [(name, name in implied) for name in inputs]


def _ancestors(run: Run, name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        stage = run.stage(waiting.pop())
        new = [given for given in (stage.inputs if stage else []) if given not in found]
        found.update(new)
        waiting += new
    return found


def _arrow(source: Box, target: Box, faint: bool) -> Markup:
    """Straight between neighbours, otherwise a curve through the space between the columns."""
    if source.column == target.column:
        path = _same_column(source, target)
    else:
        right = target.column > source.column
        x1, x2 = (source.x + _BOX, target.x) if right else (source.x, target.x + _BOX)
        y1, y2 = source.y + _HIGH / 2, target.y + _HIGH / 2
        if y1 != y2:  # keep the middle of the edge for the arrow along the row
            y1, y2 = y1 + 9, y2 - 9
        bend = 44 if right else -44
        path = f"M{x1},{y1} C{x1 + bend},{y1} {x2 - bend},{y2} {x2},{y2}"
    return Markup('<path class="arrow{}" d="{}" marker-end="url(#head)"/>').format(" faint" if faint else "", path)


def _same_column(source: Box, target: Box) -> str:
    if target.row == source.row + 1:
        x = source.x + _BOX / 2
        return f"M{x},{source.y + _HIGH} L{x},{target.y}"
    y1, y2 = source.y + _HIGH / 2 + 9, target.y + _HIGH / 2 - 9
    side = source.x if source.column == _DATA else source.x + _BOX
    bulge = min(14 + 8 * abs(target.row - source.row), 44)
    reach = side - bulge if source.column == _DATA else side + bulge
    return f"M{side},{y1} C{reach},{y1} {reach},{y2} {side},{y2}"


def _heading(column: int, name: str) -> Markup:
    return Markup('<text class="heading" x="{}" y="14">{}</text>').format(_EDGE + column * _ACROSS, name)


def _box(box: Box) -> Markup:
    stage = box.stage
    state = "stale" if stage.stale else {None: "", True: "reused", False: "made now"}[stage.reused]
    kind = ("data", "model", "evaluation")[box.column]
    facts = f"{duration(stage.seconds)}{' · ' + state if state else ''}"
    svg = (
        '<g class="stage {} {}"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="7"/>'
        '<text class="name" x="{}" y="{}">{}</text><text class="digest" x="{}" y="{}">{}</text>'
        '<text class="facts end" x="{}" y="{}">{}</text></g>'
    )
    made_from = f"{stage.name} from {', '.join(stage.inputs) or 'raw input'}"
    left, right, first, second = box.x + 11, box.x + _BOX - 11, box.y + 21, box.y + 39
    return Markup(svg).format(
        kind, state.split(" ")[0], visible(made_from), box.x, box.y, _BOX, _HIGH,
        left, first, visible(stage.name), left, second, visible(stage.digest[:8]), right, second, facts,
    )  # fmt: skip
