"""/score reads a conversation up to the end of the assistant's turn, whatever token ends a turn."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from openqwen.model import Packed, load_scorer

CHATML = None  # the checkpoint's own
OTHER = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6, of course.\n"},
]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (OTHER, "<|endoftext|>")])
def test_the_last_token_ends_the_turn(start, tiny, reward, tmp_path, template, end):
    folder = shutil.copytree(tiny, tmp_path / "model")
    if template:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    server = start(folder, "--reward", reward)
    answer = server.http.post("/score", json={"conversations": [TALK[:3], TALK]}).json()

    theirs, scorer = AutoTokenizer.from_pretrained(folder), load_scorer(reward)
    expected, count = [], 0
    for talk in (TALK[:3], TALK):
        ids = theirs.encode(theirs.apply_chat_template(talk, tokenize=False))
        ended = theirs.convert_tokens_to_ids(end)
        ids = ids[: len(ids) - ids[::-1].index(ended)]
        packed = Packed.from_lengths([len(ids)])
        with torch.inference_mode():
            last = torch.tensor([len(ids) - 1])
            score = scorer(torch.tensor(ids), packed.positions, packed, last)
        expected.append(float(score))
        count += len(ids)
    assert answer["usage"]["prompt_tokens"] == count
    assert [row["score"] for row in answer["data"]] == pytest.approx(expected, abs=1e-5)
