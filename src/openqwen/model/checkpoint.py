"""Checkpoints: the Hugging Face folder, in and out. The files decide, never a family name (law 6)."""

from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Qwen2, Scorer
from openqwen.support.errors import OpenQwenError, disk_errors
from openqwen.support.files import read_json, write_json

WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Vocabulary(Protocol):
    """What a checkpoint needs of its tokenizer."""

    @property
    def eos_id(self) -> int:
        """`<|im_end|>`."""
        ...

    @property
    def endoftext_id(self) -> int:
        """`<|endoftext|>`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's own files."""
        ...


Network = TypeVar("Network", Qwen2, Scorer)


def load_model(source: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> Qwen2:
    """Read a language model from a Hugging Face folder of safetensors files."""
    folder = _folder(source)
    return _fill(Qwen2(_config(folder)), folder, dtype).to(device)


def load_scorer(source: str | Path, dtype: str = "float32", device: str | torch.device = "cpu") -> Scorer:
    """Read a reward model (`Qwen2ForSequenceClassification`, one label)."""
    folder = _folder(source)
    return _fill(Scorer(_config(folder)), folder, dtype).to(device)


def scorer_from(source: str | Path, generator: torch.Generator) -> Scorer:
    """A reward model that starts from a language model's decoder, with a fresh output row."""
    language_model = load_model(source)
    scorer = Scorer(language_model.config)
    scorer.model.load_state_dict(language_model.model.state_dict())
    with torch.no_grad():
        scorer.score.weight.normal_(0.0, scorer.config.initializer_range, generator=generator)
    return scorer


def save_checkpoint(model: Qwen2 | Scorer, tokenizer: Vocabulary, folder: str | Path) -> None:
    """Write config.json, generation_config.json, the weights and the tokenizer's files, all consistent.

    Chat ends at `<|im_end|>`, and `<|endoftext|>` stops and pads too: with these out of step a model never stops.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_json("ForCausalLM" if isinstance(model, Qwen2) else "ForSequenceClassification")
    config |= {
        "bos_token_id": tokenizer.endoftext_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.endoftext_id,
    }
    if isinstance(model, Qwen2):
        generation = {
            "bos_token_id": tokenizer.endoftext_id,
            "eos_token_id": [tokenizer.eos_id, tokenizer.endoftext_id],
            "pad_token_id": tokenizer.endoftext_id,
        }
        write_json(folder / "generation_config.json", generation)
    else:
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    write_json(folder / "config.json", config)
    save_weights(model, folder / WEIGHTS)
    tokenizer.save(folder)


def save_weights(model: nn.Module, path: Path) -> None:
    """One safetensors file, on the CPU, tensors in the order of the network."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with disk_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise OpenQwenError(
            "There is no checkpoint here: config.json is missing.",
            where=folder,
            do="give a Hugging Face folder with config.json and *.safetensors",
        )
    return folder


def _config(folder: Path) -> ModelConfig:
    return ModelConfig.from_json(read_json(folder / "config.json"), where=str(folder / "config.json"))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
    return [folder / WEIGHTS]


def _fill(model: Network, folder: Path, dtype: str) -> Network:
    """Copy the tensors into the network, each named when it is missing, extra, mis-shaped or unreadable."""
    model.to(getattr(torch, dtype))
    wanted = model.state_dict()
    seen: set[str] = set()
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    if name == "lm_head.weight" and name not in wanted and model.config.tie_word_embeddings:
                        continue
                    if name not in wanted:
                        raise OpenQwenError(
                            f"The file holds '{name}', which this network has no place for.", where=path
                        )
                    shape = list(file.get_slice(name).get_shape())
                    if shape != list(wanted[name].shape):
                        expected = list(wanted[name].shape)
                        raise OpenQwenError(f"'{name}' has the shape {shape}, not {expected}.", where=path)
                    wanted[name].copy_(file.get_tensor(name))
                    seen.add(name)
        except (SafetensorError, OSError) as error:
            raise OpenQwenError(f"The weights cannot be read: {error}", where=path) from None
    if missing := sorted(wanted.keys() - seen):
        shape = list(wanted[missing[0]].shape)
        raise OpenQwenError(f"{len(missing)} tensors are missing, first '{missing[0]}' {shape}.", where=folder)
    return model
