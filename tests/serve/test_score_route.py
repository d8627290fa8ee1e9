"""/score reads a conversation up to the end of the assistant's turn, whatever token ends a turn."""

import json
import shutil

import pytest
import torch
from serving import save
from transformers import AutoTokenizer

from openqwen.engine.score import RewardModel, criteria_scores
from openqwen.model import Packed, Scorer, load_scorer
from openqwen.tokenizer.answers import encode_answer

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


def test_several_criteria_are_told_and_scored_as_offline(start, tiny, tokenizer, tmp_path):
    weights = {"truthfulness": 1.0, "conciseness": -0.5}
    folder = save(lambda config: Scorer(config, weights), tmp_path / "reward", tokenizer, 2)
    server = start(tiny, "--reward", folder)
    talks = [TALK, TALK[:3]] * 12  # more tokens than are scored in one call
    answer = server.http.post("/score", json={"conversations": talks}).json()
    model = RewardModel.load(folder)
    ids = [encode_answer(model.tokenizer, talk[:-1], talk[-1])[0] for talk in talks]
    rows = zip(answer["data"], criteria_scores(model.scorer, ids).tolist(), model.score(talks))
    for entry, by_criterion, reward in rows:
        assert list(entry["criteria"]) == list(weights)
        assert list(entry["criteria"].values()) == pytest.approx(by_criterion, abs=1e-4)
        assert entry["score"] == pytest.approx(reward, abs=1e-4)
        told = sum(weights[name] * value for name, value in entry["criteria"].items())
        assert entry["score"] == pytest.approx(told, abs=1e-5)
