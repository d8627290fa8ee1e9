"""Fine-tuning on demonstrations: what is kept, what adapters leave behind, what is refused."""

import json

import numpy as np
import pytest
import torch

from openqwen.model import ModelConfig, Packed, Qwen2, initialize, load_model, save_checkpoint
from openqwen.model.lora import LoraConfig, add_adapters, load_adapter
from openqwen.recipe.graph import recipe_class
from openqwen.recipe.settings import find_recipe, load_settings
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from openqwen.train.conversations import encode_answer, encode_demonstration, whole_turns
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig, learning_rate
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.sft import SftConfig, sft
from openqwen.train.trainer import Place


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))
    model = Qwen2(
        ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=256, tie_word_embeddings=True)
    )
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder)
    return folder, tokenizer


def demonstrations(path, words=(1, 2, 3, 4)):
    with open(path, "w") as file:
        for n in words:
            turns = [
                ("user", f"Say {n}."),
                ("assistant", "one " * n),
                ("user", "More."),
                ("assistant", "two " * n),
            ]
            file.write(
                json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n"
            )
    return path


def run(start, data, folder, **fields):
    config = SftConfig(
        **{"batch": 2, "epochs": 2, "train": OptimizerConfig(learning_rate=1e-2)} | fields
    )
    return sft(
        config, start[0], data, start[1], Place(folder / "out", folder / "scratch", 1, "sft")
    )


def test_a_conversation_is_cut_behind_an_answer():
    mask = np.array([0, 0, 1, 1, 0, 0, 0, 1, 1, 1], bool)
    assert [whole_turns(mask, limit) for limit in (9, 4, 3)] == [4, 4, 0]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize(
    "template",
    [
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% "
            "endfor %}"
        ),
        (
            "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token + '\n' "
            "}}{% endfor %}"
        ),
    ],
)
def test_the_end_of_a_turn_is_a_target_whatever_the_template_prints(start, template, end):
    trained = start[1]
    tokenizer = Tokenizer(
        trained.vocabulary, trained.merges, template=template, settings={"eos_token": end}
    )
    asked, said = {"role": "user", "content": "Say"}, {"role": "assistant", "content": "one"}
    for ids, mask in (
        encode_demonstration(tokenizer, {"messages": [asked, said]}, "here"),
        encode_answer(tokenizer, [asked], said),
    ):
        assert ids[-1] == tokenizer.control_ids[end]
        learned = [i for i, marked in zip(ids, mask) if marked]
        assert tokenizer.decode(learned, skip_control=False) == f"one{end}"


def test_long_conversations_are_counted(start, tmp_path):
    data = demonstrations(tmp_path / "d.jsonl", (1, 2, 30))
    metrics = run(start, data, tmp_path, max_length=140)
    assert (metrics["examples"], metrics["too_long"], metrics["truncated"]) == (2, 1, 0)
    metrics = run(start, data, tmp_path / "cut", max_length=140, too_long="truncate")
    assert (metrics["examples"], metrics["too_long"], metrics["truncated"]) == (3, 0, 1)
    with pytest.raises(OpenQwenError, match=r"tokens, and 140 fit(.|\n)*record 3"):
        run(start, data, tmp_path / "refused", max_length=140, too_long="refuse")


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.999), ("int4", 0.98)])
def test_adapters_learn_over_packed_matrices(start, tmp_path, kind, near):
    """Their gradient is near the one over whole matrices; what they learn is merged into the whole
    ones.
    """
    gradients = {}
    for base in ("none", kind):
        model = load_model(start[0])
        add_adapters(model, LoraConfig(rank=4, base=base), torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        for n, p in model.named_parameters():
            if n.endswith("lora_B"):
                p.data.normal_(0, 0.1, generator=generator)
        next_token(model, PackedBatch.of([(list(range(3, 40)), [1] * 37)])).sum.backward()
        gradients[base] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        )
    assert torch.nn.functional.cosine_similarity(gradients["none"], gradients[kind], dim=0) > near
    data = demonstrations(tmp_path / "d.jsonl")
    plain = run(start, data, tmp_path / "plain", lora=LoraConfig(rank=4, alpha=8))
    metrics = run(start, data, tmp_path, lora=LoraConfig(rank=4, alpha=8, base=kind))
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=0.02)
    merged, adapted = load_model(tmp_path / "out"), load_model(start[0])
    load_adapter(adapted, tmp_path / "out" / "adapter")
    tokens, packed = torch.arange(20), Packed.from_lengths([20])
    hidden = [m(tokens, packed.positions, packed) for m in (merged, adapted)]
    torch.testing.assert_close(*hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_on_the_start_is_the_merged_network(start, tmp_path, dora):
    data = demonstrations(tmp_path / "d.jsonl")
    run(start, data, tmp_path, lora=LoraConfig(rank=4, alpha=8, dora=dora))
    merged, adapted = load_model(tmp_path / "out"), load_model(start[0])
    load_adapter(adapted, tmp_path / "out" / "adapter")
    tokens, packed = torch.arange(20), Packed.from_lengths([20])
    hidden = [m(tokens, packed.positions, packed) for m in (merged, adapted, load_model(start[0]))]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-5)
    assert (hidden[0] - hidden[2]).abs().max() > 1e-2


