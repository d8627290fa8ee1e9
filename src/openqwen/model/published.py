"""The published Qwen1.5-MoE, Qwen2 and Qwen2.5 models; `published.toml` has their numbers."""

import tomllib
from pathlib import Path
from typing import Any

_TABLE = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
_ONE_MILLION = {
    "chunk_size": 262_144,
    "local_size": 8_192,
    "original_max_position_embeddings": 262_144,
}
NAMES = tuple(_TABLE["models"])


def config_json(name: str) -> dict[str, Any]:
    """The fields of a published `config.json` that define the network.

    Raises KeyError if the name is not in `NAMES`.
    """
    model = dict(_TABLE["models"][name])
    values = {
        **_TABLE["shapes"][model.pop("shape")],
        **model,
        "rope_theta": 1_000_000.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645 if "-instruct" in name else 151_643,
    }
    if name.endswith("-1m"):
        values |= {"rope_theta": 10_000_000.0, "dual_chunk_attention_config": _ONE_MILLION}
    return values
