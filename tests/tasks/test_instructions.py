"""Every kind of instruction, with a response that follows and one that does not."""

import re
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.sandbox import best_tier
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Task, grade, instructions
from openqwen.tasks.instructions import KINDS, check
from openqwen.tasks.instructions.text import capital_words, count_sentences, spanish_words

needs_langid = pytest.mark.skipif(
    find_spec("py3langid") is None, reason="py3langid is not installed"
)
needs_janome = pytest.mark.skipif(find_spec("janome") is None, reason="janome is not installed")
needs_sandbox = pytest.mark.skipif(best_tier() == "none", reason="this machine has no sandbox")

ENGLISH = (
    "The ships sailed out of the harbour, and nobody on the shore knew when they would return."
)
FRENCH = (
    "Les bateaux sont sortis du port, et personne ne savait quand ils allaient revenir chez eux."
)
SPANISH = (
    "Los barcos salieron del puerto, y nadie en la playa sabía cuándo iban a volver a su casa."
)

# (language, id, parameters, responses that follow, responses that do not)
CASES = [
    ("en", "keywords:existence", {"keywords": ["rain", "c++"]}, ["Training in C++"], ["rain"]),
    ("en", "keywords:frequency", {"keyword": "fish ", "frequency": 2, "relation": "at least"},
     ["Fish, selfish"], ["fish"]),
    ("en", "keywords:frequency", {"keyword": "fish", "frequency": 2, "relation": "less than"},
     ["fish", "bird"], ["fish fish"]),
    ("en", "keywords:forbidden_words", {"forbidden_words": ["rock", "sea"]},
     ["rocks, season"], ["A Rock."]),
    ("en", "keywords:letter_frequency",
     {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, ["Qq"], ["q"]),
    ("en", "length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"},
     ["Dr. Who is here."], ["He is. She is."]),
    ("en", "length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["a\n***\nb", "***a***b***"], ["a", "a *** *** b", "a\n\nb"]),
    ("en", "length_constraints:number_words", {"num_words": 3, "relation": "at least"},
     ["don't go"], ["Do go!"]),
    ("en", "length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
     ["a\n\nso, b", 'a\n\n"So" b'], ["a\n\nSome b", "So\n\nb", "a\n\nso\n\nc"]),
    ("en", "detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[a] [b c]"], ["[a] [b", "[a\nb] [c]"]),
    ("en", "detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye\n\nP. S. more"], ["PS more"]),
    ("en", "detectable_content:postscript", {"postscript_marker": "P.P.S"},
     ["p.p.s more"], ["P.S. more"]),
    ("en", "detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* a\n  - b", "a\n* b\n\n* c"], ["* a", "**a**\n* b"]),
    ("en", "detectable_format:constrained_response", {}, ["My answer is no. Yes."], ["No."]),
    ("en", "detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*a* *b*", "**a**  **b**"], ["*a*", "* a\n* b", "** **"]),
    ("en", "detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1 a\nSECTION2"], ["Section 1 SECTION 2", "SECTION I, SECTION II"]),
    ("en", "detectable_format:json_format", {}, ['```json\n{"a": 1}\n```', "3"], ["{a: 1}"]),
    ("en", "detectable_format:title", {}, ["<<A day>>\nb"],
     ["<<>>", "<<a\nb>>", "<<  >>", "<<a>", "a >> b <<", "<a>>"]),
    ("en", "combination:two_responses", {}, ["a\n******\nb", "******a******b"],
     ["a", "a ****** a", "a ****** ****** b", "a******b******c"]),
    ("en", "combination:repeat_prompt", {"prompt_to_repeat": "Write this. "},
     [" write this. Done."], ["Done. Write this."]),
    ("en", "startend:end_checker", {"end_phrase": "Bye now"}, ['So: BYE NOW"'], ["Bye now."]),
    ("en", "startend:quotation", {}, [' "a" '], ['"', "'a'", '"a']),
    ("en", "change_case:capital_word_frequency",
     {"capital_frequency": 2, "capital_relation": "at least"}, ["I AM", "NASA's I"], ["I am"]),
    ("en", "change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, FRENCH.upper()]),
    ("en", "change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, FRENCH.lower()]),
    ("en", "language:response_language", {"language": "fr"}, [FRENCH, "123"], [ENGLISH]),
    ("en", "punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ("fr", "keywords:existence", {"keywords": ["été"]}, ["Un ÉTÉ"], ["ete"]),
    ("fr", "keywords:frequency", {"keyword": "mer", "frequency": 2, "relation": "moins de"},
     ["la mer"], ["mer, mer"]),
    ("fr", "length_constraints:number_sentences", {"num_sentences": 2, "relation": "au moins"},
     ["Il va. Elle va."], ["M. Dupont et Mme. Roy vont."]),
    ("fr", "detectable_format:title", {}, ["##Un jour##"], ["<<Un jour>>", "## Un jour", "####"]),
    ("fr", "detectable_format:constrained_response", {}, ["Peut-être."], ["Sans doute."]),
    ("fr", "startend:quotation", {}, ["« a »", "'a'", '"a"'], ["«a\""]),
    ("fr", "change_case:french_capital", {}, [FRENCH.upper()], [FRENCH, ENGLISH.upper()]),
    ("fr", "change_case:french_lowercase", {}, [FRENCH.lower()], [FRENCH]),
    ("fr", "special_character:ethel_or_cedilla", {"forbidden_char": "ç"}, ["coeur"], ["Ça"]),
    ("fr", "special_character:no_accents", {}, ["ete"], ["Été"]),
    ("fr", "special_character:accents", {"word_to_accentuate": {"lecon": "leçon"}},
     ["La leçon", "rien"], ["La lecon", "leçon, leçôn"]),
    ("fr", "detectable_content:informal_address", {}, ["Prends ton sac"], ["Prenez votre tableau"]),
    ("fr", "detectable_content:no_digits", {}, ["trois"], ["3"]),
    ("es", "keywords:frequency", {"keyword": "mar", "frequency": 2, "relation": "como máximo"},
     ["mar, mar"], ["mar mar mar"]),
    ("es", "length_constraints:number_words", {"num_words": 3, "relation": "al menos"},
     ["1. uno, dos - tres", "uno-dos tres"], ["1. ¡uno! (dos)"]),
    ("es", "length_constraints:number_sentences", {"num_sentences": 2, "relation": "como máximo"},
     ["Uno. Dos."], ["Uno. Dos. ¿Tres?"]),
    ("es", "length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "Por fin"}, ["Por fin, sí"], ["Fin"]),
    ("es", "detectable_content:number_placeholders",
     {"num_placeholders": 1, "relation": "como máximo"}, ["[a] [b]"], ["a"]),
    ("es", "detectable_format:number_bullet_lists", {"num_bullets": 1}, ["* a\n- b"], ["- b"]),
    ("es", "detectable_content:postscript", {"postscript_marker": "P.D."}, ["p. d. a"], ["P.S. a"]),
    ("es", "startend:end_checker", {"end_phrase": "Un saludo"}, ["Un saludo."], ["Un saludo!"]),
    ("es", "change_case:spanish_capital", {}, [SPANISH.upper()], [SPANISH, FRENCH.upper()]),
    ("es", "change_case:spanish_lowercase", {}, [SPANISH.lower()], [SPANISH]),
    ("es", "special_character:enie", {"let_frequency": 2}, ["Año, niña"], ["año", "ñ ñ ñ"]),
    ("es", "special_character:dieresis", {"let_frequency": 1}, ["pingüino"], ["guerra"]),
    ("es", "special_character:tildes", {"num_words": 2, "relation": "al menos"},
     ["más café"], ["mas café"]),
    ("es", "punctuation:question_marks", {}, ["¿Sí?"], ["Sí?", "¿ ?", "¿Sí"]),
    ("es", "punctuation:exclamation_marks", {}, ["¡\nSí!"], ["Sí!", "¡¡!"]),
    ("ja", "keywords:existence", {"keywords": ["雨"]}, ["雨が降る。"], ["雪が降る。"]),
    ("ja", "keywords:frequency", {"keyword": "雨", "frequency": 2, "relation": "以上"},
     ["雨と雨。"], ["雨と雪。"]),
    ("ja", "keywords:forbidden_words", {"forbidden_words": ["雨"]}, ["雪が降る。"], ["雨が降る。"]),
    ("ja", "keywords:letter_frequency",
     {"letter": "い", "let_frequency": 2, "let_relation": "以上"}, ["いイ"], ["い"]),
    ("ja", "length_constraints:number_sentences", {"num_sentences": 2, "relation": "未満"},
     ["「はい。いいえ。」と言う。", "私の\n本。"], ["はい。いいえ。", "はい！いいえ", "a\nb"]),
    ("ja", "length_constraints:number_letters", {"num_letters": 3, "relation": "以上"},
     ["あいう"], ["あい"]),
    ("ja", "length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "首"}, ["a\n\n「首都"], ["首\n\n都"]),
    ("ja", "detectable_content:postscript", {"postscript_marker": "追伸"}, ["追伸: あ"], ["P.S. あ"]),
    ("ja", "detectable_format:number_bullet_lists", {"num_bullets": 2}, ["・a\n・b"], ["・a\n* b"]),
    ("ja", "detectable_format:number_numbered_lists", {"num_items": 2}, ["1. a\n2. b"], ["1.a\n2. b"]),
    ("ja", "detectable_format:number_highlighted_sections", {"num_highlights": 1}, ["《a》"], ["*a*"]),
    ("ja", "detectable_format:multiple_sections", {"section_spliter": "章", "num_sections": 2},
     ["第1章\n第２章"], ["第一章 第1章"]),
    ("ja", "detectable_format:title", {}, ["『題』"], ["『』", "<<題>>"]),
    ("ja", "detectable_format:constrained_response", {}, ["はい、そうです。"], ["はい"]),
    ("ja", "detectable_format:nominal_ending", {"count": 1}, ["今日は雨。"], ["今日は雨です。"]),
    ("ja", "combination:repeat_prompt", {"prompt_to_repeat": "abc"}, ["abc d"], ["ABC d"]),
    ("ja", "startend:end_checker", {"end_phrase": "以上」"}, ["以上」"], ["以上です"]),
    ("ja", "startend:quotation", {}, ["「あ」"], ['"あ"']),
    ("ja", "startend:sentence_unified_end", {"ending": "です"},
     ["雨です。「雪だ。」雪です！"], ["雨です。雪だ。"]),
    ("ja", "letters:furigana", {}, ["漢字（かんじ）と雨（あめ）"], ["漢字（かんじ）と雨", "雨(あめ)"]),
    ("ja", "letters:kansuuji", {}, ["三つ"], ["3つ", "３つ"]),
    ("ja", "letters:no_katakana", {}, ["あ漢"], ["ア", "ｱ"]),
    ("ja", "letters:katakana_only", {}, ["アー1。①"], ["アあ", "アa"]),
    ("ja", "letters:no_hiragana", {}, ["ア漢"], ["あ"]),
    ("ja", "letters:hiragana_only", {}, ["あー1。"], ["あ漢"]),
    ("ja", "letters:kanji", {"kanji_limit": 2, "relation": "未満"}, ["漢あ"], ["漢字"]),
    ("ja", "punctuation:no_period", {}, ["あ、い"], ["あ。"]),
    ("ja", "punctuation:no_comma", {}, ["あ,い"], ["あ、い"]),
]  # fmt: skip
JANOME = ("keywords:existence", "keywords:frequency", "keywords:forbidden", "nominal_ending")


def missing_package(language, id):
    if find_spec("py3langid") is None and id.endswith(("_capital", "_lowercase", "_language")):
        return "py3langid"
    if find_spec("janome") is None and language == "ja" and any(part in id for part in JANOME):
        return "janome"
    return ""


@pytest.mark.parametrize(
    ("language", "id", "parameters", "follow", "fail"), CASES, ids=[f"{c[0]}:{c[1]}" for c in CASES]
)
def test_kinds(language, id, parameters, follow, fail):
    if package := missing_package(language, id):
        pytest.skip(f"{package} is not installed")
    assert [check(id, parameters, text, language) for text in follow] == [True] * len(follow)
    assert [check(f"{language}:{id}", parameters, text) for text in fail] == [False] * len(fail)
    assert not check(id, parameters, " \n", language), "an empty response follows nothing"


def test_every_kind_has_a_case():
    tested = {id for _, id, *_ in CASES}
    assert KINDS.keys() - tested == set()
    count = lambda language: sum(language in kind.languages for kind in KINDS.values())
    assert [count(language) for language in ("en", "fr", "es", "ja")] == [25, 30, 30, 33]


def test_loose():
    assert check("punctuation:no_comma", {}, "Sure, here:\nab\nBye, you", loose=True)
    assert not check("punctuation:no_comma", {}, "Sure, here:\na, b\nBye, you", loose=True)
    end = {"end_phrase": "the end"}
    assert check("startend:end_checker", end, "a\n**The end**", loose=True)
    assert not check("startend:end_checker", end, "a\n**The end**")


def test_mended_variants():
    def both(id, parameters, text, language="en"):
        return [check(id, parameters, text, language, variant=v) for v in ("reference", "mended")]

    nth = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}
    assert both("length_constraints:nth_paragraph_first_word", nth, "\n\na\n\nso b") == [
        False,
        True,
    ]
    assert both("length_constraints:nth_paragraph_first_word", nth, "a\n\nso b") == [True, True]
    marks = {"letter": "#", "let_frequency": 2, "let_relation": "at least"}
    assert both("keywords:letter_frequency", marks, "## a") == [False, True]
    many = "the quick brown fox jumps over the lazy dog " * 3
    assert both("keywords:letter_frequency", marks, many) == [True, False]
    bullets = {"num_bullets": 2}
    assert both("detectable_format:number_bullet_lists", bullets, "- a\n* b", "ja") == [False, True]
    word = {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "首"}
    nth_ja = both("length_constraints:nth_paragraph_first_word", word, "## **首都**", "ja")
    assert nth_ja == [False, True]
    assert both("startend:end_checker", {"end_phrase": "以上"}, "以上**", "ja") == [False, True]


@needs_janome
def test_japanese_keywords_are_words_or_parts():
    kinds = ("reference", "mended")
    found = [check("keywords:existence", {"keywords": ["京都"]}, "東京都に住む。", "ja", variant=v)
             for v in kinds]  # fmt: skip
    assert found == [False, True]


@needs_langid
def test_chinese_and_the_same_language_every_time():
    text = "船离开了港口，岸上没有人知道它们什么时候会回来。"
    chinese = {"language": "zh"}
    assert not check("language:response_language", chinese, text)
    assert check("language:response_language", chinese, text, variant="mended")
    assert check("language:response_language", {"language": "zh-cn"}, text)
    short = [check("language:response_language", {"language": "fr"}, "sang bon") for _ in range(20)]
    assert len(set(short)) == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? ", 3),
        ("It costs 3.50 at example.com today.", 1),
        ("Mr. Smith met Dr. Jones at 5 p.m. in the U.S. Senate.", 1),
        ("He left at 5 p.m. However, she stayed.", 2),
        ("John F. Kennedy spoke.", 1),
        ("1. First item\n2. Second item", 3),  # as Punkt counts: "1." ends a sentence
        ("Take no. 7 of them.", 2),  # "no." is not known to Punkt
        ("She said \"Go.\" Then she went.", 2),
        ("(It ended.) Good.", 2),
        ("Wait... what?", 1),
        ("Wait... The end.", 2),
        ("No mark at all", 1),
        ("", 0),
        ("Great!!! Really?!", 3),
    ],
)  # fmt: skip
def test_english_sentences(text, count):
    assert count_sentences(text, "en") == count


def test_words_in_capitals_and_spanish_tokens():
    assert capital_words("I'M HERE, at the U.S.-based (NASA) site: A*B", "en") == 6
    assert spanish_words("socio-económico: 5 + 3 = «ocho»") == [
        "socio", "económico", "5", "+", "3", "=", "ocho",
    ]  # fmt: skip


def test_wrong_ids_and_parameters_are_named():
    def error(*arguments, **options):
        with pytest.raises(OpenQwenError) as caught:
            check(*arguments, **options)
        return str(caught.value)

    assert "Did you mean 'keywords:existence'" in error("keywords:existance", {}, "a")
    assert "no instruction 'letters:kanji' in 'en'" in error("letters:kanji", {}, "a")
    assert "in the language 'de'" in error("keywords:existence", {}, "a", "de")
    assert "'keywords' is missing" in error("keywords:existence", {"keywords": None}, "a")
    assert "list of texts" in error("keywords:existence", {"keywords": "rain"}, "a")
    assert "Did you mean 'keywords'" in error("keywords:existence", {"keyword": ["a"]}, "a")
    count = {"num_words": True, "relation": "at least"}
    assert "whole number" in error("length_constraints:number_words", count, "a")
    assert "one of: less than" in error(
        "length_constraints:number_words", {"num_words": 3, "relation": "more than"}, "a"
    )
    assert "one of: less than" in error(
        "length_constraints:number_words", {"num_words": 3, "relation": ["at least"]}, "a"
    )
    assert "code of a language" in error("language:response_language", {"language": "French"}, "a")
    letter = {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}
    assert "one character" in error("keywords:letter_frequency", letter, "a")


def test_missing_packages_are_named(monkeypatch):
    from openqwen.tasks.instructions import japanese, languages

    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    monkeypatch.setitem(__import__("sys").modules, "janome.tokenizer", None)
    languages._identifier.cache_clear()
    japanese._tokenizer.cache_clear()
    japanese.tokens.cache_clear()
    with pytest.raises(OpenQwenError, match="py3langid") as caught:
        check("change_case:english_lowercase", {}, "a word")
    assert "py3langid" in caught.value.do
    with pytest.raises(OpenQwenError, match="janome"):
        check("keywords:existence", {"keywords": ["雨"]}, "雨", "ja")


def task(*asked, **more):
    listed = [each if isinstance(each, dict) else {"id": each, "parameters": {}} for each in asked]
    message = [{"role": "user", "content": "Write."}]
    return Task("t", message, "instructions", {"instructions": listed, **more})


def test_the_grader():
    two = task("punctuation:no_comma", "startend:quotation")
    right, half, empty, long = grade([two] * 4, ['"a"', "a", " ", "a" * 200_001])
    assert (right.passed, right.score, right.reason) == (True, 1.0, "")
    assert (half.passed, half.score) == (False, 0.5)
    assert half.reason == "not followed: startend:quotation"
    assert (empty.status, empty.score) == ("no_answer", 0.0)
    assert (long.passed, long.reason) == (False, "longer than 200000 characters")
    loose = task("punctuation:no_comma", loose=True)
    assert [one.passed for one in grade([loose, loose], ["Yes, so:\na", "a, b"])] == [True, False]
    french = task("detectable_format:title", language="fr")
    assert grade([french], ["##Un##"])[0].passed


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({}, "'instructions' must be a list"),
        ({"instructions": []}, "'instructions' must be a list"),
        ({"instructions": ["a"]}, r"instructions\[0\]: it must be an object"),
        ({"instructions": [{"id": "a:b"}]}, r"instructions\[0\]: There is no instruction 'a:b'"),
        ({"instructions": [{"id": "startend:quotation"}], "loose": 1}, "'loose' must be"),
        ({"instructions": [{"id": "startend:quotation"}], "variant": "x"}, "'variant' must be"),
        ({"instructions": [{"id": "startend:quotation"}], "language": "de"}, "language 'de'"),
        ({"instructions": [{"id": "startend:end_checker"}]}, "'end_phrase' is missing"),
        ({"instructions": [{"id": "startend:quotation", "parameters": []}]}, None),
        ({"instructions": [{"id": "startend:quotation", "parameters": [1]}]}, "must be an object"),
        ({"instructions": [{"verifier": ""}]}, "must be a Python source"),
        ({"instructions": [{"verifier": "a", "id": "b"}]}, "no instruction 'b'"),
    ],
)
def test_faults_of_a_reference(reference, said):
    found = instructions.fault(reference)
    assert not found if said is None else re.search(said, found)


@needs_sandbox
def test_verifiers_run_in_the_sandbox():
    def verifier(body):
        return {"verifier": f"def evaluate(response):\n    {body}"}

    short = verifier("return len(response.split()) < 3")
    both = task("punctuation:no_comma", short)
    grades = grade([both, both], ["one two", "one, two three"])
    assert [(one.passed, one.score) for one in grades] == [(True, 1.0), (False, 0.0)]
    assert grades[1].reason == "not followed: punctuation:no_comma, verifier 2"
    bad = ["return response.missing", "while True: pass", "import os; os._exit(0)", "return 'yes'"]
    tasks = [task(verifier(body)) for body in bad] + [task({"verifier": "def other(): 1"})]
    outcomes = grade(tasks, ["a 'text' \"with\" \\ quotes\n雨"] * len(tasks))
    assert [one.status for one in outcomes] == ["infra", "infra", "infra", "graded", "infra"]
    assert not any(one.passed for one in outcomes)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=400))
def test_any_text_is_checked(text):
    for language, id, parameters, *_ in CASES:
        if not missing_package(language, id):
            assert check(id, parameters, text, language) in (True, False)
