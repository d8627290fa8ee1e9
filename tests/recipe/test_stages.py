"""The recipe itself: what stands beside what, and what its stages read."""

import random

from openqwen.corpus.documents import write_documents
from openqwen.recipe.stage import Work
from openqwen.recipe.stages import Recipe, run_tokenizer, stages_of
from openqwen.support.files import write_json
from openqwen.tokenizer import TokenizerConfig, load_tokenizer


def test_every_aligned_model_stands_beside_the_model_that_it_was_trained_from():
    inputs = {stage.name: stage.inputs for stage in stages_of(Recipe())}
    aligned = {name: roles for name, roles in inputs.items() if "start" in roles}
    assert set(aligned) == {"evaluate-dpo", "evaluate-online-dpo"}
    for roles in aligned.values():
        assert roles["start"] == f"evaluate-{inputs[roles['model']]['model']}"
    assert inputs["online-dpo"]["model"] == "sft"


def test_the_vocabulary_sees_every_source_of_the_mixture(tmp_path):
    """In the order of paths the first bytes were all code: no task was seen."""
    draw = random.Random(0)
    words = [f"word{''.join(draw.choices('abcdefghij', k=6))}" for _ in range(2000)]
    documents = [
        {"id": f"code/{i:05}", "text": " ".join(draw.choices(words, k=40)), "source": "code"} for i in range(1000)
    ] + [
        {"id": f"tasks/{i:05}", "text": "Question: lighthouse? Answer: lighthouse", "source": "tasks"}
        for i in range(200)
    ]
    documents = [{**document, "language": "en", "meta": {}} for document in documents]
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_documents(corpus / "train.parquet", documents)
    write_documents(corpus / "heldout.parquet", documents[:1])
    sizes = {
        "code": sum(len(d["text"]) for d in documents[:1000]),
        "tasks": sum(len(d["text"]) for d in documents[1000:]),
    }
    sources = {name: {"bytes": size, "weight": 0.5} for name, size in sizes.items()}
    write_json(corpus / "corpus.json", {"sources": sources})
    texts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        config = TokenizerConfig(vocabulary=500, max_bytes=10_000)
        run_tokenizer(Work(config, {"corpus": corpus}, tmp_path / name, tmp_path, 1, "tokenizer"))
        tokenizer = load_tokenizer(tmp_path / name)
        assert len(tokenizer.encode(" lighthouse")) == 1
        texts.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert texts[0] == texts[1]
