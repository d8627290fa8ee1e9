"""What training learns of records in practitioners' forms, and what is said of the others."""

import json
from functools import partial

import pytest
import torch

from openqwen.engine import Engine, Sampling
from openqwen.instruct.synthesize.preferences import PreferConfig, make_pairs
from openqwen.model import ModelConfig, Qwen2, Scorer, initialize, save_checkpoint
from openqwen.serve.protocol import plain
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Grade, GradedAnswer, Task
from openqwen.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from openqwen.train.conversations import (
    check_some_fit,
    encode_demonstration,
    encode_preference,
    encode_prompt,
)
from openqwen.train.online_dpo import OnlineDpoConfig, online_dpo
from openqwen.train.preferences import Preferences, PreferencesConfig
from openqwen.train.sft import Demonstrations, says_nothing
from openqwen.train.trainer import Place

ASKED, ANSWERED = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
TOOLS = [{"type": "function", "function": {"name": "multiply", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        ["Say one two three, and multiply 2 by 4. " * 9], TokenizerConfig(vocabulary=300)
    )


@pytest.fixture(scope="module")
def engine(tokenizer):
    model = Qwen2(
        ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=512, tie_word_embeddings=True)
    )
    initialize(model, torch.Generator().manual_seed(1))
    return Engine(model, tokenizer)


def learned(tokenizer, sample):
    ids, mask = sample
    return tokenizer.decode([i for i, learn in zip(ids, mask) if learn], skip_control=False)


def file(folder, *records):
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def preferences(path, tokenizer, **options):
    place = Place(path.parent / "out", path.with_suffix(".scratch"), 0, "dpo")
    return Preferences.read(path, tokenizer, PreferencesConfig(), 512, place, **options)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"loss_scale": 0.0}]
)
def test_marked_turns_are_read_and_not_learned(tokenizer, mark):
    said = [
        ASKED,
        WRONG,
        {"role": "user", "content": "no"},
        ANSWERED,
        {"role": "user", "content": "and?"},
        WRONG,
    ]
    plainly = tokenizer.encode_chat(said)[0]
    for marked in range(1, 6, 2):
        messages = [m | (mark if n == marked else {}) for n, m in enumerate(said)]
        ids, mask = encode_demonstration(tokenizer, {"messages": messages}, "here")
        wanted = [m["content"] for n, m in enumerate(said) if n % 2 and n != marked]
        assert learned(tokenizer, (ids, mask)) == "".join(f"{text}<|im_end|>" for text in wanted)
        assert ids == plainly[: len(ids)]
    with pytest.raises(OpenQwenError, match=r"No assistant turn(.|\n)*here"):
        encode_demonstration(tokenizer, {"messages": [ASKED, ANSWERED | mark]}, "here")
    with pytest.raises(OpenQwenError, match=r"is 0\.5(.|\n)*here"):
        encode_demonstration(tokenizer, {"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "here")


def test_a_file_without_records_is_not_called_too_long():
    with pytest.raises(OpenQwenError, match=r"There are no records(.|\n)*FILE"):
        check_some_fit([], 8, "FILE")


def test_a_template_without_a_turn_for_each_answer_cannot_leave_one_out(tokenizer):
    odd = Tokenizer(
        tokenizer.vocabulary, tokenizer.merges, template="<|im_start|>assistant\nno<|im_end|>"
    )
    record = {"messages": [ASKED, WRONG | {"weight": 0}, ANSWERED]}
    with pytest.raises(
        OpenQwenError, match=r"does not give each assistant message a turn(.|\n)*here"
    ):
        encode_demonstration(odd, record, "here")


def test_training_reads_calls_as_the_server_does(tokenizer):
    call = {
        "type": "function",
        "function": {"name": "multiply", "arguments": '{"a": 2, "b": [1.0]}'},
    }
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
    ]
    record = {"messages": [*messages, ANSWERED], "tools": json.dumps(TOOLS)}
    ids, _ = encode_demonstration(tokenizer, record, "here")
    served, _ = tokenizer.encode_chat(plain(record["messages"]), tools=TOOLS)
    assert ids == served[: len(ids)]
    assert '{"name": "multiply", "arguments": {"a": 2, "b": [1.0]}}' in tokenizer.decode(ids)
    assert not says_nothing(record)


def test_tools_are_in_the_prompts_of_preferences_and_of_online_dpo(tokenizer):
    record = {
        "prompt": [ASKED],
        "chosen": [ANSWERED],
        "rejected": [WRONG],
        "tools": json.dumps(TOOLS),
    }
    start = tokenizer.encode_chat([ASKED], add_generation_prompt=True, tools=TOOLS)[0]
    assert encode_prompt(tokenizer, record, "here") == start
    for (ids, mask), text in zip(encode_preference(tokenizer, record, "here"), "45"):
        assert ids[: len(start)] == start
        assert learned(tokenizer, (ids, mask)) == f"{text}<|im_end|>"


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": [ASKED], "chosen": None, "rejected": [WRONG]}, "'chosen' is null"),
        ({"prompt": [ASKED], "chosen": ["4"], "rejected": ["5"]}, r"record 2, chosen\[0\]"),
        ({"text": "4"}, "lacks 'chosen'"),
    ],
)
def test_a_preference_of_another_shape_is_named_by_file_and_record(
    tokenizer, tmp_path, record, told
):
    good = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "origin": None}
    with pytest.raises(OpenQwenError, match=told) as caught:
        preferences(file(tmp_path, good, record), tokenizer, hottest=1.0)
    assert "0.jsonl, record 2" in str(caught.value)


