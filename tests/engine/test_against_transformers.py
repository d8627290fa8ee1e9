"""Greedy answers against `generate` of transformers, with and without penalties."""

import pytest
import torch
from tiny import model, prompts, tokenizer
from transformers import AutoModelForCausalLM

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.model import save_checkpoint

WORDS = tokenizer()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("tied", [True, False])
def test_greedy_answers_are_those_of_generate(tmp_path, penalty, tied):
    network = model(seed=4, tie_word_embeddings=tied)
    save_checkpoint(network, WORDS, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    asked = prompts(6, seed=3)
    sampling = Sampling(max_tokens=30, repetition_penalty=penalty)
    outputs = Engine(network, WORDS, EngineConfig(speculate=4, token_budget=32)).generate(
        asked, sampling
    )
    for prompt, output in zip(asked, outputs):
        found = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=penalty,
            suppress_tokens=list(range(WORDS.vocab_size, 320)),
            eos_token_id=[WORDS.eos_id, WORDS.endoftext_id],
            pad_token_id=WORDS.endoftext_id,
        )[0, len(prompt) :].tolist()
        ended = found[-1] in (WORDS.eos_id, WORDS.endoftext_id)
        assert output.token_ids == (found[:-1] if ended else found)
        assert output.finish_reason == ("stop" if ended else "length")
