"""The table and the picture of alignment_tax.py: skills lost against reward gained.

A curve is what one arm's model scored at each measurement, for each seed. All values are changes
against the arm's first measurement, which is the SFT model's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from alignment import Interval, interval

from openqwen.support.page.charts import scale, ticks
from openqwen.support.page.text import number, signed

MARKS = 5  # rewards at which a curve has an error bar
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 230, 52, 368, 34, 190
COLOURS = ("#444", "#1b7344", "#5a3fc4", "#7fb894", "#c0872b", "#b7a6ec", "#ad3720")
# Title, and whether a lower value is a loss.
SKILLS = {
    "text": "held-out text: bits per byte, change",
    "greedy": "SFT tasks, greedy: points, change",
    "sampled": "SFT tasks, sampled: points, change",
}


@dataclass(frozen=True)
class Curve:
    """An arm's measurements: for each seed, the points in the order of their steps.

    group: arms of one stage and β, which are compared with each other.
    """

    name: str
    group: str
    seeds: Sequence[Sequence[dict[str, Any]]]

    def reward(self, seed: int) -> np.ndarray:
        """The reward gained at each point, in standard deviations of the first point's rewards."""
        rewards_PN = np.array([point["reward"] for point in self.seeds[seed]])
        deviation = max(float(rewards_PN[0].std()), 1e-12)
        return (rewards_PN.mean(1) - rewards_PN[0].mean()) / deviation

    @property
    def most(self) -> float:
        """The largest reward that all seeds reach."""
        return min(float(self.reward(seed).max()) for seed in range(len(self.seeds)))

    def step_at(self, seed: int, reward: float) -> tuple[int, float]:
        """The first point with this reward, and how far it lies before it, as a share of a stretch.

        reward: at most `most`.
        """
        gained = self.reward(seed)
        later = int(np.argmax(gained >= reward - 1e-12))
        if later == 0:
            return 0, 0.0
        before, after = gained[later - 1], gained[later]
        return later, float(np.clip((after - reward) / (after - before), 0, 1))

    def change(self, skill: str, reward: float) -> np.ndarray:
        """What each item changed where a reward is reached: [seeds, items].

        text: bits per byte of all documents, as one item, since seeds hold out other documents;
        greedy, sampled: right answers.
        """
        rows = []
        for seed, points in enumerate(self.seeds):
            later, back = self.step_at(seed, reward)
            values_PN = np.array([_items(point, skill) for point in points])
            at_N = (1 - back) * values_PN[later] + back * values_PN[max(later - 1, 0)]
            rows.append(at_N - values_PN[0])
        return np.array(rows)

    def owners(self, skill: str) -> list[str]:
        """The problem of each item."""
        return ["all documents"] if skill == "text" else self.seeds[0][0]["problems"]

    def loss(self, skill: str, reward: float, against: "Curve | None" = None) -> Interval:
        """The mean change at a reward, or what it is more than another arm's at the same one."""
        change_SN = self.change(skill, reward)
        if against:
            change_SN = change_SN - against.change(skill, reward)
        return interval(change_SN, self.owners(skill))

    def final(self, values: Callable[[dict[str, Any]], np.ndarray]) -> float:
        """The mean of a value at the last points, less that at the first ones."""
        ends = [values(points[-1]).mean() - values(points[0]).mean() for points in self.seeds]
        return float(np.mean(ends))


def _items(point: dict[str, Any], skill: str) -> np.ndarray:
    if skill != "text":
        return np.array(point[skill], float)
    return np.array([sum(point["bits"]) / sum(point["bytes"])])


