"""Checkpoints: reads Hugging Face folders and .gguf files, writes Hugging Face folders.

Everything comes from the files, nothing from the model's name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from openqwen.model.config import ModelConfig, token_ids
from openqwen.model.decoder import Qwen2, Scorer
from openqwen.model.gguf import read_gguf
from openqwen.model.quantize import QuantizedQwen2, check
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
from openqwen.support.settings import Quantization

_GENERATION = "generation_config.json"
_REWARD_WEIGHTS = "reward_weights"  # in config.json: a criterion's label -> its weight
_PACKED = {"quant_method": "openqwen", "version": 1}  # the packed form of model/packed.py


class Vocabulary(Protocol):
    """What a checkpoint needs of its tokenizer."""

    @property
    def eos_id(self) -> int:
        """`<|im_end|>`."""

    @property
    def endoftext_id(self) -> int:
        """`<|endoftext|>`."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""


def load_model(
    source: str | Path,
    dtype: str | None = "float32",
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = ignore,
    quantize: Quantization | None = None,
) -> Qwen2:
    """Read a language model. Half-precision weights that need no cast are used from the file.

    Args:
        source: a Hugging Face folder with safetensors files, a GGUF file (of a model in several
            files the first), a folder with one GGUF model, or an id on the hub (`owner/name`,
            `owner/name@revision`).
        dtype: float32, bfloat16 or float16. None keeps that of the files; it means float32 if they
            have blocks or several dtypes.
        device: "meta" reads no weights but keeps their places in the files in `Qwen2.stored`.
        advance: called with the number of weights read since the last call.
        quantize: "int8" or "int4", on a CPU (model/quantize.py) or a CUDA GPU (torchao). It is not
            needed for a folder whose weights are quantised already.

    Raises:
        OpenQwenError: the files are missing, damaged, or not of a Qwen2 model.
    """
    path = local(source)
    if (packed := _read_packed(path, quantize)) is not None:
        return packed
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
    """Read a reward model, `Qwen2ForSequenceClassification`; see `load_model`.

    Its labels are the criteria. Each weighs 1 where config.json does not say otherwise, in
    `reward_weights`.
    """
    config, stored, where = _read(local(source))
    criteria = _criteria(config, stored, where)
    return fill(lambda: Scorer(config, criteria), stored, where, dtype, device)


def scorer_from(
    source: str | Path, generator: torch.Generator, criteria: Mapping[str, float] | None = None
) -> Scorer:
    """A reward model with the decoder of a language model and randomly drawn output rows."""
    language_model = load_model(source)
    with without_memory():
        scorer = Scorer(language_model.config, criteria)
    scorer.model = language_model.model
    rows_CD = torch.empty(len(scorer.criteria), scorer.config.hidden_size)
    scorer.score.weight = torch.nn.Parameter(
        rows_CD.normal_(0.0, scorer.config.initializer_range, generator=generator)
    )
    return scorer


def _criteria(config: ModelConfig, stored: Mapping[str, Stored], where: Path) -> dict[str, float]:
    """The criteria of a reward model, a label for each output, and their weights."""
    if "score.weight" not in stored:
        do = "give a reward model: a folder that `openqwen reward` made"
        raise OpenQwenError("This model has no score.weight.", where, do)
    labels, weights = (config.other.get(key) or {} for key in ("id2label", _REWARD_WEIGHTS))
    usual = [f"LABEL_{number}" for number in range(stored["score.weight"].shape[0])]
    names = [str(labels.get(str(number), name)) for number, name in enumerate(usual)]
    if len(set(names)) < len(names):
        names = usual
    try:
        return {name: float(weights.get(name, 1.0)) for name in names}
    except (TypeError, ValueError):
        do = "give a number for each label"
        raise OpenQwenError(f"{_REWARD_WEIGHTS} is {weights!r}.", where, do) from None


