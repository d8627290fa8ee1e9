"""Our engine under lm-evaluation-harness, against the harness's own transformers backend."""

import json
import textwrap

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_chat import model, tokenizer

from openqwen.engine import Engine, Sampling
from openqwen.evaluate.lm_eval import EngineLM
from openqwen.model import save_checkpoint

TASKS = {
    "pick": """
        task: pick
        dataset_path: json
        dataset_kwargs: {data_files: {test: DATA}}
        test_split: test
        fewshot_split: test
        num_fewshot: 2
        output_type: multiple_choice
        doc_to_text: "Q: {{question}}\\nA:"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{label}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "roll": """
        task: roll
        dataset_path: json
        dataset_kwargs: {data_files: {test: DATA}}
        test_split: test
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
    """,
    "write": """
        task: write
        dataset_path: json
        dataset_kwargs: {data_files: {test: DATA}}
        test_split: test
        output_type: generate_until
        doc_to_text: "Q: {{question}}\\nA:"
        doc_to_target: "{{choices[label]}}"
        generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    records = [
        {
            "question": f"What follows {n}?",
            "choices": [str(n + 1), "a word", f"the number {n * 7}"],
            "label": 0,
            "text": f"Text {n}: " + "some words of no meaning, " * (1 + 40 * (n == 2)),
        }
        for n in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in TASKS.items():
        body = textwrap.dedent(text).replace("DATA", str(data))
        (folder / f"{name}.yaml").write_text(body)
    save_checkpoint(model(7), tokenizer(), folder / "model")
    return folder


@pytest.fixture(scope="module")
def both(place):
    """The harness's results and samples with our engine, and with transformers."""
    ours = EngineLM(str(place / "model"))
    # The long text must be cut into windows of the same length.
    theirs = HFLM(str(place / "model"), dtype="float32", device="cpu", max_length=300)
    ours.max_length = 300
    manager = TaskManager(include_path=str(place), include_defaults=False)
    results = [
        simple_evaluate(one, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
        for one in (ours, theirs)
    ]
    return ours, results


def test_choices_and_rolling_score_as_with_transformers(both):
    _, (ours, theirs) = both
    for task in ("pick", "roll"):
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), metric
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            found = [[r[0] for r in s["filtered_resps"]] if task == "pick" else s["filtered_resps"]
                     for s in (a, b)]  # fmt: skip
            assert found[0] == pytest.approx(found[1], abs=1e-4 * 300)
    first = [sample["filtered_resps"] for sample in ours["samples"]["pick"]]
    second = [sample["filtered_resps"] for sample in theirs["samples"]["pick"]]
    for a, b in zip(first, second, strict=True):
        assert [value for value, _ in a] == pytest.approx([value for value, _ in b], abs=1e-4)
        assert [greedy for _, greedy in a] == [greedy for _, greedy in b]


def test_greedy_answers_are_those_of_transformers(both):
    _, (ours, theirs) = both
    texts = [[s["resps"] for s in one["samples"]["write"]] for one in (ours, theirs)]
    assert texts[0] == texts[1]
    assert any(text for (text,) in texts[0][0])


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_likeliest_continuation_is_greedy_and_an_empty_context_has_a_token(both):
    lm, _ = both
    (answer,) = lm.engine.generate(["Q:"], Sampling(max_tokens=3))
    (found,) = lm._loglikelihood_tokens([(None, answer.prompt_ids, answer.token_ids)])
    assert found == (pytest.approx(sum(answer.logprobs), abs=1e-4), True)
    ((total, greedy),) = lm.loglikelihood([request("loglikelihood", "", "Q:")])
    assert total < 0
    assert not greedy
    assert EngineLM(Engine(model(7), tokenizer())).prefix_token_id == tokenizer().endoftext_id


def test_settings_of_generation_become_a_sampling():
    from openqwen.evaluate.lm_eval import _sampling

    sampling = _sampling({"until": "\n", "max_gen_toks": 5, "temperature": 0.7, "top_p": 0.9}, 3)
    assert (sampling.stop, sampling.max_tokens, sampling.seed) == (("\n",), 5, 3)
    assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
    greedy = _sampling({"do_sample": False, "temperature": 0.7, "until": ["a", ""]}, 0)
    assert greedy.greedy
    assert greedy.stop == ("a",)
    assert not _sampling({"do_sample": True}, 0).greedy


def test_chats_are_rendered_as_the_template_says(both):
    lm, _ = both
    text = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer().im_start_id in lm.tok_encode(text)
