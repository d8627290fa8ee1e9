"""`openqwen plan RECIPE --gpus 8xH100`: memory, speed and time of each stage that trains."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from openqwen.model import ModelConfig
from openqwen.recipe.capacity import (
    DEVICES,
    GIB,
    MOST_DEVICES,
    USABLE,
    Device,
    Setting,
    memory,
    smallest_change,
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
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.parallel.degrees import faults
from openqwen.train.preferences import COMPARED
from openqwen.train.pretrain import network_config

# Bytes of a frozen weight under adapters, with the scales of its block.
_FROZEN = {"none": 4.0, "int8": 1.06, "int4": 0.56}
_WIDTH = 180  # characters: the table is printed whole, in narrower terminals too


@dataclass(frozen=True)
class Training:
    """A stage that trains; tokens: how many it trains on, 0 where the recipe does not say."""

    name: str
    config: Any
    effort: Effort
    tokens: float

    @property
    def context(self) -> float:
        """The mean number of tokens before a token in its row."""
        rows = self.effort.rows
        return sum(length / 2 * tokens for length, tokens in rows.items()) / sum(rows.values())


def plan(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
    gpus: str = "1xH100",
    model: str | None = None,
) -> None:
    """Print the memory of one device by part, the speed and the time of each stage that trains.

    Where a stage does not fit, the smallest usual change that makes it fit is printed below it.

    Args:
        recipe: A YAML file, or the name of a shipped one.
        gpus: Number and kind: 8xH100, 4xA100-40, A100-80, H200, L40S, 4090;
            cpu is this machine.
        model: A published model in place of the recipe's network, such as qwen2.5-7b.
    """
    settings: Any = load_settings(find_recipe(recipe), recipe_class())
    if model:
        network = ModelConfig.named(model)
    else:
        network = network_config(settings.pretrain, settings.tokenizer.vocabulary)
    count, name, device = _devices(gpus)
    table = _table()
    advice = []
    for stage in trainings(settings):
        setting = _setting(stage, network, count)
        _add_row(table, stage, network, setting, device, "as written")
        if faults(setting.parallel, network, count):
            continue
        changed = smallest_change(network, setting, device)
        if changed is None:
            advice.append(f"{stage.name} does not fit on {MOST_DEVICES:,} of these devices either.")
        elif changed != setting:
            _add_row(table, stage, network, changed, device, "would fit")
    weights = _amount(network.parameters())
    title = f"{weights} weights on {count} x {name}, {device.memory:.0f} GiB each"
    console.print(f"{title}; {USABLE:.0%} of it can be used", markup=False)
    Console(width=max(console.width, _WIDTH)).print(table)
    for line in advice:
        console.print(line, markup=False)
    console.print(
        "This is an estimate. Columns: GiB on one device in float32 (acts: activations, scores: "
        f"logits, buffers: gathered weights). Speed: arithmetic at {device.share:.0%} of "
        f"{device.flops / 1e12:.3g} TFLOPS; reading data and generation are not counted. "
        f"Assumed: {CONVERSATION} tokens in a demonstration, {COMPARED} in a prompt with its "
        "answers. A row without a time: the recipe does not say how much data there is; divide "
        "your tokens by the speed. Less memory: --STAGE.train.method adamw8bit, "
        "--STAGE.lora.rank 16, a smaller --STAGE.max-length.",
        markup=False,
    )


def _devices(text: str) -> tuple[int, str, Device]:
    """Return count, name and device of `8xH100`."""
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", text)
    count, name = (int(match[1] or 1), match[2]) if match else (0, text)
    if count and name.lower() == "cpu":
        here = Device(free_memory() / GIB / count, peak_flops(best_device()), SHARE, 5e9)
        return count, "cpu", here
    if not count or name.upper() not in DEVICES:
        near = suggestion(name, DEVICES)
        known = f"give a number and a kind, such as 8xH100; known: {', '.join(DEVICES)}, cpu"
        raise OpenQwenError(f"There is no device '{text}'.{near}", "--gpus", known)
    return count, name.upper(), DEVICES[name.upper()]


def trainings(recipe: Any) -> Iterator[Training]:
    """Yield the stages of a recipe that train on several devices."""
    for node in nodes_of(recipe):
        if node.stage.trains_on_ranks and node.stage.estimate:
            effort = node.stage.estimate(recipe, node.inputs)
            known = effort.data_from is None or effort.data_from in recipe.model_fields_set
            tokens = sum(effort.rows.values()) if known else 0.0
            yield Training(node.name, node.config, effort, tokens)


def _setting(stage: Training, network: ModelConfig, count: int) -> Setting:
    """Return how the recipe computes a step of this stage."""
    train, lora = stage.config.train, getattr(stage.config, "lora", None)
    trained, frozen = 1.0, 4.0
    if lora is not None and lora.rank:
        trained, frozen = _adapters(network, lora.rank), _frozen(network, lora.base)
    effort = stage.effort
    return Setting(
        devices=count,
        parallel=train.parallel,
        recompute=train.recompute,
        micro_tokens=effort.micro_tokens,
        longest=effort.longest,
        trained=trained,
        moments=(BYTES if train.method == "adamw8bit" else 8.0) + _merging(train),
        frozen=frozen,
        others=effort.beside,
        generates=effort.answers > 0,
    )


def _adapters(network: ModelConfig, rank: int) -> float:
    """Return the share of adapters in all weights: rank x (rows + columns) for each matrix."""
    h, kv = network.hidden_size, network.num_key_value_heads * network.head_dim
    sides = 2 * (h + h) + 2 * (h + kv) + 3 * (h + network.intermediate_size)
    return network.num_hidden_layers * rank * sides / network.parameters()


def _merging(train: OptimizerConfig) -> float:
    """Return the bytes that Online Merging keeps for each trained weight."""
    return train.merging.bytes_per_weight if train.merging.base else 0.0


def _frozen(network: ModelConfig, base: str) -> float:
    """Return the mean bytes of a frozen weight; the vocabulary's tables are never quantised."""
    table = network.vocab_size * network.hidden_size
    tables = (1 if network.tie_word_embeddings else 2) * table / network.parameters()
    return tables * 4.0 + (1 - tables) * _FROZEN[base]


