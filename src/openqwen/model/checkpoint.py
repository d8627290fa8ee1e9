"""Checkpoints: the Hugging Face folder in and out, a .gguf file in. The files decide, never a family name (law 6)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Qwen2, Scorer
from openqwen.model.gguf import read_gguf
from openqwen.model.quantize import Kind, QuantizedQwen2, check
from openqwen.model.quantize import quantize as quantized
from openqwen.model.quantize_gpu import quantize_on_gpu
from openqwen.model.stored import Stored, stored_in_folder, weight_files
from openqwen.model.weights import SHARD_BYTES, fill, ignore, save_weights, without_memory
from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, write_json
from openqwen.support.hub import local

_GENERATION = "generation_config.json"
_PACKED = {"quant_method": "openqwen", "version": 1}  # of model/packed.py


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


def load_model(
    source: str | Path,
    dtype: str | None = "float32",
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = ignore,
    quantize: Kind | None = None,
) -> Qwen2:
    """Read a language model.

    source: a Hugging Face folder of safetensors files, a .gguf file, or an id on the hub (`owner/name`,
    `owner/name@revision`). dtype: float32, bfloat16 or float16; None keeps the files' own, and takes float32 for blocks
    or where the files mix several. device: "meta" reads nothing, but remembers where all lies: `Qwen2.stored`.
    Half-precision weights that need no cast are used from the file, not copied. advance: called with the number of
    weights read since the last call. quantize: "int8" or "int4", on a CPU (`model.quantize`) or a CUDA GPU (torchao); a
    folder that holds such weights already needs no word of it. Raises OpenQwenError.
    """
    path = local(source)
    if (kept := _kept_quantized(path, quantize)) is not None:
        return kept
    on_gpu = torch.device(device).type == "cuda"
    if quantize is not None:
        dtype = "bfloat16" if on_gpu else None
        check(quantize, torch.device("cpu" if on_gpu else device))
    config, stored, where = _read(path)
    model = fill(lambda: Qwen2(config), stored, where, dtype, device, advance)
    model.stored = stored if str(device) == "meta" else None
    if quantize is not None:
        model = (quantize_on_gpu if on_gpu else quantized)(model, quantize)
    return model


def load_scorer(source: str | Path, dtype: str | None = "float32", device: str | torch.device = "cpu") -> Scorer:
    """Read a reward model (`Qwen2ForSequenceClassification`, one label); otherwise as `load_model`."""
    config, stored, where = _read(local(source))
    return fill(lambda: Scorer(config), stored, where, dtype, device)


def scorer_from(source: str | Path, generator: torch.Generator) -> Scorer:
    """A reward model that starts from a language model's decoder, with a fresh output row."""
    language_model = load_model(source)
    with without_memory():
        scorer = Scorer(language_model.config)
    scorer.model = language_model.model
    row = torch.empty(1, scorer.config.hidden_size)
    scorer.score.weight = torch.nn.Parameter(row.normal_(0.0, scorer.config.initializer_range, generator=generator))
    return scorer


def save_checkpoint(
    model: Qwen2 | Scorer,
    tokenizer: Vocabulary,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    chat: bool = False,
    advance: Callable[[int], None] = ignore,
) -> None:
    """Write config.json, generation_config.json, the weights and the tokenizer's files, all consistent.

    What a checkpoint said when it was read, it says again: its stop tokens and generation defaults too. A network that
    came from none ends chat at `<|im_end|>`, and `<|endoftext|>` stops and pads too: with these out of step a model
    never stops. chat: the network has learnt to end turns, so it stops in that way whatever it said before.
    shard_bytes: the most bytes of one weights file. advance: called with the number of weights written since.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = model.config.to_json("ForCausalLM" if isinstance(model, Qwen2) else "ForSequenceClassification", dtype)
    if isinstance(model, QuantizedQwen2):
        config["quantization_config"] = _PACKED | {"kind": model.kind}
    ends = _ends(tokenizer, None if chat else config["eos_token_id"])
    if config["eos_token_id"] is None or chat:
        config |= ends | {"eos_token_id": tokenizer.eos_id}
    if isinstance(model, Qwen2):
        generation = dict(model.config.generation) or ends
        write_json(folder / _GENERATION, generation | (ends if chat else {}))
    else:
        labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        config |= labels | {"pad_token_id": config.get("pad_token_id", tokenizer.endoftext_id)}
    write_json(folder / "config.json", config)
    save_weights(model, folder, shard_bytes, advance)
    tokenizer.save(folder)


def _ends(tokenizer: Vocabulary, eos: int | None) -> dict[str, Any]:
    """Where generation stops, and what pads: a base model's `<|endoftext|>` alone, else the end of a turn too."""
    both = [tokenizer.eos_id, tokenizer.endoftext_id]
    return {
        "bos_token_id": tokenizer.endoftext_id,
        "eos_token_id": both if eos in (None, tokenizer.eos_id) else eos,
        "pad_token_id": tokenizer.endoftext_id,
    }


def _read(path: Path) -> tuple[ModelConfig, dict[str, Stored], Path]:
    """The configuration, where each tensor lies, and what to name in errors."""
    config, stored = read_gguf(path) if path.suffix == ".gguf" else _read_folder(path)
    if config.num_hidden_layers > len(stored):
        raise OpenQwenError(
            f"The configuration has {config.num_hidden_layers} layers, the weights only {len(stored)} tensors.",
            where=path,
        )
    return config, stored, path


def _kept_quantized(path: Path, asked: Kind | None) -> QuantizedQwen2 | None:
    """The model of a folder that `save_checkpoint` wrote of quantised weights; of any other None."""
    if not (path / "config.json").is_file():
        return None
    config = _folder_config(path)
    own = config.other.get("quantization_config") or {}
    if own.get("quant_method") != _PACKED["quant_method"]:
        return None
    if own.get("version") != _PACKED["version"] or asked not in (None, own["kind"]):
        raise OpenQwenError(
            f"These weights are {own.get('kind')}, version {own.get('version')} of their form; asked for is"
            f" {asked or own.get('kind')}, version {_PACKED['version']}.",
            where=path,
            do=f"quantise the source anew: {command('quantize', 'MODEL', 'OUTPUT', '--to', 'KIND')}",
        )
    model = QuantizedQwen2(config, own["kind"])
    try:
        tensors = {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}
        model.allocate()  # memory of our own can lie in large pages, which a file's does not
        matrices = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        for name, matrix in matrices.items():
            matrix.copy_(tensors[name])
        rest = {name: tensor.clone() for name, tensor in tensors.items() if name not in matrices}
        model.load_state_dict(matrices | rest, assign=True)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise OpenQwenError(f"The quantised weights cannot be read: {error}", where=path) from None
    return cast(QuantizedQwen2, model.requires_grad_(False))


def _folder_config(path: Path) -> ModelConfig:
    config = ModelConfig.from_json(read_json(path / "config.json"), where=str(path / "config.json"))
    if (path / _GENERATION).is_file():
        config = replace(config, generation=read_json(path / _GENERATION))
    return config


def _read_folder(path: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    if not (path / "config.json").is_file():
        raise OpenQwenError(
            "There is no checkpoint here: config.json is missing.",
            where=path,
            do="give a Hugging Face folder with config.json and *.safetensors, a .gguf file, or a hub id (owner/name)",
        )
    config, stored = _folder_config(path), stored_in_folder(path)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)  # some files repeat the embedding
    return config, stored