def groups(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The arms of each stage and β."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.group, []).append(curve)
    return found


def common_reward(arms: Sequence[Curve]) -> float:
    """The reward at which arms are compared: the largest that the first, AdamW, reaches with them.

    Arms that reach less than half of what AdamW does are left out of account.
    """
    return min([arm.most for arm in arms if arm.most >= arms[0].most / 2], default=0.0)


def table(curves: Sequence[Curve]) -> str:
    """The arms at equal reward, and at their ends, as Markdown."""
    columns = ["arm", "steps to it", *(title.split(":")[0] for title in SKILLS.values())]
    lines = []
    for group, arms in groups(curves).items():
        target = common_reward(arms)
        lines.append(f"**{group}**, where the reward has risen by {number(target)} deviations")
        lines.append("(bits per byte; points of accuracy; in brackets against the first arm):\n")
        lines.append(f"| {' | '.join(columns)} |")
        lines.append(f"|{'---|' * len(columns)}")
        for arm in arms:
            lines.append(f"| {' | '.join(_row(arm, arms[0], target))} |")
        lines.append("\nAt the last step:\n")
        ends = ["arm", "reward", "stand alone", "text", "greedy", "sampled"]
        lines += [f"| {' | '.join(ends)} |", f"|{'---|' * len(ends)}"]
        for arm in arms:
            reward = np.mean([arm.reward(seed)[-1] for seed in range(len(arm.seeds))])
            share = lambda name: lambda point: np.array(point[name], float)  # noqa: E731
            text = arm.final(lambda point: _items(point, "text"))
            points = [100 * arm.final(share(name)) for name in ("style", "greedy", "sampled")]
            cells = [arm.name, signed(reward, 2), signed(points[0], 1), signed(text, 4)]
            lines.append(f"| {' | '.join([*cells, *(signed(p, 1) for p in points[1:])])} |")
        lines.append("")
    return "\n".join(lines)


def _row(arm: Curve, first: Curve, target: float) -> list[str]:
    """An arm at equal reward."""
    if arm.most < target:
        return [arm.name, f"reaches {number(arm.most)}", "–", "–", "–"]
    steps = []
    for seed, points in enumerate(arm.seeds):
        later, back = arm.step_at(seed, target)
        here, before = points[later]["step"], points[max(later - 1, 0)]["step"]
        steps.append((1 - back) * here + back * before)
    cells = [arm.name, f"{np.mean(steps):.0f}"]
    for skill in SKILLS:
        cell = _shown(skill, arm.loss(skill, target))
        if arm is not first:
            cell += f" ({_shown(skill, arm.loss(skill, target, first))})"
        cells.append(cell)
    return cells


def _shown(skill: str, value: Interval) -> str:
    factor, digits = (1.0, 4) if skill == "text" else (100.0, 1)
    mean, low, high = (signed(factor * end, digits) for end in value)
    return f"{mean} [{low}, {high}]"


STYLE = """<style>
svg{background:#fbfaf7;font:11px system-ui,sans-serif;fill:#1e1d22}
.grid{stroke:#e3e0d9}.axis{stroke:#63616b}.title{font-weight:600}.dim{fill:#63616b}
polyline{fill:none;stroke-width:1.6}
@media (prefers-color-scheme:dark){svg{background:#131317;fill:#e8e6e1}.grid{stroke:#2d2d34}}
</style>"""


def draw(curves: Sequence[Curve]) -> str:
    """The picture, SVG: a row for each stage and β, a panel for each skill."""
    parts, rows = [], groups(curves)
    names = list(dict.fromkeys(curve.name for curve in curves))
    colours = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    for row, arms in enumerate(rows.values()):
        for column, skill in enumerate(SKILLS):
            panel = "".join(_panel(arms, skill, colours))
            parts.append(f'<g transform="translate({column * WIDTH},{row * HEIGHT})">{panel}</g>')
    below = len(rows) * HEIGHT + 16
    for n, name in enumerate(names):
        x, y = 52 + n % 3 * WIDTH, below + n // 3 * 18
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 10}" y="{y}">{name}</text>')
    width, height = len(SKILLS) * WIDTH, below + (len(names) - 1) // 3 * 18 + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return "\n".join([head, STYLE, *parts, "</svg>\n"])


def _panel(arms: Sequence[Curve], skill: str, colours: dict[str, str]) -> list[str]:
    """One skill's curves of one group, with error bars, in a picture of WIDTH × HEIGHT."""
    factor = 1.0 if skill == "text" else 100.0
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for arm in arms:
        rewards = np.linspace(0, max(arm.most, 0), MARKS + 1)
        told = [(float(r), arm.loss(skill, float(r))) for r in rewards]
        lines[arm.name] = [(r, Interval(*(factor * end for end in value))) for r, value in told]
    values = [end for told in lines.values() for _, value in told for end in value]
    furthest = max(told[-1][0] for told in lines.values()) or 1.0
    # Intervals over few seeds may be very wide: the curves decide what is seen.
    means = [value.mean for told in lines.values() for _, value in told]
    room = 2 * (max(means) - min(means)) or 1.0
    low, high = max(min(values), min(means) - room), min(max(values), max(means) + room)
    across, up = scale(0, furthest, LEFT, RIGHT), scale(low, high, BOTTOM, TOP)
    clip = lambda value: min(max(up(value), TOP), BOTTOM)  # noqa: E731
    parts = [f'<text class="title" x="{LEFT}" y="14">{arms[0].group}</text>']
    parts.append(f'<text class="dim" x="{LEFT}" y="27">{SKILLS[skill]}</text>')
    for y in ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
        )
        label = f'<text x="{LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>'
        parts.append(label)
    for x in ticks(0, furthest):
        parts.append(
            f'<text x="{across(x):.1f}" y="{BOTTOM + 14}" text-anchor="middle">{x:.4g}</text>'
        )
    axis = f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    legend = (
        f'<text class="dim" x="{RIGHT}" y="{BOTTOM + 28}" text-anchor="end">reward gained</text>'
    )
    parts += [axis, legend]
    for place, (name, told) in enumerate(lines.items()):
        places = " ".join(f"{across(r):.1f},{clip(value.mean):.1f}" for r, value in told)
        parts.append(f'<polyline stroke="{colours[name]}" points="{places}"/>')
        for r, value in told[1:]:
            x = across(r) + 1.5 * (
                place - len(lines) / 2
            )  # bars of two arms do not hide each other
            if math.isfinite(value.low):
                parts.append(
                    f'<line stroke="{colours[name]}" x1="{x:.1f}" x2="{x:.1f}"'
                    f' y1="{clip(value.low):.1f}" y2="{clip(value.high):.1f}"/>'
                )
    return parts
