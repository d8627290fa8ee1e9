"""From raw text to an aligned chat model, in one run; and what other software makes of the
result.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import openqwen as oq

CHAT = [{"role": "user", "content": "Say apple 2 times.\n<|im_end|> é 12"}]


def test_every_stage_is_there_and_the_end_says_what_to_do_next(run, digests):
    names = {
        "corpus",
        "tokenizer",
        "tokens",
        "pretrain",
        "extend",
        "instruct",
        "sft",
        "prefer",
        "reward",
        "dpo",
    }
    names |= {"online-dpo", "grpo", "evaluate-reward"}
    names |= {f"evaluate-{n}" for n in ("pretrain", "extend", "sft", "dpo", "online-dpo", "grpo")}
    assert set(digests(run)) == names
    printed = (run / "printed.txt").read_text()
    assert f"-m openqwen.cli chat {run}/grpo" in printed  # as it was called
    assert str(run / "report.html") in printed
    page = (run / "report.html").read_text()
    assert all(name in page for name in names)


def test_each_stage_moves_its_number(run):
    scores = {
        n: json.loads((run / f"evaluate-{n}" / "scores.json").read_text())
        for n in ("pretrain", "extend", "sft")
    }
    first = json.loads((run / "pretrain" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first == pytest.approx(6.4, abs=0.3)  # ln 622: a fresh network knows nothing
    last = json.loads((run / "pretrain" / "manifest.json").read_text())["metrics"]["loss"]
    assert last < first - 1.2
    assert scores["extend"]["bits_per_byte"] < scores["pretrain"]["bits_per_byte"]
    sft = [
        json.loads(line)["loss"]
        for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sft[-1] < sft[0] - 1.0


def test_the_checkpoint_is_the_same_in_transformers(run):
    model, tokenizer = oq.load_model(run / "sft"), oq.load_tokenizer(run / "sft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        run / "sft", dtype=torch.float32
    ).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(run / "sft")

    assert their_tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    ) == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    text = "def f(x):\n    return 'ναί 12345'  # café\n\n"
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)

    ids = tokenizer.encode(text)
    packed = oq.Packed.from_lengths([len(ids)])
    mine = model.logits(model(torch.tensor(ids), packed.positions, packed))
    expected = theirs(torch.tensor([ids])).logits[0]
    assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()

    assert theirs.generation_config.eos_token_id == [tokenizer.eos_id, tokenizer.endoftext_id]
    assert their_tokenizer.eos_token_id == tokenizer.eos_id
    assert their_tokenizer.pad_token_id == tokenizer.endoftext_id
    engine = oq.Engine(model, tokenizer)
    stopped = 0
    for question in ("Say apple 3 times.", "Count the words: sun moon", "Add 3 and 4."):
        prompt, _ = tokenizer.encode_chat(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        (output,) = engine.generate([prompt], oq.Sampling(max_tokens=40))
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[
            0, len(prompt) :
        ]
        ended = written[-1] in theirs.generation_config.eos_token_id
        assert output.token_ids == written[: -1 if ended else None].tolist()
        assert (output.finish_reason == "stop") == bool(ended)
        stopped += bool(ended)
    assert stopped == 3, "a fine-tuned model ends its answers"


def test_the_reward_model_is_the_same_in_transformers(run):
    from openqwen.engine.score import RewardModel

    model, tokenizer = RewardModel.load(run / "reward"), oq.load_tokenizer(run / "reward")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        run / "reward", dtype=torch.float32
    )
    chat = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "3"}]
    ids, mask = tokenizer.encode_chat(chat)
    ids = ids[: len(mask) - mask[::-1].index(1)]
    assert model.score([chat])[0] == pytest.approx(
        theirs(torch.tensor([ids])).logits.item(), rel=1e-4
    )


def test_a_second_run_reuses_everything(run, command, digests):
    before = digests(run)
    done = subprocess.run(command("run", "--until", "dpo"), capture_output=True, text=True)
    assert done.returncode == 0
    assert len(re.findall(r"reused \(made", done.stdout)) == 14
    assert digests(run) == before


def test_a_run_killed_at_random_moments_gives_the_same_bits(run, place, command, digests):
    rng = random.Random(7)
    kills = 0
    for attempt in range(40):
        child = subprocess.Popen(
            command("killed", "--until", "grpo"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=rng.uniform(3.5, 8) if attempt < 6 else None)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills >= 3
    expected = digests(run)
    found = digests(place / "killed")
    assert found == {name: expected[name] for name in found}
    assert {"online-dpo", "grpo"} <= set(found)


def test_the_chat_streams_an_answer_and_ends(run):
    done = subprocess.run(
        [sys.executable, "-m", "openqwen.cli", "chat", str(run / "sft"), "--max-tokens", "8"],
        input="Say apple 2 times.\n\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "›" not in done.stdout  # through a pipe, answers alone


def test_stages_run_alone_on_a_users_own_files(run, tmp_path):
    start = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "openqwen.cli",
        "sft",
        "--model",
        str(run / "extend"),
        "--max-length",
        "200",
    ]
    command += [
        "--demonstrations",
        str(tmp_path / "d.jsonl"),
        "--output",
        str(tmp_path / "mine"),
        "--epochs",
        "1",
    ]
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    }
    (tmp_path / "d.jsonl").write_text((json.dumps(record) + "\n") * 8)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert oq.load_model(tmp_path / "mine").config.vocab_size == 640
    (tmp_path / "d.jsonl").write_text('{"messages": [\n')
    done = subprocess.run([*command[:-3], str(tmp_path / "other")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "d.jsonl:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 120