def test_texts_are_preferences_too(tokenizer, tmp_path):
    path = file(tmp_path, {"prompt": "2+2?", "chosen": "4", "rejected": "5"})
    texts = preferences(path, tokenizer)
    path = file(tmp_path, {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [WRONG]})
    assert list(texts) == list(preferences(path, tokenizer))


def test_demonstrations_of_two_forms(tokenizer, tmp_path):
    path = file(tmp_path, {"messages": [ASKED, ANSWERED]}, {"instruction": "2+2?", "output": "4"})
    place = Place(tmp_path / "out", tmp_path / "scratch", 0, "sft")
    one, other = Demonstrations.read(path, tokenizer, 512, "leave out", place).samples()
    assert [part.tolist() for part in one] == [part.tolist() for part in other]


def test_messages_of_any_spelling_are_prompts(engine):
    asked = [
        [ASKED],
        [{"from": "human", "value": "2+2?"}],
        [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}],
    ]
    outputs = engine.generate(asked, Sampling(max_tokens=1))
    assert outputs[0].prompt_ids == outputs[1].prompt_ids == outputs[2].prompt_ids


def sampled_pairs(engine, tokenizer):
    """Pairs of the engine's own answers, every other of which ended at `<|endoftext|>`."""
    ends = [tokenizer.eos_id, tokenizer.endoftext_id]
    outputs = []
    for n in range(40):
        bias = ((ends[n % 2], 3.5), (ends[1 - n % 2], -50.0))
        sampling = Sampling(max_tokens=40, temperature=1.0, logit_bias=bias)
        outputs += engine.generate([[ASKED]], sampling, seeds=[n + 7])
    half = len(outputs) // 2
    right = {o.text.strip() for o in outputs[:half] if o.finish_reason == "stop"}
    task = Task("t", [ASKED], "exact", {"answer": "4", "wrong": ["5"]})
    answers = []
    for output in outputs:
        passed = output.text.strip() in right
        grade = Grade(passed, float(passed), "")
        answers.append(GradedAnswer([ASKED], output.text.strip(), output, grade, 1.0))
    return outputs, make_pairs(task, answers, PreferConfig(pairs_per_prompt=40, samples=40), seed=0)


def test_the_tokens_that_were_sampled_are_learned(engine, tokenizer):
    outputs, records = sampled_pairs(engine, tokenizer)
    written = {tuple(o.prompt_ids + o.written_ids) for o in outputs}
    records = json.loads(json.dumps(records))
    samples = [
        sample for record in records for sample in encode_preference(tokenizer, record, "here")
    ]
    assert len(samples) > 20
    assert {tuple(ids) for ids, _ in samples} <= written
    assert all(sum(mask) == len(ids) - len(outputs[0].prompt_ids) for ids, mask in samples)
    assert {ids[-1] for ids, _ in samples} >= {tokenizer.eos_id, tokenizer.endoftext_id}
    # Without the ids most would be others, and all would end at <|im_end|>.
    anew = [s for r in records for s in encode_preference(tokenizer, r | {"origin": {}}, "here")]
    assert {tuple(ids) for ids, _ in anew} - written
    # Ids that say another text, as those of another tokenizer do, are not used.
    for origin in (
        {"chosen_ids": [1, 2, 3]},
        {"chosen_ids": "4"},
        {"chosen_ids": [10**6]},
        {"chosen_ids": None},
        None,
    ):
        assert encode_preference(tokenizer, records[0] | {"origin": origin}, "here")[0] == anew[0]


def test_online_dpo_learns_the_end_that_was_sampled(tokenizer, tmp_path, monkeypatch):
    """A model that ends by `<|endoftext|>` alone: no answer holds `<|im_end|>`."""
    from openqwen.train import online, reward_sources

    config = ModelConfig(
        384, 32, 48, 2, 4, 2, max_position_embeddings=512, tie_word_embeddings=False
    )
    for kind, name in ((Qwen2, "model"), (Scorer, "reward")):
        network = kind(config)
        initialize(network, torch.Generator().manual_seed(1))
        save_checkpoint(network, tokenizer, tmp_path / name)
    bias = ((tokenizer.endoftext_id, 3.0), (tokenizer.eos_id, -100.0))
    seen = []
    monkeypatch.setattr(online, "Sampling", partial(Sampling, logit_bias=bias))
    monkeypatch.setattr(
        reward_sources,
        "score_sequences",
        lambda scorer, rows, budget: [seen.append(r) or len(r) for r in rows],
    )
    path = file(tmp_path, {"prompt": [ASKED], "tools": TOOLS})
    options = OnlineDpoConfig(steps=1, batch=1, samples=8, max_tokens=30, baseline=0)
    place = Place(tmp_path / "out", tmp_path / "scratch", 3, "online")
    online_dpo(options, tmp_path / "model", path, tokenizer, place, tmp_path / "reward")
    start = tokenizer.encode_chat([ASKED], add_generation_prompt=True, tools=TOOLS)[0]
    assert all(row[: len(start)] == start for row in seen)
    assert tokenizer.endoftext_id in {row[-1] for row in seen}
    assert not any(tokenizer.eos_id in row[len(start) :] for row in seen)
