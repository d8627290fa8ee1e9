"""`openqwen plan RECIPE --gpus 8xH100`: what fits, how fast, and how long, for each stage that
trains.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from openqwen.model import ModelConfig
from openqwen.recipe.capacity import (
    DEVICES,
    GIB,
    USABLE,
    Device,
    Setting,
    best,
    memory,
    tokens_per_second,
)
from openqwen.recipe.estimate import SHARE
from openqwen.recipe.graph import nodes_of, recipe_class
from openqwen.recipe.settings import find_recipe, load_settings
from openqwen.support.device import best_device, free_memory, peak_flops
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.progress import console, duration
from openqwen.support.stage import CONVERSATION, Effort
from openqwen.train.eight_bit import BYTES
from openqwen.train.parallel.degrees import faults
from openqwen.train.preferences import COMPARED
from openqwen.train.pretrain import network_config

_MOST = 4_096  # devices
_PACKED = {
    "none": 4.0,
    "int8": 1.06,
    "int4": 0.56,
}  # bytes of a matrix's number under adapters, scales included
_WIDTH = 150  # characters: a table cut off tells nothing


@dataclass(frozen=True)
class Training:
    """A stage that trains, for the planner. tokens: that it trains on, 0 where the recipe does not
    say.
    """

    name: str
    config: Any
    effort: Effort
    tokens: float

    @property
    def context(self) -> float:
        """Tokens before a token in its row, in the mean."""
        rows = self.effort.rows
        return sum(length / 2 * tokens for length, tokens in rows.items()) / sum(rows.values())


def plan(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
    gpus: str = "1xH100",
    model: str | None = None,
) -> None:
    """Print, for each stage that trains: memory of a device by part, as the recipe says and at its
    fastest; time.

    Args:
        recipe: A YAML file, or the name of a shipped one.
        gpus: Number and kind: 8xH100, 4xA100-40, A100-80, H200, L40S, 4090;
            cpu is this machine.
        model: A published model in place of the recipe's network, such as qwen2.5-7b.
    """
    settings: Any = load_settings(find_recipe(recipe), recipe_class())
    network = (
        ModelConfig.named(model)
        if model
        else network_config(settings.pretrain, settings.tokenizer.vocabulary)
    )
    count, name, device = _devices(gpus)
    table = _table()
    advice = []
    for stage in trainings(settings):
        told = _setting(stage, network, count)
        found = best(network, told, device, stage.context)
        _row(table, stage, network, told, device, "as told")
        if found is not None and found != told:
            _row(table, stage, network, found, device, "fastest")
        if found is None:
            ways = [f"  {way}" for way in _ways(stage, network, told, device, packed=name == "cpu")]
            head = "It would with" if ways else "Take devices with more memory."
            advice += [f"{stage.name} does not fit on {count} x {name}. {head}", *ways]
    title = (
        f"{_amount(network.parameters())} weights on {count} x {name}, {device.memory:.0f} GiB each"
    )
    console.print(f"{title}; {USABLE:.0%} of it can be used", markup=False)
    Console(width=max(console.width, _WIDTH)).print(table)
    for line in advice:
        console.print(line, markup=False)
    console.print(
        "An estimate. GiB of one device in float32: weights, gradients, optimizer states, "
        "activations, scores of the "
        f"vocabulary, what is gathered to work on. Time: arithmetic at {device.share:.0%} of "
        f"{device.flops / 1e12:.3g} "
        "TFLOPS, with the links at their makers' word; data and generation are not in it. "
        f"Assumed: {CONVERSATION} tokens in a demonstration, {COMPARED} in a prompt with its "
        "answers. "
        "A rate alone: the recipe does not say how many tokens; divide those of your data by it.",
        markup=False,
    )


def _devices(text: str) -> tuple[int, str, Device]:
    """Count, name and device of `8xH100`."""
    number, name = re.fullmatch(r"(?:(\d+)x)?(.+)", text).groups()  # type: ignore[union-attr]
    if name.lower() == "cpu":
        here = Device(free_memory() / GIB / int(number or 1), peak_flops(best_device()), SHARE, 5e9)
        return int(number or 1), "cpu", here
    if name.upper() not in DEVICES or number == "0":
        near = suggestion(name, DEVICES)
        known = f"such as 8xH100; {', '.join(DEVICES)}, cpu"
        raise OpenQwenError(f"No device '{text}' is known.{near}", "--gpus", known)
    return int(number or 1), name.upper(), DEVICES[name.upper()]


def trainings(recipe: Any) -> Iterator[Training]:
    """The stages of a recipe that train on many devices."""
    for node in nodes_of(recipe):
        if node.stage.trains_on_ranks and node.stage.estimate:
            effort = node.stage.estimate(recipe, node.inputs)
            known = effort.data_from is None or effort.data_from in recipe.model_fields_set
            yield Training(
                node.name, node.config, effort, sum(effort.rows.values()) if known else 0.0
            )


def _setting(stage: Training, network: ModelConfig, count: int) -> Setting:
    """As the recipe says."""
    train, lora = stage.config.train, getattr(stage.config, "lora", None)
    trained, frozen = 1.0, 4.0
    if lora is not None and lora.rank:
        trained, frozen = _adapters(network, lora.rank), _frozen(network, lora.base)
    effort = stage.effort
    # Over several devices, the network that answers is a whole copy of the one that trains.
    others = float(effort.beside + (effort.answers > 0 and count > 1))
    moments = BYTES if train.method == "adamw8bit" else 8.0
    return Setting(
        count,
        train.parallel,
        train.recompute,
        effort.micro_tokens,
        effort.longest,
        trained,
        moments,
        frozen,
        others,
    )


def _adapters(network: ModelConfig, rank: int) -> float:
    """The share of all weights that adapters are: of each matrix, rank x (rows + columns)."""
    h, kv = network.hidden_size, network.num_key_value_heads * network.head_dim
    sides = 2 * (h + h) + 2 * (h + kv) + 3 * (h + network.intermediate_size)
    return network.num_hidden_layers * rank * sides / network.parameters()


def _frozen(network: ModelConfig, base: str) -> float:
    """Bytes of a weight that does not learn, in the mean; the vocabulary's tables are never
    quantised.
    """
    tables = (
        (1 if network.tie_word_embeddings else 2)
        * network.vocab_size
        * network.hidden_size
        / network.parameters()
    )
    return tables * 4.0 + (1 - tables) * _PACKED[base]


def _row(
    table: Table, stage: Training, network: ModelConfig, setting: Setting, device: Device, what: str
) -> None:
    how = _how(setting)
    wrong = faults(setting.parallel, network, setting.devices)
    if wrong:
        table.add_row(stage.name, what, how, *[""] * 7, f"[red]{wrong[0][0]}[/]")
        return
    held = memory(network, setting)
    fits = held.total <= USABLE * device.memory * GIB
    parts = [f"{value / GIB:.1f}" for value in vars(held).values()]
    total = f"[{'green' if fits else 'red'}]{held.total / GIB:.1f}[/]"
    speed = tokens_per_second(network, setting, device, stage.context)
    time = f"{speed:,.0f} tokens/s"
    if stage.tokens:
        seconds = stage.tokens / speed
        hours = seconds * setting.devices / 3600
        time += f"; {_amount(stage.tokens)} tokens: {duration(seconds)}"
        time += f", {hours:,.1f} device hours" if hours >= 0.05 else ""
    table.add_row(stage.name, what, how, *parts, total, time if fits else "[red]does not fit[/]")


def _amount(number: float) -> str:
    """`400,000`, `1.5M`, `18T`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.4g}{unit}"
    return f"{number:,.0f}"


