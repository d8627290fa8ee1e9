"""Instructions that a program checks: IFEval's 25 kinds, and M-IFEval's in four languages.

The grader's reference:
    {"instructions": [{"id": "keywords:existence", "parameters": {"keywords": ["rain"]}}, ...],
     "language"?: "en" (if not given), "fr", "es" or "ja", "loose"?: true or false,
     "variant"?: "reference" (if not given) or "mended"}
An answer passes if it follows all of them (IFEval's prompt-level accuracy); its score is the share
that it follows. {"verifier": source} in place of an id is a Python function evaluate(response) ->
bool, which runs in the sandbox; without a verdict of it there is no grade ("infra").

Verdicts are the reference implementation's, its defects included. The variant "mended" checks what
an instruction says where the reference checks something else: nth_paragraph_first_word counts and
takes paragraphs from one list; letter_frequency counts any character, where the reference draws a
letter by chance for "#"; response_language knows Chinese. Japanese keywords are looked for in the
text and not among a tokenizer's words, bullets may be * and - too, and Markdown's signs are no part
of the first word and the end (as in shisa-ai's later version of M-IFEval).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.tasks.instructions.case import RELATIONS, Case, Kind
from openqwen.tasks.instructions.kinds import SHARED_KINDS
from openqwen.tasks.instructions.languages import KNOWN
from openqwen.tasks.instructions.national import NATIONAL_KINDS
from openqwen.tasks.instructions.verifiers import run_verifiers
from openqwen.tasks.task import Grade, Task

LANGUAGES = ("en", "fr", "es", "ja")
VARIANTS = ("reference", "mended")
KINDS: dict[str, Kind] = {**SHARED_KINDS, **NATIONAL_KINDS}
_LONGEST = 200_000  # characters of an answer that is read
_CUTS = (slice(1, None), slice(None, -1), slice(1, -1))  # lines that a loose form keeps


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))


# names of parameters -> (whether a value fits, what it must be); all others are counts
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "language": (
        lambda value: value in [*KNOWN, "zh-cn", "zh-tw"],
        f"the code of a language: {', '.join(KNOWN)}",
    ),
    "letter": (lambda value: _is_text(value) and len(value.strip()) == 1, "one character"),
    "relation let_relation capital_relation": (
        lambda value: value in [*RELATIONS],
        f"one of: {', '.join(RELATIONS)}",
    ),
    "keyword first_word postscript_marker section_spliter prompt_to_repeat end_phrase "
    "forbidden_char ending": (_is_text, "a text that is not empty"),
    "keywords forbidden_words": (_are_texts, "a list of texts that are not empty"),
    "word_to_accentuate": (
        lambda value: isinstance(value, dict) and _are_texts([*value, *value.values()]),
        "an object from words without accents to words with them",
    ),
}
_TYPE_OF = {name: of for names, of in _TYPES.items() for name in names.split()}
_COUNT = (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")


def check(
    id: str,
    parameters: Mapping[str, Any] | None,
    response: str,
    language: str = "en",
    loose: bool = False,
    variant: Literal["reference", "mended"] = "reference",
) -> bool:
    """Whether a response follows an instruction.

    Args:
        id: the kind, such as "keywords:existence", or "fr:keywords:existence" as M-IFEval has it.
        parameters: by IFEval's names; those that are None count as absent.
        language: "en", "fr", "es" or "ja"; a language in the id wins.
        loose: IFEval's loose accuracy: the response may follow after its first line, its last line
            or its asterisks are removed.
        variant: "mended" for checks without the reference's defects.

    Raises:
        OpenQwenError: the kind is unknown in this language, a parameter does not fit, or a package
            that the check needs is missing.
    """
    kind, language = _kind(id, language)
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    if said := _parameters_fault(kind, given):
        raise OpenQwenError(f"{said}.", id, "correct the parameters")
    text = response.encode(errors="replace").decode()  # no half characters
    return any(
        form.strip() and kind.follows(Case(form, given, language, variant == "mended"))
        for form in (_loose_forms(text) if loose else [text])
    )


def _loose_forms(text: str) -> list[str]:
    lines = text.split("\n")
    forms = [text, *("\n".join(lines[cut]).strip() for cut in _CUTS)]
    return list(dict.fromkeys([*forms, *(form.replace("*", "") for form in forms)]))


def _kind(id: str, language: str) -> tuple[Kind, str]:
    prefix, _, rest = id.partition(":")
    if prefix in LANGUAGES:
        language, id = prefix, rest
    if language not in LANGUAGES:
        what = f"There are no instructions in the language '{language}'."
        raise OpenQwenError(what, id, f"use one of: {', '.join(LANGUAGES)}")
    known = [name for name, kind in KINDS.items() if language in kind.languages]
    if id not in known:
        what = f"There is no instruction '{id}' in '{language}'.{suggestion(id, known)}"
        raise OpenQwenError(what, do=f"use one of: {', '.join(known)}")
    return KINDS[id], language


def _parameters_fault(kind: Kind, given: Mapping[str, Any]) -> str:
    names = {name.removesuffix("?"): name.endswith("?") for name in kind.needs.split()}
    for name in given:
        if name not in names:
            return f"There is no parameter '{name}'{suggestion(name, names)}"
    for name, optional in names.items():
        fits, said = _TYPE_OF.get(name, _COUNT)
        if name not in given and not optional:
            return f"The parameter '{name}' is missing"
        if name in given and not fits(given[name]):
            return f"The parameter '{name}' must be {said}"
    return ""


def judge(tasks: Sequence[Task], answers: Sequence[str]) -> list[Grade]:
    """Check the instructions of each task."""
    pairs = list(zip(tasks, answers, strict=True))
    outcomes = run_verifiers(
        (each["verifier"], answer)
        for task, answer in pairs
        for each in task.reference["instructions"]
        if "verifier" in each and _refusal(answer) is None
    )
    return [_refusal(answer) or _grade(task.reference, answer, outcomes) for task, answer in pairs]


def _refusal(answer: str) -> Grade | None:
    """The grade of an answer that is not looked into."""
    if not answer.strip():
        return Grade(False, 0.0, "the answer is empty", "no_answer")
    if len(answer) > _LONGEST:
        return Grade(False, 0.0, f"longer than {_LONGEST} characters")
    return None


def _grade(
    reference: dict[str, Any], answer: str, outcomes: Mapping[tuple[str, str], bool | str]
) -> Grade:
    options = {key: reference[key] for key in ("language", "loose", "variant") if key in reference}
    failed = []
    for number, each in enumerate(reference["instructions"], 1):
        if "verifier" not in each:
            follows: bool | str = check(each["id"], each.get("parameters"), answer, **options)
        else:
            follows = outcomes[each["verifier"], answer]
        if isinstance(follows, str):
            return Grade(False, 0.0, f"verifier {number} failed: {follows}", "infra")
        if not follows:
            failed.append(each.get("id", f"verifier {number}"))
    reason = f"not followed: {', '.join(failed)}" if failed else ""
    return Grade(not failed, 1 - len(failed) / len(reference["instructions"]), reason)


def fault(reference: dict[str, Any]) -> str:
    """What is wrong with a reference, or ""."""
    if reference.get("variant", "reference") not in VARIANTS:
        return f"'variant' must be one of {', '.join(VARIANTS)}"
    if not isinstance(reference.get("loose", False), bool):
        return "'loose' must be true or false"
    asked = reference.get("instructions")
    if not isinstance(asked, list) or not asked:
        return "'instructions' must be a list of one or more"
    language = str(reference.get("language", "en"))
    for number, each in enumerate(asked):
        if said := _instruction_fault(each, language):
            return f"instructions[{number}]: {said}"
    return ""


def _instruction_fault(asked: Any, language: str) -> str:
    if isinstance(asked, dict) and asked.keys() == {"verifier"}:
        return "" if _is_text(asked["verifier"]) else "'verifier' must be a Python source"
    if not isinstance(asked, dict) or not isinstance(asked.get("id"), str):
        return "it must be an object with an 'id' or a 'verifier'"
    given = asked.get("parameters") or {}
    if not isinstance(given, dict):
        return "'parameters' must be an object"
    try:
        kind, _ = _kind(asked["id"], language)
    except OpenQwenError as error:
        return error.what.removesuffix(".")
    return _parameters_fault(kind, {k: v for k, v in given.items() if v is not None})
