"""Checkpoints: the Hugging Face folder in and out, a .gguf file in.

The files decide, never a family name (law 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from openqwen.model.config import ModelConfig, token_ids
from openqwen.model.decoder import Qwen2, Scorer
from openqwen.model.gguf import read_gguf
from openqwen.model.quantize import Kind, QuantizedQwen2, check
from openqwen.model.quantize import quantize as quantized
from openqwen.model.quantize_gpu import quantize_on_gpu
from openqwen.model.stored import Stored, has_weights, same_numbers, stored_in_folder, weight_files
from openqwen.model.weights import SHARD_BYTES, fill, ignore, save_weights, without_memory
from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, refuse_pointer, write_json
from openqwen.support.gguf import find_gguf
from openqwen.support.hub import local
from openqwen.support.progress import notice

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

    source: a Hugging Face folder of safetensors files, a GGUF file (of a model in several files the
    first), a folder that holds one GGUF model, or an id on the hub (`owner/name`,
    `owner/name@revision`). dtype: float32, bfloat16 or float16; None keeps the files' own, and
    takes float32 for blocks or where the files mix several. device: "meta" reads nothing, but
    remembers where all lies: `Qwen2.stored`. Half-precision weights that need no cast are used from
    the file, not copied. advance: called with the number of weights read since the last call.
    quantize: "int8" or "int4", on a CPU (`model.quantize`) or a CUDA GPU (torchao); a folder that
    holds such weights already needs no word of it. Raises OpenQwenError.
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


def load_scorer(
    source: str | Path, dtype: str | None = "float32", device: str | torch.device = "cpu"
) -> Scorer:
    """Read a reward model (`Qwen2ForSequenceClassification`, one label); otherwise as
    `load_model`.
    """
    config, stored, where = _read(local(source))
    return fill(lambda: Scorer(config), stored, where, dtype, device)


def scorer_from(source: str | Path, generator: torch.Generator) -> Scorer:
    """A reward model that starts from a language model's decoder, with a fresh output row."""
    language_model = load_model(source)
    with without_memory():
        scorer = Scorer(language_model.config)
    scorer.model = language_model.model
    row = torch.empty(1, scorer.config.hidden_size)
    scorer.score.weight = torch.nn.Parameter(
        row.normal_(0.0, scorer.config.initializer_range, generator=generator)
    )
    return scorer


