"""`openqwen synthesize pretraining`: what is written, what is refused, and who reads it."""

import os

import pytest
from method_runs import BAD, Marks, make
from scripted import Scripted, records

from openqwen.corpus import CorpusConfig, build_corpus
from openqwen.corpus.documents import read_documents
from openqwen.instruct.synthesize.methods.pretraining import (
    PretrainingText,
    PretrainingTextConfig,
)
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.train.reward_sources import RewardSourcesConfig

PARAGRAPH = (
    "The lamp in the tower was lit at dusk, as it had been for a hundred years. The keeper {n} "
    "climbed the stairs, counted them aloud, and thought of the ships that would pass that night. "
)
CHINESE = "灯塔的灯在黄昏点亮，守塔人数着台阶走上去，想着夜里经过的船只。" * 20
TOLD = "A lighthouse keeper goes up each evening and lights a lamp, so that ships find their way. "
CODE = """Write `steps(height, rise)`, which returns how many stairs reach a height.

```python
def steps(height, rise):
    "Stairs of one rise that reach a height."
    return -(-height // rise)
```

```python
assert steps(10, 3) == 4
assert steps(9, 3) == 3
```
"""


def pretraining(tmp_path, text=None, **settings):
    source = tmp_path / "seeds"
    source.mkdir(parents=True, exist_ok=True)
    text = text or "\n\n".join(PARAGRAPH.format(n=n) * 3 for n in range(6))
    (source / "book.txt").write_text(text)
    config = PretrainingTextConfig(**{"longest": 700, "per_document": 3, "least": 10, **settings})
    return PretrainingText(config, source, seed=1)


def written(tmp_path, said, **settings):
    model = said if callable(said) else Marks(other=said)
    _, _, gates, found = made(tmp_path, pretraining(tmp_path, **settings), model)
    return records(found, "documents"), gates, found


def made(tmp_path, method, model):
    """As `make`, for a method without D and P."""
    for name in ("demonstrations", "preferences"):
        method.files = (*method.files, name)
    return make(tmp_path, method, model)


def test_a_passage_in_other_words(tmp_path):
    asked = []
    told = Marks(other=lambda text, seed: asked.append(text) or f"{seed}: {TOLD}")
    documents, gates, _ = written(tmp_path, told, kinds=["rephrase"])
    assert len(documents) == len(asked) == 3
    assert gates["rephrase: usable"] == (3, 3)
    for document, prompt in zip(documents, asked):
        assert document["text"].endswith(TOLD.strip())
        assert document["id"] == document["origin"]["parents"][0] + "/rephrase"
        assert document["language"] == "en"
        marks = {"plain": "twelve", "encyclopedia": "encyclopedia", "conversation": "two people"}
        assert marks[document["origin"]["style"]] in prompt
        assert set(document["origin"]["prompts"]) == {"rephrase.en"}
        assert {"method", "model", "seed", "kind"} <= document["origin"].keys()


def test_chinese_seeds_have_chinese_prompts(tmp_path):
    said = Marks(
        (
            "不要照抄句子",
            "守塔人每晚点灯，让船只找到航路。"
            + "他走上台阶，一级一级地数，又想起远方的家人和海上的风雨。" * 2,
        ),
        other="no",
    )
    documents, _, _ = written(tmp_path, said, text=CHINESE, kinds=["rephrase"])
    assert documents
    assert {d["language"] for d in documents} == {"zh"}


@pytest.mark.parametrize("kind", ["rephrase", "textbook", "questions", "mathematics", "code"])
@pytest.mark.parametrize(
    "bad", [*BAD, "Sure! " + TOLD, TOLD + "This is what the given text says.", "对不起，我不能。"]
)
def test_what_is_no_text_is_refused(tmp_path, kind, bad):
    documents, _, found = written(tmp_path, bad, kinds=[kind], least=60)
    assert not documents
    assert len(found["quarantine.jsonl"].splitlines()) == 3