def _how(setting: Setting) -> str:
    """The levers of a setting, in the words of its configuration."""
    degrees = [f"{name} {n}" for name, n in setting.parallel.model_dump().items() if n > 1]
    again = [f"recompute {setting.recompute}"] if setting.recompute != "nothing" else []
    return ", ".join([*degrees, *again, f"micro {setting.micro_tokens:,}"])


def _ways(
    stage: Training, network: ModelConfig, setting: Setting, device: Device, packed: bool
) -> Iterator[str]:
    """What would make it fit, one lever at a time, and as much less to a row as it takes. With
    each, all divisions, recomputations and micro-batches are tried, and the fastest is told.
    packed: whether a base may be quantised."""

    levers = {"": setting, "method adamw8bit (moments in 8 bits)": replace(setting, moments=BYTES)}
    if hasattr(stage.config, "lora"):
        few = replace(setting, trained=min(setting.trained, _adapters(network, 16)))
        levers["lora.rank 16 (adapters)"] = few
        if packed:
            levers["lora.rank 16, lora.base int4"] = replace(few, frozen=_frozen(network, "int4"))
    counts = [
        setting.devices << n for n in range(1, _MOST.bit_length()) if setting.devices << n <= _MOST
    ]
    levers |= {f"{count} of these devices": replace(setting, devices=count) for count in counts}
    reached = 0  # the longest rows that the devices tried so far take
    for lever, changed in levers.items():
        more = changed.devices > setting.devices
        for rows in (
            n for n in (setting.longest, 4_096, 1_024) if reached * more < n <= setting.longest
        ):
            shorter = replace(changed, longest=rows, micro_tokens=min(rows, changed.micro_tokens))
            if fits := best(network, shorter, device, stage.context):
                cut = f"rows of at most {rows:,} tokens" if rows < setting.longest else ""
                yield f"{' and '.join(filter(None, (lever, cut)))}: {_how(fits)}"
                reached = rows if more else reached
                break


def _table() -> Table:
    table = Table(box=box.SIMPLE, header_style="dim", pad_edge=False)
    for name in ("stage", "", "how"):
        table.add_column(name, no_wrap=name != "how")
    for name in ("weights", "grads", "moments", "acts", "scores", "buffers", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table
