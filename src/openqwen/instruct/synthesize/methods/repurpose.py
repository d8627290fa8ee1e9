"""The `synthesize repurpose` method: good documents become the answers (Qwen2 report, section 4.1).

    passages   a passage is the answer; a model writes the instruction, short or detailed
    long       a long stretch is the answer; its instruction demands its length (Qwen2.5, 4.1)
    role-play  profiles of characters: a model writes questions and answers in character (Ditto)

The rejected side of a preference is what the model itself wrote to the instruction, where it is
judged worse; in role-play, what it wrote without the profile.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import documents
from openqwen.instruct.synthesize.method import Item, Message, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.methods.common import AnswersConfig, judged, shown
from openqwen.instruct.synthesize.passages import excerpt, length, passages, rounded
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.generators import Generators
from openqwen.support.records import read_records
from openqwen.support.stage import Stage, StageRun

_PROFILE = 4_000  # characters of a profile that are read, as in Ditto's code


class RepurposeConfig(AnswersConfig):
    """What becomes of documents."""

    form: Literal["passages", "long", "role-play"] = Field(
        "passages", description="what is made; role-play reads profiles in place of documents"
    )
    shortest: int = Field(400, ge=1, description="fewest characters of an answer")
    longest: int = Field(
        4_000, ge=1, description="most characters of an answer; 30000 are about 8,192 tokens"
    )
    per_document: int = Field(4, ge=1, description="most answers from one document, drawn")
    details: list[Literal[1, 2, 3]] = Field(
        [1, 2, 3], min_length=1, description="how detailed the instructions are, drawn"
    )
    most_shown: int = Field(
        12_000, ge=300, description="most characters of a text that the model is shown"
    )
    questions: int = Field(4, ge=1, description="questions to each character")
    fit: float = Field(7, ge=0, le=10, description="lowest score of how answer and question fit")
    pairs: bool = Field(
        True, description="let the model answer too, and make a pair where it does worse"
    )
    margin: float = Field(1, gt=0, description="least difference of the scores of a pair")


class Repurpose(Method):
    """One item a passage, or a character."""

    name = "repurpose"

    def __init__(self, config: RepurposeConfig, source: Path, seed: int):
        super().__init__(config)
        self.source, self.seed = source, seed

    def items(self) -> Iterable[Item]:
        """The passages of the documents, or the profiles."""
        if self.config.form == "role-play":
            yield from self._profiles()
            return
        for document in documents(self.source):
            found = passages(document["text"], self.config.shortest, self.config.longest)
            if not found:
                limits = f"{self.config.shortest} to {self.config.longest} characters"
                yield Item(document["id"], None, f"no passage of whole sentences of {limits}")
            order = Generators(self.seed)[f"passages/{document['id']}"].permutation(len(found))
            for number in sorted(order[: self.config.per_document].tolist()):
                yield Item(f"{document['id']}/{number}", found[number])

    def _profiles(self) -> Iterable[Item]:
        for number, (_, record) in enumerate(read_records(self.source), 1):
            name, text = (record.get(key) for key in ("name", "text"))
            good = all(isinstance(value, str) and value.strip() for value in (name, text))
            identity = f"{self.source.name}#{number}"
            data = {"character": name, "profile": str(text)[:_PROFILE]}
            yield Item(identity, data, "" if good else "a profile needs the texts name and text")

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Make records of one item."""
        if self.config.form == "role-play":
            yield from self._role_play(item.data, work)
        else:
            yield from self._write_request(item.data, work)

    def _write_request(self, text: str, work: Work) -> Steps[None]:
        config = self.config
        seen = excerpt(text, config.most_shown)
        level = int(work.rng.choice(config.details))
        prompt = work.messages("instruct", text=seen, level=level)
        (output,) = yield from work.ask([prompt], self.config.free)
        fault = reading.fault(output, (seen,)) or _leak(output.text, text)
        if not work.gate("instruction is usable", not fault, fault, output.text):
            return
        request = output.text.strip()
        if config.form == "long":
            (demand,) = work.messages("length", count=rounded(length(text)))
            request = f"{request}\n\n{demand['content']}"
        asked = [{"role": "user", "content": request}]
        answers = [text]
        if config.pairs:
            written = yield from work.ask([asked], self.config.free)
            answers += [o.text.strip() for o in written if not reading.fault(o, (request,))]
        seen_answers = [excerpt(answer, config.most_shown) for answer in answers]
        prompts = [work.messages("fit", request=request, text=one) for one in seen_answers]
        scores = yield from judged(work, prompts, config)
        self._record(asked, answers, scores, work, detail=level)

    def _role_play(self, character: dict[str, str], work: Work) -> Steps[None]:
        config = self.config
        prompt = work.messages("ask_character", **character, count=config.questions)
        (output,) = yield from work.ask([prompt], self.config.free)
        found = reading.items(output.text)[: config.questions]
        work.gate("character is asked", bool(found), "no list of questions", output.text)
        (system,) = work.messages("role", character=character["character"])
        for question in found:
            asked = [{**system, "role": "system"}, {"role": "user", "content": question}]
            known = work.messages("answer_character", **character, question=question)
            sources = (question, character["profile"])
            outputs = yield from work.ask([known, asked][: 1 + config.pairs], self.config.free)
            if not work.gate("answer is usable", not reading.fault(outputs[0], sources)):
                continue
            answers = [o.text.strip() for o in outputs if not reading.fault(o, sources)]
            values = {**character, "question": question}
            prompts = [work.messages("in_character", **values, response=a) for a in answers]
            scores = yield from judged(work, prompts, config)
            self._record(asked, answers, scores, work, character=character["character"])

    def _record(
        self,
        asked: list[Message],
        answers: list[str],
        scores: list[float | None],
        work: Work,
        **origin: Any,
    ) -> None:
        """D of the first answer, where it fits; P against the second, where that is worse."""
        best = scores[0]
        good = best is not None and best >= self.config.fit
        if not work.gate("answer fits", good, shown(best), asked[-1]["content"]):
            return
        origin |= {"form": self.config.form, "fit": best}
        work.demonstration([*asked, assistant(answers[0])], **origin)
        for other, score in zip(answers[1:], scores[1:]):
            worse = score is not None and score + self.config.margin <= (best or 0)
            if work.gate("model's own is worse", worse and other != answers[0]):
                work.preference(asked, answers[0], other, **origin, rejected_fit=score)


def _leak(request: str, text: str) -> str:
    """Why an instruction gives the answer away, or "": a long stretch of the text is in it."""
    request, text = " ".join(request.split()), " ".join(text.split())
    width = 20 if length(text) > len(text) / 2 else 60  # Chinese says more in a character
    stretches = (request[n : n + width] for n in range(len(request) - width + 1))
    return "it copies the text" if any(one in text for one in stretches) else ""


def run_repurpose(run: StageRun) -> dict[str, float]:
    """Documents or profiles → demonstrations D and preferences P."""
    return synthesize(Repurpose(run.config, run.inputs["documents"], run.seed), run)


STAGE = Stage(
    name="synthesize-repurpose",
    help="Good documents become the answers; a model writes their instructions. Role-play too.",
    config=RepurposeConfig,
    inputs={
        "documents": "A folder or a file of documents; for role-play a file of profiles, each with "
        "name and text."
    },
    outputs=["demonstrations", "preferences"],
    run=run_repurpose,
)