def test_copies_are_refused(tmp_path):
    copy = Marks(other=lambda text, seed: PARAGRAPH.format(n=text.split("keeper ")[1][0]) * 2)
    documents, _, found = written(tmp_path, copy, kinds=["rephrase"])
    assert not documents
    assert b"copied" in found["quarantine.jsonl"] or b"repeats" in found["quarantine.jsonl"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("Question: Who lights the lamp?\nAnswer: The keeper.", 3),
        ("**Question 1:** Who?\n\n**Answer 1:** The keeper.", 3),
        ("问题：谁点灯？\n答案：守塔人。", 3),
        ("Who lights the lamp? The keeper.", 0),
        ("Question: ?", 0),
    ],
)
def test_questions_need_answers(tmp_path, said, kept):
    assert len(written(tmp_path, said, kinds=["questions"])[0]) == kept


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        (["2 * 3 = 6, so \\boxed{6}"] * 3 + ["\\boxed{7}"], "2 * 3 = 6, so \\boxed{6}"),
        (["2 * 3 = 5, so \\boxed{6}", "\\boxed{6.0}", "\\boxed{6}", "\\boxed{1}"], "\\boxed{6.0}"),
        (["\\boxed{6}"] * 2 + ["\\boxed{7}"] * 2, None),
        (["\\boxed{6}"] * 2 + ["I do not know."] * 2, None),
        (["2 * 3 = 5, so \\boxed{5}"] * 4, None),
    ],
)
def test_solutions_must_agree(tmp_path, answers, kept):
    given = iter(answers)
    model = Marks(
        ("Reason step by step", lambda text, seed: next(given)), other="How many stairs are 2 x 3?"
    )
    documents, _, _ = written(tmp_path, model, kinds=["mathematics"], per_document=1)
    expected = [f"How many stairs are 2 x 3?\n\n{kept}"] if kept else []
    assert [document["text"] for document in documents] == expected


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (CODE, 1),
        (CODE.replace("== 4", "== 5"), 0),
        (CODE.replace("assert steps(9, 3) == 3\n", ""), 0),  # one test is too few
        (CODE.replace("def steps", "def stairs"), 0),
        (CODE.replace("    return", "    while True: pass\n    return"), 0),
        (CODE.replace("```", ""), 0),
    ],
)
def test_programs_must_pass_their_tests(tmp_path, text, kept):
    documents, gates, _ = written(tmp_path, text, kinds=["code"], per_document=1)
    assert [document["text"] for document in documents] == [text.strip()] * kept
    assert gates["code: usable"] == (1, 1)


LONGER = """
def longer(records, answers):
    return [None if "bad" in text else len(text.split()) for text in answers]
"""


def test_any_reward_filters(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(LONGER)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    texts = iter(["Short. ", TOLD, "bad " + TOLD])
    model = Marks(other=lambda text, seed: f"{next(texts)}{seed}")
    rewards = RewardSourcesConfig(sources=["own_reward:longer"], most_bad=1.0)
    settings = {"kinds": ["rephrase"], "rewards": rewards, "least_reward": 5}
    (document,), gates, found = written(tmp_path, model, **settings)
    assert document["text"].startswith(TOLD)
    assert document["origin"]["reward"] == 18
    assert gates["reward"] == (1, 3)
    assert b"reward: nan" in found["quarantine.jsonl"]


def test_a_reward_model_filters(tmp_path, monkeypatch):
    from openqwen.instruct.synthesize import batches

    class Model:
        @staticmethod
        def load(source):
            assert source == tmp_path / "model"
            return Model()

        def score(self, conversations):
            assert [c[-1]["role"] for c in conversations] == ["assistant"] * len(conversations)
            return [float(len(c[-1]["content"]) > 60) for c in conversations]

    monkeypatch.setattr(batches, "RewardModel", Model)
    texts = iter(["Short. ", TOLD, TOLD])
    model = Marks(other=lambda text, seed: f"{next(texts)}{seed}")
    settings = {"kinds": ["rephrase"], "reward": tmp_path / "model", "least_reward": 0.5}
    assert len(written(tmp_path, model, **settings)[0]) == 2


def test_the_corpus_stage_reads_what_was_written(tmp_path):
    """With its origin; and its filters decide about it."""
    words = [
        "the",
        "of",
        "and",
        "to",
        "river",
        "stone",
        "light",
        "paper",
        "harbour",
        "winter",
        "music",
        "garden",
        "letter",
    ]

    def essay(name):
        draw = Generators(1)[str(name)]
        lines = (" ".join(draw.choice(words, 14)).capitalize() + f" {name}." for _ in range(9))
        return " ".join(lines)

    said = Marks(other=lambda text, seed: "Too short." if seed % 2 else essay(seed))
    documents, _, found = written(tmp_path, said, kinds=["textbook"], per_document=6, shortest=300)
    raw = tmp_path / "raw/synthetic"
    raw.mkdir(parents=True)
    (raw / "documents.jsonl").write_bytes(found["documents.jsonl"])
    for n in range(4):
        (tmp_path / f"raw/{n}.txt").write_text(essay(n))
    out = tmp_path / "out"
    out.mkdir()
    build_corpus(CorpusConfig(folder=tmp_path / "raw", heldout_share=0.3), [], out)
    kept = [d for name in ("train", "heldout") for d in read_documents(out / f"{name}.parquet")]
    synthetic = [d for d in kept if d["source"] == "synthetic"]
    assert 1 <= len(synthetic) < len(documents)
    by_id = {d["id"]: d for d in documents}
    for document in synthetic:
        assert document["meta"]["origin"] == by_id[document["meta"]["id"]]["origin"]


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="kinds"):
        PretrainingTextConfig(kinds=["novel"])
    method = pretraining(tmp_path, rewards=RewardSourcesConfig(sources=["nowhere"]))
    model = Scripted(lambda text, seed: TOLD)
    with pytest.raises(OpenQwenError, match="There is no reward 'nowhere'"):
        made(tmp_path, method, model.answer)
    assert not model.asked
    empty = PretrainingText(PretrainingTextConfig(), tmp_path / "raw", 1)
    (tmp_path / "raw").mkdir()
    with pytest.raises(OpenQwenError, match="no documents"):
        list(empty.items())
