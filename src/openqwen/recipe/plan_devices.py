"""`openqwen plan RECIPE --gpus 8xH100`: what fits, how fast, and how long, for each stage that trains."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from openqwen.model import ModelConfig
from openqwen.recipe.capacity import DEVICES, GIB, USABLE, Device, Setting, best, memory, tokens_per_second
from openqwen.recipe.estimate import COMPARED, CONVERSATION, SHARE
from openqwen.recipe.settings import find_recipe, load_settings
from openqwen.support.device import best_device, free_memory, peak_flops
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.progress import console, duration
from openqwen.train.parallel.degrees import faults
from openqwen.train.pretrain import network_config

if TYPE_CHECKING:
    from openqwen.recipe.stages import Recipe

_MOST = 4_096  # devices
_WIDTH = 150  # characters: a table cut off tells nothing


@dataclass(frozen=True)
class _Stage:
    """tokens: that it trains on. context: what a token sees, in the mean. micro, longest: tokens of the largest forward
    call and of the longest record."""

    name: str
    config: Any
    tokens: float
    context: float
    micro: int
    longest: int


def plan(recipe: str, gpus: str = "1xH100", model: str | None = None) -> None:
    """Print, for each stage that trains: memory of a device by part, as the recipe says and at its fastest; time.

    Args:
        recipe: A YAML file, or the name of a shipped one.
        gpus: How many of which device: 8xH100, 4xA100-40, A100-80, H200, L40S, 4090; cpu is this machine.
        model: A published model in place of the recipe's network, such as qwen2.5-7b.
    """
    from openqwen.recipe.stages import Recipe

    settings = load_settings(find_recipe(recipe), Recipe)
    network = ModelConfig.named(model) if model else network_config(settings.pretrain, settings.tokenizer.vocabulary)
    count, name, device = _devices(gpus)
    table = _table()
    advice = []
    for stage in _stages(settings):
        told = _setting(stage, network, count)
        found = best(network, told, device, stage.context)
        _row(table, stage, network, told, device, "as told")
        if found is not None and found != told:
            _row(table, stage, network, found, device, "fastest")
        if found is None:
            advice.append(f"{stage.name} does not fit on {count} x {name}: {_change(stage, network, told, device)}.")
    title = f"{network.parameters() / 1e9:.2f} billion weights on {count} x {name}, {device.memory:.0f} GiB each"
    console.print(f"{title}; {USABLE:.0%} of it can be used", markup=False)
    Console(width=max(console.width, _WIDTH)).print(table)
    for line in advice:
        console.print(line, markup=False)
    console.print(
        f"An estimate. GiB of one device in float32: weights, gradients, optimizer states, activations, scores of the "
        f"vocabulary, what is gathered to work on. Time: arithmetic at {device.share:.0%} of {device.flops / 1e12:.3g} "
        "TFLOPS, with the links at their makers' word; data and generation are not in it.",
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


def _stages(r: "Recipe") -> Iterator[_Stage]:
    for name, reading in (("pretrain", r.pretrain), ("extend", r.extend)):
        data = reading.data
        yield _Stage(name, reading, data.tokens, data.context / 2, max(data.micro_tokens, data.context), data.context)
    compared = r.prefer.prompts * COMPARED
    trained: dict[str, tuple[Any, float]] = {
        "sft": (r.sft, (r.instruct.demonstrations + r.instruct.repurposed) * r.sft.epochs * CONVERSATION),
        "reward": (r.reward, compared * r.reward.epochs),
        "dpo": (r.dpo, compared * (r.dpo.epochs + 1 / 3)),
        "online-dpo": (r.online_dpo, r.online_dpo.steps * r.online_dpo.batch * COMPARED),
    }
    for name, (config, tokens) in trained.items():
        longest = getattr(config, "max_length", config.micro_tokens)
        yield _Stage(name, config, tokens, CONVERSATION / 2, max(config.micro_tokens, longest), longest)


def _setting(stage: _Stage, network: ModelConfig, count: int) -> Setting:
    """As the recipe says."""
    train, lora = stage.config.train, getattr(stage.config, "lora", None)
    trained = 1.0
    if lora is not None and lora.rank:  # of each matrix, rank x (rows + columns)
        h, kv = network.hidden_size, network.num_key_value_heads * network.head_dim
        sides = 2 * (h + h) + 2 * (h + kv) + 3 * (h + network.intermediate_size)
        trained = network.num_hidden_layers * lora.rank * sides / network.parameters()
    # Beside online DPO's network: the reference and the reward model, and a copy that answers.
    others = 0.0 if stage.name != "online-dpo" else 2.0 if count == 1 else 3.0
    return Setting(count, train.parallel, train.recompute, stage.micro, stage.longest, trained, others=others)


def _row(table: Table, stage: _Stage, network: ModelConfig, setting: Setting, device: Device, what: str) -> None:
    p = setting.parallel
    degrees = [f"{name} {n}" for name, n in p.model_dump().items() if n > 1]
    again = [f"recompute {setting.recompute}"] if setting.recompute != "nothing" else []
    how = ", ".join([*degrees, *again, f"micro {setting.micro_tokens:,}"])
    wrong = faults(p, network, setting.devices)
    if wrong:
        table.add_row(stage.name, what, how, *[""] * 7, f"[red]{wrong[0][0]}[/]")
        return
    held = memory(network, setting)
    fits = held.total <= USABLE * device.memory * GIB
    parts = [f"{value / GIB:.1f}" for value in vars(held).values()]
    total = f"[{'green' if fits else 'red'}]{held.total / GIB:.1f}[/]"
    speed = tokens_per_second(network, setting, device, stage.context)
    seconds = stage.tokens / speed
    time = f"{speed:,.0f} tokens/s, {duration(seconds)}, {seconds * setting.devices / 3600:,.1f} device hours"
    table.add_row(stage.name, what, how, *parts, total, time if fits else "[red]does not fit[/]")


def _change(stage: _Stage, network: ModelConfig, setting: Setting, device: Device) -> str:
    """What would make it fit."""
    ways = []
    for rows in (setting.longest, 4_096, 1_024):
        more = replace(setting, longest=rows, micro_tokens=min(rows, setting.micro_tokens))
        while more.devices <= _MOST and not best(network, more, device, stage.context):
            more = replace(more, devices=more.devices * 2)
        if rows <= setting.longest and more.devices <= _MOST:
            records = f" and no record of more than {rows:,} tokens" if rows < setting.longest else ""
            ways.append(f"{more.devices} of these devices{records}")
    if stage.name == "sft" and setting.trained == 1 and best(network, replace(setting, trained=0.01), device, 1.0):
        ways.append("adapters (sft.lora.rank 16)")
    return "it would with " + ", or ".join(ways) if ways else "take devices with more memory"


def _table() -> Table:
    table = Table(box=box.SIMPLE, header_style="dim", pad_edge=False)
    for name in ("stage", "", "how"):
        table.add_column(name, no_wrap=name != "how")
    for name in ("weights", "grads", "moments", "acts", "scores", "buffers", "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    return table
