"""KTO on records with a label, and the other losses of the DPO stage."""

import json

import pytest
import torch

from openqwen.model import ModelConfig, Packed, Qwen2, initialize, load_model, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.dpo import DpoConfig, dpo
from openqwen.train.trainer import Place
from openqwen.train.unpaired import encode_labelled


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kto")
    tokenizer = train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))
    sizes = {"max_position_embeddings": 256, "tie_word_embeddings": True}
    model = Qwen2(ModelConfig(384, 64, 96, 2, 4, 2, **sizes))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder)
    return folder, tokenizer


def turn(role, text):
    return {"role": role, "content": text}


RECORDS = [
    {
        "prompt": f"Say {n}.",
        "completion": ("one " if n % 2 else "two three ") * (n + 1),
        "label": bool(n % 2),
    }
    for n in range(6)
]


def run(start, folder, records, **fields):
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    place = Place(folder / "out", folder / "scratch", 1, "dpo")
    metrics = dpo(DpoConfig(**fields), start[0], data, start[1], place)
    log = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in log]


@pytest.mark.parametrize("micro", [10_000, 40, 1])
def test_a_step_is_the_equation_on_whole_sequences(start, tmp_path, micro):
    """The second of two steps, transcribed: rows of one answer each, in float64."""
    train = {"learning_rate": 1e-2, "precision": "float32", "warmup_share": 0}
    fields = {"loss": "kto", "epochs": 2, "batch": 6, "beta": 0.5, "micro_tokens": micro}
    fields |= {"desirable": 1.5, "undesirable": 0.5, "train": train}
    metrics, log = run(start, tmp_path, RECORDS, **fields)
    assert log[0]["loss"] == pytest.approx((1.5 * 3 + 0.5 * 3) / 6 * 0.5, rel=1e-5)
    assert log[0]["kl"] == 0.0
    assert (metrics["answers"], metrics["desirable"]) == (6, 3)

    one = tmp_path / "one"
    one.mkdir()
    # Weights after the first step: those of a run whose rate is 0 in the second.
    run(start, one, RECORDS, **fields | {"train": train | {"final_share": 0, "schedule": "linear"}})
    policy, reference = load_model(one / "out").double(), load_model(start[0]).double()
    encoded = [encode_labelled(start[1], record, "here")[0] for record in RECORDS]
    parts = []
    for ids, mask in encoded:
        cut = list(mask).index(1)
        parts.append((ids[:cut], ids[cut:-1], ids[-1]))

    def ratio(prompt, answer):
        ids = torch.tensor([*prompt, *answer])
        packed, values = Packed.from_lengths([len(ids)]), []
        for model in (policy, reference):
            with torch.no_grad():
                rows = torch.log_softmax(model.logits(model(ids, packed.positions, packed)), -1)
            at = torch.arange(len(prompt) - 1, len(ids) - 1)
            values.append(rows[at, ids[at + 1]].sum())
        return values[0] - values[1]

    # The order of the second epoch, as the stage draws it.
    from openqwen.support.generators import Generators
    from openqwen.train.order import Epochs

    order = Epochs(6, 2, 6, Generators(1))
    both = order.batch(0) + order.batch(1)
    others = [ratio(parts[both[n]][0], parts[both[n - 1]][1]) for n in range(6, 12)]
    z = max(0.0, float(sum(others)) / 6)
    total = 0.0
    for prompt, answer, label in parts:
        sign, weight = (1, 1.5) if label else (-1, 0.5)
        total += weight * (1 - torch.sigmoid(sign * 0.5 * (ratio(prompt, answer) - z)))
    assert log[1]["kl"] == pytest.approx(z, rel=1e-3, abs=1e-5)
    assert log[1]["loss"] == pytest.approx(float(total) / 6, rel=1e-4)


def test_kto_learns_the_labels(start, tmp_path):
    train = {"learning_rate": 3e-3, "schedule": "constant"}
    fields = {"loss": "kto", "epochs": 20, "batch": 3, "train": train}
    _, log = run(start, tmp_path, RECORDS, **fields)
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    assert log[-1]["accuracy"] == 1.0


def test_pairs_and_messages_are_read_too(start, tmp_path):
    pair = {"prompt": "Say 1.", "chosen": "one", "rejected": "two"}
    talk = {"messages": [turn("user", "Say 1."), turn("assistant", "one")], "label": True}
    other = {"prompt": "Say 1.", "completion": "two", "label": 0}
    both = encode_labelled(start[1], pair, "here")
    assert both == [encode_labelled(start[1], record, "here")[0] for record in (talk, other)]
    assert [ids[-1] for ids, _ in both] == [1, 0]
    assert [mask[-1] for _, mask in both] == [0, 0]
    metrics, _ = run(start, tmp_path, [pair, talk], loss="kto", batch=3)
    assert (metrics["answers"], metrics["desirable"]) == (3, 2)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"prompt": "Say 1.", "completion": "one"}, "this is None"),
        ({"prompt": "Say 1.", "completion": "one", "label": "good"}, "this is 'good'"),
        ({"messages": [turn("user", "Say 1.")], "label": True}, "no answer to a prompt"),
    ],
)
def test_a_record_without_label_or_answer_is_named(start, tmp_path, record, what):
    with pytest.raises(OpenQwenError, match=what) as caught:
        run(start, tmp_path, [*RECORDS, record], loss="kto")
    assert "data.jsonl, record 7" in str(caught.value)


def pairs(*texts):
    return [
        {"prompt": f"Say {n}.", "chosen": chosen, "rejected": rejected}
        for n, (chosen, rejected) in enumerate(texts)
    ]


def test_pairs_of_equal_answers_are_left_out_and_counted(start, tmp_path):
    metrics, _ = run(start, tmp_path, pairs(("one", "two"), ("one", "one")))
    assert (metrics["pairs"], metrics["equal"]) == (1, 1)
    with pytest.raises(OpenQwenError, match="Both answers are the same in all 2 pairs"):
        run(start, tmp_path, pairs(("one", "one"), ("two", "two")))


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"loss": "ipo", "beta": 0.5}, 1.0),
        ({"loss": "ipo", "beta": 0.5, "length_normalized": True}, 1.0),
        ({"label_smoothing": 0.2}, 0.6931),
        ({"length_normalized": True, "beta": 2.0}, 0.6931),
    ],
)
def test_each_loss_learns_the_pairs(start, tmp_path, fields, first):
    train = {"learning_rate": 3e-3, "schedule": "constant", "precision": "float32"}
    data = pairs(("one", "two three"), ("one one", "two"), ("one", "three"))
    _, log = run(start, tmp_path, data, epochs=10, batch=3, train=train, **fields)
    assert log[0]["loss"] == pytest.approx(first, abs=1e-3)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "ipo", "label_smoothing": 0.1},
        {"loss": "kto", "first_difference": True},
        {"loss": "kto", "chosen_nll": 0.1},
        {"loss": "kto", "hottest": 1.0},
    ],
)
def test_settings_of_another_loss_are_refused(fields):
    with pytest.raises(ValueError, match=r"the loss (ipo|kto) has no"):
        DpoConfig(**fields)