def test_faults_of_the_data_are_named_or_counted(start, tmp_path):
    def file(*turns):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        talks = [[{"role": r, "content": c} for r, c in talk] for talk in turns]
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        return path

    good = [("user", "Say 1."), ("assistant", "one")]
    with pytest.raises(OpenQwenError, match=r"needs a role(.|\n)*record 2, message"):
        run(start, file(good, [("user", "Say 1."), ("robot", "one")]), tmp_path)
    with pytest.raises(OpenQwenError, match=r"No assistant turn(.|\n)*record 1"):
        run(start, file([("user", "Say 1.")]), tmp_path)
    metrics = run(start, file(good, [("user", "Say 1."), ("assistant", " ")]), tmp_path)
    assert metrics["empty_answers"] == 1


def losses(folder):
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return {
        m["step"]: m["validation_loss"] for m in map(json.loads, lines) if "validation_loss" in m
    }


def test_held_out_demonstrations_are_measured_and_not_learned(start, tmp_path):
    data = demonstrations(tmp_path / "d.jsonl", range(1, 11))
    metrics = run(start, data, tmp_path, validation={"share": 0.2, "every": 3})
    assert (metrics["examples"], metrics["held_out"]) == (8, 2)
    assert list(losses(tmp_path)) == [2, 5, 7]
    other = demonstrations(tmp_path / "other.jsonl", (3, 5))
    metrics = run(start, data, tmp_path / "file", validation={"file": other})
    assert (metrics["examples"], metrics["held_out"]) == (10, 2)
    assert list(losses(tmp_path / "file")) == [9]
    with pytest.raises(OpenQwenError, match=r"validation\.share"):
        run(
            start,
            demonstrations(tmp_path / "one.jsonl", (1,)),
            tmp_path / "one",
            validation={"share": 0.5},
        )


def test_the_best_weights_are_the_outcome(start, tmp_path):
    """Learning one answer makes another worse, so that the best step is an early one."""
    data = demonstrations(tmp_path / "d.jsonl", range(1, 11))
    other = tmp_path / "other.jsonl"
    talk = [{"role": "user", "content": "Say 3."}, {"role": "assistant", "content": "QQQQQQ"}]
    other.write_text(json.dumps({"messages": talk}) + "\n")
    fields = {"validation": {"file": other, "every": 1, "outcome": "best"}, "epochs": 4}
    metrics = run(start, data, tmp_path, **fields)
    found = losses(tmp_path)
    assert min(found.values()) < found[19]
    assert metrics["best_validation_loss"] == min(found.values())
    model = load_model(tmp_path / "out")
    rows = PackedBatch.of([encode_demonstration(start[1], json.loads(other.read_text()), "here")])
    with torch.no_grad():
        loss = next_token(model, rows)
    assert loss.sum.item() / loss.count == pytest.approx(min(found.values()), rel=1e-4)


def test_a_tokenizer_that_is_too_large_is_refused(start, tmp_path):
    large = train_tokenizer(
        ["abcdefgh ijklmnop qrst uvwxyz " * 9, "Say one two three. " * 9], TokenizerConfig()
    )
    small = Qwen2(ModelConfig(300, 32, 48, 2, 4, 2))
    initialize(small, torch.Generator().manual_seed(1))
    save_checkpoint(small, start[1], tmp_path / "small")
    assert large.vocab_size > 300
    with pytest.raises(OpenQwenError, match="only 300 rows"):
        run((tmp_path / "small", large), demonstrations(tmp_path / "d.jsonl"), tmp_path)


def test_a_bad_step_is_named_by_its_records(start, tmp_path, monkeypatch):
    real = torch.nn.utils.get_total_norm
    calls = []

    def broken(gradients):
        calls.append(1)
        return real(gradients) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", broken)
    with pytest.raises(OpenQwenError, match=r"step 2 of sft \(records \d, \d\)"):
        run(start, demonstrations(tmp_path / "d.jsonl"), tmp_path)


def test_the_shipped_recipe_is_the_report_s():
    config = load_settings(find_recipe("qwen2-sft"), recipe_class()).sft
    assert (config.epochs, config.max_length) == (2, 32_768)
    assert (config.train.learning_rate, config.train.weight_decay, config.train.clip) == (
        7e-6,
        0.1,
        1.0,
    )
    rates = [learning_rate(config.train, step, 1_000) for step in range(1_000)]
    assert max(rates) == pytest.approx(7e-6)
    assert rates[-1] == pytest.approx(7e-7, rel=1e-3)
    assert config.train == SftConfig().train