def save_checkpoint(
    model: Qwen2 | Scorer,
    tokenizer: Vocabulary,
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
    chat: bool = False,
    advance: Callable[[int], None] = ignore,
    values: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write config.json, generation_config.json, the weights and the tokenizer's files.

    Fields of the configuration that were read are written again, stop tokens and generation
    defaults too. A network that was not read from a checkpoint stops at `<|im_end|>` and
    `<|endoftext|>`; the latter pads. If the files contradicted each other, a model might never
    stop.

    Args:
        model: of any dtype, or quantised.
        tokenizer: gives the ids and writes its own files.
        folder: is made if missing.
        shard_bytes: the largest size of one weights file.
        chat: the network was trained to end its turns, so `<|im_end|>` stops it, even if the
            checkpoint that it came from does not say so.
        advance: called with the number of weights written since the last call.
        values: gives the tensors of a network without memory (see `save_weights`).
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
        if chat or not model.config.generation:  # else generation_config.json has both
            config["eos_token_id"] = tokenizer.eos_id
    if isinstance(model, Qwen2):
        generation = dict(model.config.generation) or ends
        write_json(folder / _GENERATION, generation | (ends if chat else {}))
    else:
        names = list(model.criteria)
        config |= {
            "num_labels": len(names),
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "pad_token_id": config.get("pad_token_id", tokenizer.endoftext_id),
        }
        if set(model.criteria.values()) != {1.0}:
            config[_REWARD_WEIGHTS] = model.criteria
    write_json(folder / "config.json", config)
    save_weights(model, folder, shard_bytes, advance, values)
    tokenizer.save(folder)


def _ends(tokenizer: Vocabulary, stated: Sequence[int], chat: bool) -> dict[str, Any]:
    """The begin, stop and pad tokens; for chat, or without stated stops, with Qwen2's two stops."""
    both = [tokenizer.eos_id, tokenizer.endoftext_id] if chat or not stated else []
    eos = list(dict.fromkeys([*both, *stated]))
    return {
        "bos_token_id": tokenizer.endoftext_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": tokenizer.endoftext_id,
    }


def _read(path: Path) -> tuple[ModelConfig, dict[str, Stored], Path]:
    """The configuration, the place of each tensor, and the path to name in errors."""
    file = None if has_weights(path) else find_gguf(path)
    config, stored = _read_folder(path) if file is None else read_gguf(file)
    layers = config.num_hidden_layers
    if layers > len(stored):
        what = f"The configuration has {layers} layers, the weights only {len(stored)} tensors."
        raise OpenQwenError(what, where=path)
    _note_impossible_stops(config, path)
    return config, stored, path


def _note_impossible_stops(config: ModelConfig, path: Path) -> None:
    """Print a note if stop tokens are outside the vocabulary."""
    outside = [str(i) for i in config.stated_stops if i not in config.stops]
    if outside:
        notice(f"eos_token_id {', '.join(outside)} is outside the vocabulary and ignored", path)


def _read_packed(path: Path, kind: Quantization | None) -> QuantizedQwen2 | None:
    """The model of a folder with weights that this package quantised; None for any other source."""
    if not (path / "config.json").is_file() or not has_weights(path):
        return None
    config = _folder_config(path)
    packed = config.other.get("quantization_config") or {}
    if packed.get("quant_method") != _PACKED["quant_method"]:
        return None
    if packed.get("version") != _PACKED["version"] or kind not in (None, packed["kind"]):
        stored = f"{packed.get('kind')}, version {packed.get('version')} of the packed form"
        wanted = f"{kind or packed.get('kind')}, version {_PACKED['version']}"
        again = command("quantize", "MODEL", "OUTPUT", "--to", "KIND")
        raise OpenQwenError(
            f"These weights are {stored}; asked for is {wanted}.",
            where=path,
            do=f"quantise the source again: {again}",
        )
    model = QuantizedQwen2(config, packed["kind"])
    try:
        tensors: dict[str, torch.Tensor] = {}
        for file in weight_files(path):
            refuse_pointer(file)
            tensors |= load_file(file)
        model.allocate()  # new memory can be in large pages, a file's pages are small
        matrices = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        for name, matrix in matrices.items():
            matrix.copy_(tensors[name])
        rest = {name: tensor.clone() for name, tensor in tensors.items() if name not in matrices}
        model.load_state_dict(matrices | rest, assign=True)
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise OpenQwenError(f"The quantised weights cannot be read: {error}", where=path) from None
    _note_impossible_stops(config, path)
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
        what = "There is no checkpoint here: config.json is missing."
        folder = "a Hugging Face folder with config.json and *.safetensors"
        do = f"give {folder}, a .gguf file, or a hub id (owner/name)"
        raise OpenQwenError(what, where=path, do=do)
    config = _folder_config(path)
    if packed := config.other.get("quantization_config"):
        raise OpenQwenError(
            f"Weights quantised by '{packed.get('quant_method')}' cannot be read.",
            where=path / "config.json",
            do="give the model they were made from; `openqwen quantize` can quantise it",
        )
    stored = stored_in_folder(path)
    head, table = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head and table:
        if same_numbers(head, table):
            del stored["lm_head.weight"]  # some files repeat the embedding
        else:  # as in transformers
            text = "tie_word_embeddings is true, but lm_head.weight differs; lm_head.weight is used"
            notice(text, path)
            config = replace(config, tie_word_embeddings=False)
    return config, stored
