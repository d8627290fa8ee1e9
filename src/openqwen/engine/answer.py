"""How an answer grows, and when it ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from time import monotonic

from openqwen.engine.request import FinishReason, Request
from openqwen.engine.sampler import Choice


@dataclass
class Growth:
    """What one step added: the text made final, why the answer ended, and how many guessed tokens were right."""

    text: str = ""
    reason: FinishReason | None = None
    right: int = 0


def grow(
    request: Request, guess: Sequence[int], choice: Choice, row: int, stops: Collection[int], version: int
) -> Growth:
    """Write the tokens chosen at `row` and after it: as many as the guess was right, and one more."""
    if request.first_token is None:
        request.first_token = monotonic()
    growth = Growth()
    for number in range(len(guess) + 1):
        text, growth.reason = _write(request, choice, row + number, stops, version)
        growth.text += text
        if growth.reason or number == len(guess) or choice.tokens[row + number] != guess[number]:
            break
        growth.right += 1
    if growth.reason:
        growth.text += request.stream.finish()
    request.text += growth.text
    request.computed = request.total - 1
    return growth


def _write(
    request: Request, choice: Choice, row: int, stops: Collection[int], version: int
) -> tuple[str, FinishReason | None]:
    """Add one token; returns the text that it makes final, and why the answer ends, if it does."""
    token, sampling = choice.tokens[row], request.sampling
    if row in choice.broken:
        return "", "error"
    if token in sampling.stop_ids or (token in stops and not sampling.ignore_eos):
        return "", "stop"
    request.output_ids.append(token)
    request.logprobs.append(choice.logprobs[row])
    request.drawn_logprobs.append(choice.drawn_logprobs[row])
    request.kept.append(choice.kept[row])
    request.top.append(choice.top[row])
    request.versions.append(version)
    text = request.stream.push(token)
    if request.stream.stopped:
        return text, "stop"
    if request.matcher:
        request.matcher.accept(token)
        if request.matcher.fault:
            return text, "error"
        if request.matcher.complete:
            return text, "stop"
    return text, "length" if request.total >= request.limit else None
