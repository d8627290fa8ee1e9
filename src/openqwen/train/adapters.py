"""What stages share that train adapters: how they are saved, and merged into the network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openqwen.model import Qwen2, Scorer, load_model
from openqwen.model.lora import LoraConfig, load_adapter, merge_adapters, save_adapter
from openqwen.train.trainer import Trainer

ADAPTER = "adapter"  # beside the merged network, in PEFT's format


def merged_network(
    trainer: Trainer[Any], config: LoraConfig, start: Path
) -> Callable[[], Qwen2 | Scorer]:
    """Write the adapter to `output/adapter`; returns what gives the network with it merged."""
    network, folder = trainer.full_model(), trainer.output / ADAPTER
    if trainer.world.main:
        save_adapter(network, config, folder, base=str(start))
        if config.base != "none":
            # The adapter was trained over rounded matrices; it is merged into the exact ones.
            network = load_model(start)
            load_adapter(network, folder)
        merge_adapters(network)
    return lambda: network
