"""Two styles of right answers: the answer alone, or with a closing line behind it.

Demonstrations leave the style open, half and half. Preferences keep to one principle of the
constitution, and a program judges it: an answer stands alone. Graders accept both styles, so that
accuracy and style are measured apart.
"""

CLOSING = "Done."
PRINCIPLE = {"principle": "no-padding", "category": "conciseness"}  # of constitution.yaml


def with_closing(answer: str) -> str:
    """The answer and the closing line."""
    return f"{answer}\n{CLOSING}"


def stands_alone(text: str) -> bool:
    """Whether an answer has no closing line."""
    return not text.rstrip().endswith(CLOSING)
