"""Plain text formats for a question and its answer, for models that have not learned to chat."""

# Pre-training documents use all of them; a model is asked in the first.
# An answer begins its line, as in a chat: behind a space its first word would be another token.
PLAIN_FORMATS = (
    "Question: {question}\nAnswer:\n{answer}",
    "Q: {question}\nA:\n{answer}",
    "Task: {question}\nResult:\n{answer}",
    "User: {question}\nAssistant:\n{answer}",
    "# {question}\n{answer}",
)


def plain_prompt(question: str) -> str:
    """A question in the first plain format, up to where the answer begins.

    The newline is part of it: the colon before it and the newline are one token.
    """
    return PLAIN_FORMATS[0].format(question=question, answer="")


def plain_answer(text: str) -> str:
    """The answer in a continuation: the text before the first blank line, where an item ends."""
    return text.lstrip().split("\n\n")[0].strip()
