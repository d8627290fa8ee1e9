"""Small files in the form in which each benchmark is published; the questions are made up here."""

import base64
import json
import pickle
import random
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from multipl_e import MULTIPL_E

LETTERS = "question\nA,B,C,D\n"
CHOICES = [
    ["How many legs has a dog, plainly?", "2", "4", "6", "8", "B"],
    ["Which is a colour?", "red", "run", "ten", "two, or three", "A"],
]
GSM = [
    {
        "question": f"Ann has {n} pens and buys 2. How many?",
        "answer": f"<<{n}+2={n + 2}>>So.\n#### {n + 2}",
    }
    for n in range(5)
]
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}
MBPP = [
    {
        "task_id": n,
        "text": f"Write a function to add {n}.",
        "code": f"def plus(x):\r\n    return x + {n}",
        "test_list": [f"assert plus(1) == {n + 1}"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for n in (2, 3, 4, 11, 511)
]
MBPP_PLUS = {
    "task_id": "Mbpp/11",
    "prompt": '"""\nWrite a function to add 11.\nassert plus(1) == 12\n"""\n',
    "entry_point": "plus",
    "canonical_solution": "\ndef plus(x):\n    return x + 11\n",
    "base_input": [[1]],
    "plus_input": [[2]],
    "atol": 0,
    "contract": "",
    "assertion": "\nassert plus(1) == 12\nassert plus(2) == 13\n",
}
MATH = {
    "problem": "What is $1+1$?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": "It is $\\boxed{2}$.",
}
PRO = {
    "question_id": 7,
    "question": "Which is even?",
    "options": ["1", "2", "3", "5", "7"],
    "answer": "B",
    "answer_index": 1,
    "cot_content": "A: Let's think step by step. Two is even. The answer is (B).",
    "category": "math",
    "src": "made up",
}
REDUX = {
    "question": "Which is odd?",
    "choices": ["2", "3", "4", "6"],
    "answer": 1,
    "error_type": "ok",
}
ARC = {
    "id": "q1",
    "question": {
        "stem": "What is water?",
        "choices": [{"text": "a liquid", "label": "A"}, {"text": "a stone", "label": "B"}],
    },
    "answerKey": "A",
}
HELLA = {
    "ind": 1,
    "activity_label": "Washing",
    "ctx_a": "A man holds a plate.",
    "ctx_b": "he",
    "ctx": "A man holds a plate. he",
    "label": 2,
    "endings": ["eats it. [title] No", "sings [noise] it.", "dries it.", "is it."],
}
WINO = {
    "qID": "q1",
    "sentence": "The cup is not in the bag, since the _ is too large.",
    "option1": "cup",
    "option2": "bag",
    "answer": "1",
}
TRUTH = {
    "question": "Can pigs fly?",
    "mc1_targets": {"No.": 1, "Yes.": 0},
    "mc2_targets": {"No.": 1, "They cannot.": 1, "Yes.": 0},
}
GPQA = (
    "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,"
    "High-level domain\nrec1,Which is a noble gas?,neon,iron,gold,lead,Chemistry\n"
    "rec2,Which is a metal?,iron,neon,argon,xenon,Chemistry\n"
)
THEOREM = [
    {
        "Question": f"What is {n} squared?",
        "Answer": n * n,
        "Answer_type": "integer",
        "Picture": None,
        "id": f"t{n}",
    }
    for n in range(7)
]


MT_BENCH = [
    {"question_id": n, "category": category, "turns": [f"Say {n}.", f"Again {n}?"]}
    for n, category in ((81, "writing"), (101, "math"))
]
MT_REFERENCE = {"question_id": 101, "choices": [{"index": 0, "turns": ["It is 7.", "It is 8."]}]}
MT_JUDGES = [
    {
        "name": f"single{kind}-v1{turn}",
        "type": "single",
        "system_prompt": f"Judge{kind}{turn}.",
        "prompt_template": (
            "Q {question_1} A {answer_1} Q {question_2} A {answer_2}"
            if turn
            else "Q {question} A {answer}"
        )
        + (" R {ref_answer_1} {ref_answer_2}" if kind else "")
        + " as [[rating]]",
        "output_format": "[[rating]]",
    }
    for kind in ("", "-math")
    for turn in ("", "-multi-turn")
]
ARENA = [
    {
        "question_id": f"q{n}",
        "category": "arena-hard-v0.1",
        "cluster": "Colours",
        "turns": [{"content": f"Name colour {n}."}],
    }
    for n in range(3)
]
ARENA_BASELINE = [
    {
        "question_id": f"q{n}",
        "model_id": "gpt-4-0314",
        "choices": [{"index": 0, "turns": [{"content": "blue " * n, "token_len": n}]}],
    }
    for n in range(3)
]
ALIGNBENCH = [
    {
        "question_id": n,
        "category": category,
        "subcategory": kind,
        "question": "为什么{answer}？",
        "reference": "因为。",
    }
    for n, category, kind in ((1, "逻辑推理", "推理"), (2, "文本写作", "创意文体写作"))
]
LVEVAL = {
    "input": "Who wrote it?",
    "context": "A long text. Ann wrote it.",
    "answers": ["It was Ann Lee."],
    "answer_keywords": "Ann Lee",
    "language": "en",
    "length": 6,
}
SQUAD = {
    "data": [
        {
            "title": name,
            "paragraphs": [
                {
                    "context": f"{name} has {n} legs and lives in town {n}.",
                    "qas": [
                        {
                            "question": f"How many legs has {name} of town {n}?",
                            "answers": [{"text": str(n), "answer_start": 5}],
                            "is_impossible": False,
                        }
                    ],
                }
                for n in range(2, 90)
            ],
        }
        for name in ("Rex", "Tom")
    ]
}
HOTPOT = [
    {
        "question": f"Where is {n}?",
        "answer": f"hill {n}",
        "context": [[f"Hill {n}", [f"Hill {n} is near.", f" It holds {n}."]], ["Sea", ["Blue."]]],
    }
    for n in range(60)
]


BELEBELE = [
    {
        "link": f"https://a/{n}",
        "question_number": 1,
        "flores_passage": f"Ann has {n} hens.",
        "question": "How many hens has Ann? ",
        "mc_answer1": str(n + 1),
        "mc_answer2": str(n),
        "mc_answer3": "none",
        "mc_answer4": "ten",
        "correct_answer_num": "2",
        "dialect": "deu_Latn",
    }
    for n in (3, 5)
]
XCOPA = [
    {
        "premise": f"Der Becher {n} fiel.",
        "choice1": "Er brach.",
        "choice2": "Er sang.",
        "question": kind,
        "label": 0,
        "idx": n,
        "changed": False,
    }
    for n, kind in enumerate(("effect", "cause"))
]
M3EXAM = [
    {
        "question_text": "2 + 2?",
        "background_description": ["Read."],
        "answer_text": answer,
        "options": options,
        "need_image": image,
        "language": "thai",
        "level": "low",
        "subject_category": "math",
    }
    for answer, options, image in (
        ("2", ["1. three", "2. four"], "no"),
        ("(B)", ["(A) three", "(B) four"], "no"),
        ("9", ["1. three", "2. four"], "no"),
        ("1", ["1. three", "2. four"], "yes"),
    )
]
INDOMMLU = (
    "subject,level,soal,jawaban,kunci,is_for_fewshot\n"
    'IPA,SD,Air itu apa?,"A. cair\nB. batu\nC. api",A,1\n'
    'IPA,SD,Api itu apa?,"A. dingin\nB. batu\nC. panas",C,0\n'
    'IPA,SD,Tanpa kunci?,"A. ya\nB. tidak",D,0\n'
)
OKAPI = [
    {"instruction": f"Was ist {n}? ", "answer": "C", "id": str(n)}
    | {f"option_{letter}": f"{letter}{n}" for letter in "abcd"}
    for n in range(2)
]
TURKISH = [
    {"question": f"{n} nedir? ", "choices": list("vwxyz"), "answer": "E", "subject": "Fizik"}
    for n in range(2)
]


def book(words: int, seed: int = 0) -> str:
    """A made-up book of sentences with different words."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfglmnprst" for b in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.choice([2, 3, 4]))) for _ in range(3000)]
    sentences = []
    while words > 0:
        size = rng.randrange(4, 16)
        sentences.append(" ".join(rng.choices(vocabulary, k=size)).capitalize() + ".")
        words -= size
    return " ".join(sentences)


RUMMLU = [
    {
        "instruction": "Задание: {text}\nA {option_a}\nB {option_b}\nC {option_c}\nD {option_d}",
        "inputs": {
            "text": f"Сколько будет {n} + 1?",
            **{f"option_{letter}": str(n + k) for k, letter in enumerate("abcd")},
            "subject": "Абстрактная алгебра",
        },
        "outputs": "B",
        "meta": {"domain": "abstract_algebra", "id": n},
    }
    for n in (1, 2)
]
PRIVATE = [{"input": "3 4\n", "output": "7\n", "testtype": "stdin"}]
LCB = [
    {
        "question_title": "Sum",
        "question_content": "Add two numbers.",
        "platform": "atcoder",
        "question_id": "abc1",
        "contest_date": "2023-08-05T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(
            zlib.compress(pickle.dumps(json.dumps(PRIVATE)))
        ).decode(),
        "metadata": "{}",
    },
    {
        "question_title": "Pair",
        "question_content": "Both.",
        "platform": "leetcode",
        "question_id": "2999",
        "contest_date": "2024-09-30T00:00:00",
        "starter_code": "class Solution:\n    def both(self, a: List[int], b: int) -> List[int]:\n",
        "difficulty": "hard",
        "public_test_cases": json.dumps(
            [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]
        ),
        "private_test_cases": "[]",
        "metadata": '{"func_name": "both"}',
    },
    {
        "question_title": "Late",
        "question_content": "No.",
        "question_id": "late",
        "contest_date": "2024-10-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": "[]",
        "private_test_cases": "[]",
        "metadata": "{}",
    },
]
MULTIJAIL = "id,en,zh,it,source,tags\n0,How?,怎么？,Come?,made up,['x']\n"


def ifeval(language: str) -> dict[str, Any]:
    return {
        "key": 1000,
        "prompt": "Say something without any commas.",
        "instruction_id_list": [f"{language}:punctuation:no_comma"],
        "kwargs": [{}],
    }


def write_all(folder: Path) -> None:
    """Write every set below a data folder, where the benchmarks look for it."""
    rows = [",".join(f'"{cell}"' for cell in row) for row in CHOICES]
    plain, numbered = (
        "\n".join(rows) + "\n",
        "\n".join(f"{n},{row}" for n, row in enumerate(rows)) + "\n",
    )
    header = "id,question,A,B,C,D,answer\n"
    explained = "".join(f'{n},{row},"why"\n' for n, row in enumerate(rows))
    texts = {
        "mmlu/test/anatomy_test.csv": plain,
        "mmlu/dev/anatomy_dev.csv": plain.replace("plainly", "clearly"),
        "ceval/val/law_val.csv": header + numbered,
        "ceval/dev/law_dev.csv": "id,question,A,B,C,D,answer,explanation\n" + explained,
        "cmmlu/test/arts.csv": ",Question,A,B,C,D,Answer\n" + numbered,
        "cmmlu/dev/arts.csv": ",Question,A,B,C,D,Answer\n" + numbered,
        "gpqa/gpqa_main.csv": GPQA,
        "ammlu/test/anatomy_test.csv": plain,
        "ammlu/dev/anatomy_dev.csv": plain.replace("plainly", "clearly"),
        "mmmlu/mmlu_DE-DE.csv": ",Question,A,B,C,D,Answer,Subject\n"
        + "".join(f"{n},Was ist {n}?,1,2,3,4,B,anatomy\n" for n in (3, 4)),
        "mmmlu/mmlu_SW-KE.csv": ",Question,A,B,C,D,Answer,Subject\n0,Ni nini?,1,2,3,4,B,anatomy\n",
        "indommlu/IndoMMLU.csv": INDOMMLU,
        "kmmlu/Law-test.csv": "question,answer,A,B,C,D\nWhat?,3,a,b,c,d\n",
        "kmmlu/Law-dev.csv": "question,answer,A,B,C,D\nWhy?,1,a,b,c,d\n",
        "jmmlu/anatomy.csv": plain,
        "paws-x/fr/test_2k.tsv": 'id\tsentence1\tsentence2\tlabel\n1\tIl "va".\tElle va.\t0\n',
        "paws-x/fr/dev_2k.tsv": "id\tsentence1\tsentence2\tlabel\n1\tIl lit.\tLui lit.\t1\n",
        "xstorycloze/spring2016.val.es.tsv.split_20_80_eval.tsv": (
            "InputStoryid\tInputSentence1\tInputSentence2\tInputSentence3\tInputSentence4\t"
            "RandomFifthSentenceQuiz1\tRandomFifthSentenceQuiz2\tAnswerRightEnding\n"
            "a\tUno.\tDos.\tTres.\tCuatro.\tOcho.\tCinco.\t2\n"
        ),
        "m3exam/thai-questions-test.json": json.dumps(M3EXAM),
        "m3exam/thai-questions-dev.json": json.dumps(M3EXAM[:1]),
        "mgsm/mgsm_de.tsv": 'Ann hat 3 "Stifte" und kauft 2. Wie viele?\t5\n',
        "bbh/cot-prompts/navigate.txt": "canary\n-----\nWalk.\n\nQ: Is it so?\nA: The answer is Yes.\n",
        "bbh/bbh/navigate.json": json.dumps(
            {"canary": "x", "examples": [{"input": "Go.", "target": "No"}]}
        ),
        "multijail/MultiJail.csv": MULTIJAIL,
        "books/one.txt": book(30_000),
        "books_zh/one.txt": "山高水长。月落乌啼霜满天，江枫渔火对愁眠。" * 2000,
        "ruler/dev-v2.0.json": json.dumps(SQUAD),
        "ruler/hotpot_dev_distractor_v1.json": json.dumps(HOTPOT),
        "truthfulqa/mc_task.json": json.dumps([TRUTH]),
        "theoremqa/theoremqa_test.json": json.dumps(THEOREM),
        "MATH/test/algebra/1.json": json.dumps(MATH, indent=1),
    }
    texts |= {f"MATH/train/algebra/{n}.json": json.dumps(MATH) for n in range(4)}
    plus = HUMANEVAL | {"base_input": [[1]], "plus_input": [[2.5], [-float("inf")]], "atol": 1e-6}
    lines: dict[str, list[dict[str, Any]]] = {
        "HumanEval.jsonl": [HUMANEVAL],
        "HumanEvalPlus.jsonl": [plus],
        "MbppPlus.jsonl": [MBPP_PLUS],
        "mbpp.jsonl": MBPP,
        "gsm8k_test.jsonl": GSM,
        "gsm8k_train.jsonl": GSM,
        "mmlu-redux/anatomy.jsonl": [REDUX, REDUX | {"error_type": "wrong_groundtruth"}],
        "arc/ARC-Challenge-Test.jsonl": [ARC],
        "arc/ARC-Challenge-Train.jsonl": [ARC | {"id": "q2"}],
        "belebele/deu_Latn.jsonl": BELEBELE,
        "xcopa/it/test.it.jsonl": XCOPA,
        "xcopa/it/val.it.jsonl": [XCOPA[0] | {"premise": "Das Glas fiel."}],
        "xwinograd/en.jsonl": [WINO, WINO | {"answer": "2"}],
        "okapi-mmlu/de/test.jsonl": OKAPI,
        "rummlu/train.jsonl": RUMMLU,
        "okapi-mmlu/de/train.jsonl": OKAPI[:1],
        "turkishmmlu/test.jsonl": TURKISH,
        "turkishmmlu/dev.jsonl": TURKISH[:1],
        "hellaswag/hellaswag_val.jsonl": [HELLA],
        "hellaswag/hellaswag_train.jsonl": [HELLA | {"ind": 2}],
        "winogrande/dev.jsonl": [WINO],
        **{f"ifeval_{language}.jsonl": [ifeval(language)] for language in ("en", "es", "fr", "ja")},
        **{f"multipl-e/humaneval-{name}.jsonl": [one] for name, one in MULTIPL_E.items()},
        "livecodebench/test.jsonl": LCB,
        "lveval/factrecall_en/factrecall_en_16k.jsonl": [LVEVAL],
        "mt_bench_question.jsonl": MT_BENCH,
        "mt_bench_reference_gpt-4.jsonl": [MT_REFERENCE],
        "mt_bench_judge_prompts.jsonl": MT_JUDGES,
        "arena-hard/question.jsonl": ARENA,
        "arena-hard/model_answer/gpt-4-0314.jsonl": ARENA_BASELINE,
        "alignbench/data_v1.1_release.jsonl": ALIGNBENCH,
        "winogrande/train_xl.jsonl": [WINO | {"qID": "q2"}],
    }
    for part, count in (("dev", 5), ("devtest", 2)):
        for code, word in (
            ("eng", "book"),
            ("deu", "Buch"),
            ("zho_simpl", "书"),
            ("zul", "ibhuku"),
        ):
            text = "".join(f"{word} {number} {part}.\n" for number in range(1, count + 1))
            texts[f"flores101_dataset/{part}/{code}.{part}"] = text
    texts |= {
        name: "".join(json.dumps(row) + "\n" for row in found) for name, found in lines.items()
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "mmlu-pro").mkdir()
    for part in ("test", "validation"):
        pq.write_table(
            pa.Table.from_pylist([PRO | {"question_id": len(part)}]),
            folder / f"mmlu-pro/{part}-0.parquet",
        )
    solved = {"question": "Frage: Wie viele?", "answer": "Schritt-für-Schritt-Antwort: Es sind 5."}
    asked = {"question": "Ann hat 3. Wie viele?", "answer": None}
    for part, record in (("train", solved), ("test", asked)):
        rows = [record | {"answer_number": 5, "equation_solution": None}]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"mgsm/de-{part}.parquet")
