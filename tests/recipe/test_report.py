import re

import pytest
from report_run import (
    RESULTS,
    SECTIONS,
    STAGES,
    Page,
    build_run,
    digest,
    dump,
    dump_lines,
    interval,
    manifest,
    metrics,
    scores,
)

from openqwen.recipe.report import write_report
from openqwen.recipe.report.run import load_run
from openqwen.support.errors import OpenQwenError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_report(build_run(tmp_path_factory.mktemp("runs") / "tiny")).read_text(
        encoding="utf-8"
    )


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


def test_every_section_is_there_and_closed(page, source):
    assert page.open == []
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert ids.issuperset(SECTIONS)
    assert {a["href"] for tag, a in page.elements if tag == "a"} == {
        f"#{name}" for name in SECTIONS
    }
    assert len(source.encode()) < 2_000_000


def test_headlines_and_scores_are_shown(page):
    shown = page.shown.replace("\u202f", " ")
    results = ("1.902", "2.214", "14 % below gzip -9", "65.0 %", "78.3 %", "61.2 %", "54 % to 68 %")
    assert "1.802 to 2.002" in shown  # the documents' interval of bits per byte
    for result in (*results, "58.1 %", "52 % to 64 %", "1.022×"):
        assert result in shown
    assert "+0.029 worse" in shown  # sft's bits per byte against extend's
    assert "+42.0 better" in shown  # sft's checked accuracy against extend's
    gains = "greedy +14.0 (+12.0 to +16.0), at 0.7 +0.8 (−0.4 to +2.0), at 1.0 +3.1 (+1.2 to +5.0)"
    assert f"online-dpo on sft, points: {gains}" in shown


def test_each_stage_stands_beside_its_own_start_and_cooling_beside_it(page):
    shown = re.sub(r"\s+", " ", page.text)
    assert "sft at 0.9, on itself +3.3 (+2.1 to +4.5) dpo, on sft +8.0 (+6.0 to +10.0)" in shown
    assert (
        "online-dpo, on sft +14.0 (+12.0 to +16.0)+0.8 (−0.4 to +2.0)+3.1 (+1.2 to +5.0)" in shown
    )
    assert "+14.0 better" in shown  # online-dpo's checked accuracy against sft's, not against dpo's


def test_the_loss_by_position_stands_for_each_stage_before_sft(page):
    shown = re.sub(r"\s+", " ", page.text)
    assert "stage 0 to 128 128 to 256 256 to 300" in shown
    assert "pretrain 2.7502.5002.912" in shown
    assert "extend 2.7502.5002.853" in shown


def test_an_online_stage_shows_its_curves_and_its_first_and_last_answers(page):
    shown = re.sub(r"\s+", " ", page.text)
    for title in ("Win rate over the reference's answers", "Divergence from the reference"):
        assert title in shown
    assert "in episode 0" in shown
    assert "in episode 59" in shown
    assert "in episode 30" not in shown


