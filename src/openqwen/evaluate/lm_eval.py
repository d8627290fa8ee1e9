"""EleutherAI's lm-evaluation-harness on our engine: log-likelihood, rolling, generation.

from lm_eval import simple_evaluate
from openqwen.evaluate.lm_eval import EngineLM
simple_evaluate(EngineLM("MODEL"), tasks=["hellaswag"])

python -m openqwen.evaluate.lm_eval run --model openqwen --model_args pretrained=MODEL …
"""

import json
from collections.abc import Sequence
from typing import Any

from openqwen.engine import Engine, Prompt, Sampling
from openqwen.evaluate.ask import fitted
from openqwen.model import load_model
from openqwen.support.command import pip_install
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.hub import local
from openqwen.support.progress import notice, progress
from openqwen.tokenizer import load_tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    what = f"The harness needs the library {error.name}."
    raise OpenQwenError(what, do=pip_install("openqwen[lm-eval]")) from None

_MAX_TOKENS = 256  # of an answer, where a task sets no limit; the harness's own number
_KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", "min_p"}
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_Request = tuple[Any, list[int], list[int]]


@register_model("openqwen")
class EngineLM(TemplateLM):
    """A model of the harness.

    Args:
        pretrained: an engine, or a Hugging Face folder, a .gguf file or a hub id.
        quantize: None, "int8" or "int4".
        seed: of sampled answers.
        others: arguments of the harness, such as `batch_size`, which have no meaning here.
    """

    def __init__(
        self, pretrained: Engine | str, quantize: Any = None, seed: int = 0, **others: Any
    ):
        super().__init__()
        if isinstance(pretrained, Engine):
            self.engine = pretrained
        else:
            path = local(pretrained)
            model = load_model(path, device=best_device(), quantize=quantize)
            self.engine = Engine(model, load_tokenizer(path))
        self._words, self._seed = self.engine.tokenizer, seed
        # The engine's sequences have room for one more token than those that are scored.
        self.max_length = self.engine.longest - 2

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token, which also stands before a text without a context."""
        stated = self._words.stated_eos_id
        return self._words.endoftext_id if stated is None else stated

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return f"openqwen-{self._words.vocab_size}"

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Ids of a text; special tokens in it are special, as the harness renders chats to text."""
        return self._words.encode(string, allow_control=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template as the harness records it."""
        return json.dumps(self._words.template) if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; without `add_generation_prompt` the final message is continued."""
        return self._words.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], **_: Any
    ) -> list[tuple[float, bool]]:
        room = self.max_length + 1
        pairs = [fitted(*request[1:], room) for request in requests]
        with progress("log-likelihood", len(pairs), "requests") as bar:
            found = self.engine.score_continuations(pairs, bar)
        results = [(sum(one.logprobs), one.greedy) for one in found]
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The log-likelihood of each text in windows of `max_length`, one token of context each."""
        parts: list[_Request] = []
        owners = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                parts.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, scored in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[owner] += scored[0]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Answers, in order; a prompt too long for its answer loses its beginning."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        with progress("generation", len(requests), "answers") as bar:
            for settings, numbers in groups.items():
                sampling = _sampling(json.loads(settings), self._seed)
                kept = max(1, self.engine.longest - (sampling.max_tokens or 0))
                prompts: list[Prompt] = [
                    self.tok_encode(requests[n].args[0])[-kept:] for n in numbers
                ]
                outputs = self.engine.generate(prompts, sampling, progress=bar)
                for number, output in zip(numbers, outputs, strict=True):
                    texts[number] = output.text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def _sampling(settings: dict[str, Any], seed: int) -> Sampling:
    """The sampling of a task's `generation_kwargs`."""
    limit = next((settings[key] for key in _LIMITS if key in settings), _MAX_TOKENS)
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0)
    sampled = settings.get("do_sample", temperature > 0)
    if unknown := settings.keys() - _KNOWN - set(_LIMITS):
        notice(f"generation settings that are left out: {', '.join(sorted(unknown))}", "lm-eval")
    return Sampling(
        max_tokens=int(limit),
        temperature=(temperature or 1.0) if sampled else 0.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        min_p=float(settings.get("min_p") or 0.0),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        seed=seed,
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
