"""Where answers end: at what the checkpoint's files state, as in transformers' `generate`."""

import json

import pytest
import torch
from tiny import model, prompts, tokenizer
from transformers import AutoModelForCausalLM

from openqwen.engine import Engine, EngineConfig, Sampling, Structure
from openqwen.model import load_model, save_checkpoint
from openqwen.tokenizer import load_tokenizer

WORDS = tokenizer()
ENDS = [WORDS.eos_id, WORDS.endoftext_id]


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def checkpoint(folder, own, generation, written=None):
    """The engine of a checkpoint with these stop tokens. written: the tokenizer's eos_token."""
    save_checkpoint(model(seed=4), WORDS, folder)
    change(folder / "config.json", eos_token_id=own)
    change(folder / "generation_config.json", eos_token_id=generation)
    change(folder / "tokenizer_config.json", eos_token=written)
    return Engine(load_model(folder), load_tokenizer(folder), EngineConfig(token_budget=32))


def test_answers_end_where_those_of_transformers_do(tmp_path):
    """Two of the tokens that this network writes most: nearly every answer ends at one."""
    asked = prompts(8, seed=3)
    free = Engine(model(seed=4), WORDS).generate(asked, Sampling(max_tokens=30, ignore_eos=True))
    stops = [free[0].token_ids[12], free[1].token_ids[7]]
    engine = checkpoint(tmp_path, stops[0], stops)
    outputs = engine.generate(asked, Sampling(max_tokens=30))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt, output in zip(asked, outputs):
        found = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            suppress_tokens=list(range(WORDS.vocab_size, 320)),
            pad_token_id=WORDS.endoftext_id,
        )[0, len(prompt) :].tolist()
        assert output.token_ids == (found[:-1] if found[-1] in stops else found)
        assert output.finish_reason == ("stop" if found[-1] in stops else "length")
    assert {output.finish_reason for output in outputs[:2]} == {"stop"}


@pytest.mark.parametrize(
    ("own", "generation", "written", "stops"),
    [
        (7, None, None, [7]),
        (None, [7, 9], None, [7, 9]),
        (9, 7, "<|im_end|>", [9, 7, WORDS.eos_id]),
        (None, 7, {"content": "<|endoftext|>", "special": True}, [7, WORDS.endoftext_id]),
        (None, 7, "no token", [7]),
        (None, None, None, ENDS),
        ([], [319, 10_000], None, ENDS),
    ],
)
def test_the_stop_tokens_are_all_that_is_stated(tmp_path, own, generation, written, stops):
    engine = checkpoint(tmp_path, own, generation, written)
    for token in {*stops, *ENDS, 7, 9}:
        sampling = Sampling(max_tokens=3, logit_bias=((token, 100.0),))
        (output,) = engine.generate([[1, 2, 3]], sampling)
        assert output.finish_reason == ("stop" if token in stops else "length"), token
        assert output.token_ids == ([] if token in stops else [token] * 3)
        (output,) = engine.generate(
            [[1, 2, 3]], Sampling(max_tokens=3, logit_bias=((token, 100.0),), ignore_eos=True)
        )
        assert output.token_ids == [token] * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_top_p_of_zero_takes_the_likeliest_token(temperature):
    engine = Engine(model(seed=4), WORDS)
    greedy = engine.generate(prompts(3), Sampling(max_tokens=10))
    found = engine.generate(
        prompts(3), Sampling(max_tokens=10, temperature=temperature, top_p=0.0, seed=3)
    )
    assert [output.token_ids for output in found] == [output.token_ids for output in greedy]


def test_a_structured_answer_ends_at_the_checkpoint_s_stop_token(tmp_path):
    engine = checkpoint(tmp_path, 200, 200)
    sampling = Sampling(
        max_tokens=20, structure=Structure("regex", "[ab]+"), logit_bias=((200, 5.0),)
    )
    (output,) = engine.generate(["a"], sampling)
    assert output.finish_reason == "stop"
    assert set(output.text) <= {"a", "b"}
