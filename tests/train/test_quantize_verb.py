"""`openqwen quantize`: a folder that loads as it was made, nothing replaced unasked."""

import json

import pytest
import torch

from openqwen import Engine, Sampling, cli, load_model, load_tokenizer, save_checkpoint
from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.model.quantize import QuantizedQwen2
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def folder(tmp_path):
    model = Qwen2(
        ModelConfig(288, 64, 96, 2, 4, 2, tie_word_embeddings=True, generation={"temperature": 0.7})
    )
    initialize(model, torch.Generator().manual_seed(0))
    tokenizer = Tokenizer(
        [*BYTES_IN_ID_ORDER, b"th", b"the"], [(83, 71), (256, 68)], template=TEMPLATE
    )
    save_checkpoint(model, tokenizer, tmp_path / "source")
    return tmp_path / "source"


def run(capsys, verb, *arguments):
    """The exit status, and all that was said."""
    status = cli.main([verb, *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out + out.err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_folder_that_loads_and_answers(capsys, folder, tmp_path, kind):
    status, said = run(capsys, "quantize", folder, tmp_path / "small", "--to", kind)
    assert (status, f", {kind}, " in said) == (0, True)
    made, expected = load_model(tmp_path / "small"), load_model(folder, quantize=kind)
    assert isinstance(made, QuantizedQwen2)
    state = made.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "openqwen", "version": 1, "kind": kind}
    assert made.config.generation == {"temperature": 0.7}
    engine = Engine(made, load_tokenizer(tmp_path / "small"))
    [alone] = engine.generate(["the end"], Sampling(max_tokens=8))
    together = engine.generate(["a", "the end", "and so on"], Sampling(max_tokens=8))
    assert together[1].token_ids == alone.token_ids
    assert len(alone.logprobs) == len(alone.token_ids)


def test_what_is_refused(capsys, folder, tmp_path):
    assert run(capsys, "quantize", folder, tmp_path / "small")[0] == 0
    status, said = run(capsys, "quantize", folder, tmp_path / "small")
    assert (status, "--overwrite" in said) == (1, True)
    assert run(capsys, "quantize", folder, tmp_path / "small", "--overwrite")[0] == 0
    for verb in ("quantize", "convert"):
        status, said = run(capsys, verb, tmp_path / "small", tmp_path / "again")
        assert (status, "int8 already" in said) == (1, True)
    assert not (tmp_path / "again").exists()