def save_checkpoint(
    model: Qwen2 | Scorer,
    tokenizer: Vocabulary,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    chat: bool = False,
    advance: Callable[[int], None] = ignore,
) -> None:
    """Write config.json, generation_config.json, the weights and the tokenizer's files, all
    consistent.

    What a checkpoint said when it was read, it says again: its stop tokens and generation defaults
    too. A network that came from none ends chat at `<|im_end|>`, and `<|endoftext|>` stops and pads
    too: with these out of step a model never stops. chat: the network has learnt to end turns, so
    it stops in that way too, whatever it said before. shard_bytes: the most bytes of one weights
    file. advance: called with the number of weights written since.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = model.config.to_json(
        "ForCausalLM" if isinstance(model, Qwen2) else "ForSequenceClassification", dtype
    )
    if isinstance(model, QuantizedQwen2):
        config["quantization_config"] = _PACKED | {"kind": model.kind}
    stated = model.config.stops
    ends = _ends(tokenizer, stated, chat)
    if chat or not stated:
        config |= ends
        if chat or not model.config.generation:  # generation_config.json states the other end
            config["eos_token_id"] = tokenizer.eos_id
    if isinstance(model, Qwen2):
        generation = dict(model.config.generation) or ends
        write_json(folder / _GENERATION, generation | (ends if chat else {}))
    else:
        labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        config |= labels | {"pad_token_id": config.get("pad_token_id", tokenizer.endoftext_id)}
    write_json(folder / "config.json", config)
    save_weights(model, folder, shard_bytes, advance)
    tokenizer.save(folder)


def _ends(tokenizer: Vocabulary, stated: Sequence[int], chat: bool) -> dict[str, Any]:
    """Where generation stops, and what pads.

    For chat, or where nothing is stated, also Qwen2's two.
    """
    both = [tokenizer.eos_id, tokenizer.endoftext_id] if chat or not stated else []
    eos = list(dict.fromkeys([*both, *stated]))
    return {
        "bos_token_id": tokenizer.endoftext_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": tokenizer.endoftext_id,
    }


def _read(path: Path) -> tuple[ModelConfig, dict[str, Stored], Path]:
    """The configuration, where each tensor lies, and what to name in errors."""
    file = None if has_weights(path) else find_gguf(path)
    config, stored = _read_folder(path) if file is None else read_gguf(file)
    if config.num_hidden_layers > len(stored):
        raise OpenQwenError(
            (
                f"The configuration has {config.num_hidden_layers} layers, the weights only "
                f"{len(stored)} tensors."
            ),
            where=path,
        )
    _announce(config, path)
    return config, stored, path


def _announce(config: ModelConfig, path: Path) -> None:
    """A line for stop tokens that can never be written."""
    outside = [str(i) for i in config.stated_stops if i not in config.stops]
    if outside:
        notice(f"eos_token_id {', '.join(outside)} is outside the vocabulary and left out", path)


def _kept_quantized(path: Path, asked: Kind | None) -> QuantizedQwen2 | None:
    """The model of a folder that `save_checkpoint` wrote of quantised weights; of any other
    None.
    """
    if not (path / "config.json").is_file() or not has_weights(path):
        return None
    config = _folder_config(path)
    own = config.other.get("quantization_config") or {}
    if own.get("quant_method") != _PACKED["quant_method"]:
        return None
    if own.get("version") != _PACKED["version"] or asked not in (None, own["kind"]):
        raise OpenQwenError(
            f"These weights are {own.get('kind')}, version {own.get('version')} of their form; "
            "asked for is"
            f" {asked or own.get('kind')}, version {_PACKED['version']}.",
            where=path,
            do=(
                "quantise the source anew: "
                f"{command('quantize', 'MODEL', 'OUTPUT', '--to', 'KIND')}"
            ),
        )
    model = QuantizedQwen2(config, own["kind"])
    try:
        for file in weight_files(path):
            refuse_pointer(file)
        tensors = {
            name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()
        }
        model.allocate()  # memory of our own can lie in large pages, which a file's does not
        matrices = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        for name, matrix in matrices.items():
            matrix.copy_(tensors[name])
        rest = {name: tensor.clone() for name, tensor in tensors.items() if name not in matrices}
        model.load_state_dict(matrices | rest, assign=True)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise OpenQwenError(f"The quantised weights cannot be read: {error}", where=path) from None
    _announce(config, path)
    return cast(QuantizedQwen2, model.requires_grad_(False))


def _folder_config(path: Path) -> ModelConfig:
    config = ModelConfig.from_json(read_json(path / "config.json"), where=str(path / "config.json"))
    if (path / _GENERATION).is_file():
        generation = read_json(path / _GENERATION)
        if not isinstance(generation, dict):
            raise OpenQwenError("This file is JSON but not an object.", where=path / _GENERATION)
        token_ids(generation.get("eos_token_id"), str(path / _GENERATION))
        config = replace(config, generation=generation)
    return config


def _read_folder(path: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    if not (path / "config.json").is_file():
        raise OpenQwenError(
            "There is no checkpoint here: config.json is missing.",
            where=path,
            do=(
                "give a Hugging Face folder with config.json and *.safetensors, a .gguf file, or a "
                "hub id (owner/name)"
            ),
        )
    config = _folder_config(path)
    if packed := config.other.get("quantization_config"):
        raise OpenQwenError(
            f"Weights quantised by '{packed.get('quant_method')}' are not read here.",
            where=path / "config.json",
            do="give the model they were made from; the verb quantize packs it",
        )
    stored = stored_in_folder(path)
    head, table = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and table:
        if same_numbers(head, table):
            del stored["lm_head.weight"]  # some files repeat the embedding
        else:  # as transformers decides
            notice("tie_word_embeddings is true, but lm_head.weight differs: it is used", path)
            config = replace(config, tie_word_embeddings=False)
    return config, stored
