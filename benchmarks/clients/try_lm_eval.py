"""lm-eval against a server, on a task of its own without network; see checks.py.

TOKENIZER names a folder with the model's tokenizer, for who does not ask the server for it.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from checks import MODEL, Choice, check, main
from lm_eval import simple_evaluate

ROWS = [
    {"question": "The capital of France is", "choices": [" Paris", " Oslo"], "answer": 0},
    {"question": "2, 4, 6, 8,", "choices": [" 3", " 10"], "answer": 1},
]
LIKELIER = {
    "task": "likelier",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
WRITTEN = {
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


def _run(url: str, model: str, route: str, task: Any, **more: Any) -> list[Any]:
    """What was made of each row."""
    given = {"base_url": f"{url}/v1/{route}", "model": MODEL, "max_retries": 1, **more}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        whole = {"test_split": "test", "doc_to_text": "{{question}}", **source, **task}
        chats = {"apply_chat_template": True} if "chat" in model else {}
        options: Any = {"batch_size": 1, "bootstrap_iters": 0, "cache_requests": False, **chats}
        result: Any = simple_evaluate(model, given, [whole], **options)
    samples = result["samples"][task["task"]]
    return [sample["filtered_resps"] for sample in samples]


def _scored(url: str, **more: Any) -> list[Any]:
    return _run(url, "local-completions", "completions", LIKELIER, **more)


@check("log-likelihood, the server's tokenizer")
def _remote(url: str, strict: str) -> None:
    scores = _scored(url)
    assert all(score[0] < 0 for row in scores for score in row)
    best = [max(range(2), key=lambda i: row[i][0]) for row in scores]
    if best != [row["answer"] for row in ROWS]:
        raise Choice(f"it finds {best} likelier")


@check("log-likelihood, transformers' tokenizer")
def _local(url: str, strict: str) -> None:
    theirs = _scored(url, tokenizer_backend="huggingface", tokenizer=os.environ["TOKENIZER"])
    pairs = [(a[0], b[0]) for one, two in zip(_scored(url), theirs) for a, b in zip(one, two)]
    assert all(abs(a - b) < 0.01 for a, b in pairs), pairs


@check("generation")
def _written(url: str, strict: str) -> None:
    assert all(row[0] for row in _run(url, "local-completions", "completions", WRITTEN))


@check("generation, as a chat")
def _chat(url: str, strict: str) -> None:
    route = "chat/completions"
    assert all(row[0] for row in _run(url, "local-chat-completions", route, WRITTEN))


main()