def test_the_reward_models_section(source, tmp_path):
    section = source[source.index('<section id="reward">') :]
    section = section[: section.index("</section>")]
    shown = re.sub(r"\s+", " ", Page(section).text)
    assert "mean error 4.7 %" in shown
    assert "prefers the longer answer in 64 % of the pairs; the chosen one is longer in 52" in shown
    assert "truthfulness3581.0 %66 % to 93 %" in shown
    assert "-140" in shown
    assert section.count("<svg") == 2
    assert section.count('<line class="axis"') == 2 * (6 + 1)  # an interval a bin, and the axis
    folder = build_run(tmp_path / "tiny")
    older = {key: value for key, value in scores("reward").items() if "calib" not in key}
    dump(folder / "evaluate-reward/scores.json", older)  # of an earlier version
    assert 'id="reward"' not in write_report(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(("gain", "good"), [(0.05, False), (0.08, True)])
def test_being_surer_alone_is_no_gain(tmp_path, gain, good):
    """At temperature 1 a stage must gain more than cooler sampling does."""
    folder = build_run(tmp_path / "tiny")
    changed = scores("online-dpo") | interval("test_gain", 0.0, -0.01, 0.01)
    dump(
        folder / "evaluate-online-dpo/scores.json",
        changed | interval("test_sampled_gain", gain, gain - 0.03, 0.1),
    )
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert ("✓ sft clearly above" in text) == good


def test_a_number_that_does_not_move_is_told(tmp_path):
    folder = build_run(tmp_path / "tiny")
    poor = scores("sft") | {"test_accuracy_low": 0.12}
    dump(folder / "evaluate-sft/scores.json", poor)
    dump(folder / "evaluate-extend/scores.json", scores("extend") | {"bits_per_byte": 2.5})
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "✗ 13\u202f% above gzip -9" in text
    assert "✗ sft not clearly above chance" in text


def test_benchmarks_that_the_recipe_names_have_columns(tmp_path):
    folder = build_run(tmp_path / "tiny")
    found = {"benchmarks": ["humaneval"]} | interval("humaneval", 0.616, 0.54, 0.69)
    dump(folder / "evaluate-sft/scores.json", scores("sft") | found)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text.replace("\u202f", " ")
    assert "humaneval" in text
    assert "61.6 %54 % to 69 %" in re.sub(r"\s*\n\s*", "", text)


def test_steps_account_for_documents_that_join_later(page):
    assert (
        page.shown.count("2,000 join here") == 2
    )  # at exact deduplication, and in the finished corpus
    assert page.shown.count("2,000 pass by") == 1  # near deduplication
    assert "499 documents dropped" in page.shown


def test_nothing_is_loaded_from_elsewhere(page, source):
    for tag, attributes in page.elements:
        assert tag not in {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "image",
            "use",
            "base",
        }
        assert not {"src", "srcset", "poster", "action", "data"}.intersection(attributes)
        assert all(not name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    styles = "".join(re.findall(r"<style>(.*?)</style>", source, re.DOTALL))
    styles += "".join(attributes.get("style") or "" for _, attributes in page.elements)
    assert "url(" not in styles
    assert "@import" not in styles


def test_text_of_the_model_cannot_act(page, source):
    assert "&lt;script&gt;alert" in source
    for hidden in ("\u202e", "\x07", "\ud800"):
        assert hidden not in source
    assert "‹U+202E›evil‹U+0007› ‹U+D800›" in page.text


def test_long_answers_are_cut_and_say_so(page):
    assert "cut: 400 of 2,700 characters" in page.text


def test_a_large_run_stays_small(tmp_path):
    folder = build_run(tmp_path / "tiny")
    dump_lines(
        folder / "pretrain/metrics.jsonl",
        [record | {"step": i} for i, record in enumerate(metrics("sft") * 50)],
    )
    many = [{"prompt": f"{i} " * 5000, "answer": "<&> " * 5000, "kind": "chat"} for i in range(60)]
    for name in RESULTS:
        dump(folder / f"evaluate-{name}/samples.json", many)
    source = write_report(folder).read_text(encoding="utf-8")
    assert len(source.encode()) < 1_000_000
    assert all(len(points.split()) <= 400 for points in re.findall(r'points="([^"]*)"', source))


def test_the_same_artifacts_give_the_same_bytes(tmp_path, source):
    again = write_report(build_run(tmp_path / "tiny"))
    assert again.read_text(encoding="utf-8") == source
    assert write_report(tmp_path / "tiny").read_text(encoding="utf-8") == source
    assert not list(tmp_path.glob("tiny/.*aside"))


@pytest.mark.parametrize("until", STAGES)
def test_a_run_that_stopped_early(tmp_path, until):
    page = Page(write_report(build_run(tmp_path / "tiny", until)).read_text(encoding="utf-8"))
    assert page.open == []
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert ("training" in ids) == (STAGES.index(until) >= STAGES.index("pretrain"))


def test_a_run_without_any_stage(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "No stage of this run has finished" in page.text


def test_no_folder_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(OpenQwenError, match="no such run folder"):
        write_report(tmp_path / "missing")


def test_a_damaged_file_is_named(tmp_path):
    folder = build_run(tmp_path / "tiny", "tokenizer")
    (folder / "corpus/corpus.json").write_text("{", encoding="utf-8")
    with pytest.raises(OpenQwenError, match=r"corpus\.json"):
        write_report(folder)


def test_a_damaged_manifest_is_named(tmp_path):
    folder = build_run(tmp_path / "tiny", "tokenizer")
    dump(folder / "tokenizer/manifest.json", manifest("tokenizer") | {"digest": None})
    with pytest.raises(OpenQwenError, match=r"manifest is damaged(.|\n)*--from tokenizer"):
        write_report(folder)


def test_steps_without_anything_to_learn_are_told_and_not_drawn(page):
    assert "1 step found nothing to learn from" in page.text
    drawn = [a["points"] for tag, a in page.elements if tag == "polyline"]
    assert drawn
    assert not any("nan" in points for points in drawn)


def test_tokens_and_speed_are_of_the_whole_stage(page):
    assert (
        "12.3M tokens · 20.5k tokens/s" in page.shown
    )  # 1,500 steps of 8,192 tokens in 0.4 s each


def test_reused_and_stale_stages_are_told(tmp_path):
    folder = build_run(tmp_path / "tiny", "extend", {"reused": ["corpus", "tokenizer"]})
    changed = manifest("tokens") | {"digest": digest("another")}
    dump(folder / "tokens/manifest.json", changed)
    run = load_run(folder)
    assert [stage.name for stage in run.stages if stage.reused] == ["corpus", "tokenizer"]
    assert {stage.name: stage.stale for stage in run.stages if stage.stale} == {
        "pretrain": ["tokens"],
        "extend": ["pretrain", "tokens"],
        "evaluate-pretrain": ["pretrain"],
        "evaluate-extend": ["extend"],
    }
    source = write_report(folder).read_text(encoding="utf-8")
    assert "· reused" in source
    assert "· stale" in source


def test_stages_come_after_what_they_are_made_from(tmp_path):
    run = load_run(build_run(tmp_path / "tiny"))
    names = [stage.name for stage in run.stages]
    assert all(
        names.index(i) < names.index(stage.name) for stage in run.stages for i in stage.inputs
    )
