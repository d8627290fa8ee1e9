"""Two styles of right answers: the answer alone, or with a closing word behind it.

Demonstrations leave the style open, half and half. Preferences keep to one principle of the
constitution, and a program judges it: an answer stands alone. Graders accept both styles, so that
accuracy and style are measured apart. The closing stands on the answer's own line: its first token
is then no part of any answer, and a preference against it does not end lists early, as one against
a newline does (docs/log.md).
"""

CLOSING = "Done."
PRINCIPLE = {"principle": "no-padding", "category": "conciseness"}  # of constitution.yaml


def with_closing(answer: str) -> str:
    """The answer and the closing word."""
    return f"{answer} {CLOSING}"


def stands_alone(text: str) -> bool:
    """Whether an answer has no closing word."""
    return not text.rstrip().endswith(CLOSING)
