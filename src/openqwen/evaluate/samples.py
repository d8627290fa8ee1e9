"""Answers to a few fixed prompts after every stage, which show what each stage changed."""

from typing import Any

from openqwen.engine import Generator, Sampling

CONTINUATIONS = (
    "def read_lines(path):\n    ",
    "import os\nimport sys\n\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n"
    "    def push(self, item):\n        ",
    "Return a list of ",
    "This module provides ",
    "If the file does not exist, ",
)
# The checkable ones are of the heldout split: no stage has trained on them.
CHATS = (
    "Give the sum of 18 and 2.",
    "What is the larger number, 67 or 57?",
    "How many words does this have: code frog note soup",
    "Write hand 2 times.",
    "Put hyphens between these words: brown window",
    "Reverse these words: clock thin board present",
    "Give a JSON object: key plane, value find.",
    "Make a bullet list: simple, good, hard",
    "What does `os.path.join` do?",
    "Who are you?",
)


def answer_samples(generator: Generator, max_tokens: int) -> list[dict[str, Any]]:
    """Answer the fixed prompts greedily.

    Returns:
        One {"prompt", "answer", "kind": "continuation" | "chat"} for each prompt.
    """
    chats = [[{"role": "user", "content": text}] for text in CHATS]
    outputs = generator.generate([*CONTINUATIONS, *chats], Sampling(max_tokens=max_tokens))
    kinds = ["continuation"] * len(CONTINUATIONS) + ["chat"] * len(CHATS)
    return [
        {"prompt": prompt, "answer": output.text, "kind": kind}
        for prompt, output, kind in zip(CONTINUATIONS + CHATS, outputs, kinds, strict=True)
    ]