def _add_row(
    table: Table, stage: Training, network: ModelConfig, setting: Setting, device: Device, what: str
) -> None:
    wrong = faults(setting.parallel, network, setting.devices)
    if wrong:
        table.add_row(stage.name, what, _how(setting), *[""] * 7, f"[red]{wrong[0][0]}[/]")
        return
    needed = memory(network, setting)
    fits = device.holds(needed)
    parts = [f"{value / GIB:.1f}" for value in vars(needed).values()]
    total = f"[{'green' if fits else 'red'}]{needed.total / GIB:.1f}[/]"
    speed = tokens_per_second(network, setting, device, stage.context)
    time = f"{speed:,.0f} tokens/s"
    if stage.tokens:
        seconds = stage.tokens / speed
        hours = seconds * setting.devices / 3600
        time += f"; {_amount(stage.tokens)} tokens: {duration(seconds)}"
        time += f", {hours:,.1f} device hours" if hours >= 0.05 else ""
    time = time if fits else "[red]does not fit[/]"
    table.add_row(stage.name, what, _how(setting), *parts, total, time)


def _amount(number: float) -> str:
    """`400,000`, `1.5M`, `18T`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.4g}{unit}"
    return f"{number:,.0f}"


def _how(setting: Setting) -> str:
    """Describe a setting in the words of its configuration."""
    degrees = [f"{name} {n}" for name, n in setting.parallel.model_dump().items() if n > 1]
    again = [f"recompute {setting.recompute}"] if setting.recompute != "nothing" else []
    micro = f"micro_tokens {setting.micro_tokens:,}"
    return ", ".join([f"{setting.devices} x", *degrees, *again, micro])


def _table() -> Table:
    table = Table(box=box.SIMPLE, header_style="dim", pad_edge=False)
    for name in ("stage", "", "how"):
        table.add_column(name, no_wrap=name != "how", min_width=36 if name == "how" else None)
    for name in ("weights", "grads", "moments", "acts", "scores", "buffers", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table
