"""The runner of synthesis: same bytes whatever happens, nothing asked twice, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from scripted import Guess, Scripted, prompt_digest, records, run, said

from openqwen.engine import Output
from openqwen.instruct.synthesize import journal, runner
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.journal import CallLog, Journal
from openqwen.instruct.synthesize.method import assistant
from openqwen.sandbox import Program
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Task


def limits(**values):
    return SynthesisConfig(limits=values)


def test_records_gates_quarantine_and_origin(tmp_path):
    generator = Scripted(said)
    counts, found = run(tmp_path, generator)
    d, p, q = (records(found, name) for name in ("demonstrations", "preferences", "quarantine"))
    assert counts["items"] == 40
    assert counts["demonstrations"] == len(d) > 20
    assert counts["preferences"] == len(p) > 5
    assert counts["requests"] == len(generator.asked) > 39 * 3
    parents = [record["origin"]["parents"][0] for record in d]
    assert parents == sorted(parents, key=lambda name: int(name[2:]))  # the items' order
    assert "n/7" not in parents
    assert {"item": "n/7", "reason": "seven is no number"} in q
    assert sum(entry["reason"].startswith("even: odd") for entry in q) > 10
    origin = d[0]["origin"]
    digests = {name: prompt_digest("rejection", name) for name in ("solve.en", "judge.en")}
    assert origin["prompts"] == digests
    assert (origin["method"], origin["model"], origin["seed"]) == ("rejection", "model", 1)
    report = json.loads(found["synthesis.json"])
    assert report["gates"]["even"]["passed"] == len(d)
    assert report["gates"]["even"]["of"] == report["gates"]["ended"]["passed"] == 39 * 3
    assert report["reasons"]["seven is no number"] == 1
    used = tmp_path / "output" / "prompts" / "solve.en.jinja"
    assert "step by step" in used.read_text()


def test_concurrency_changes_no_byte_and_the_seed_does(tmp_path):
    one = run(tmp_path / "1", Scripted(said), limits(concurrency=1))
    many = run(tmp_path / "8", Scripted(said), limits(concurrency=8))
    assert one == many
    other = run(tmp_path / "other", Scripted(said), seed=2)
    assert other[1]["demonstrations.jsonl"] != one[1]["demonstrations.jsonl"]


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("after", [0, 1, 40, 100])
def test_a_run_that_ended_anywhere_continues_to_the_same_bytes(tmp_path, after):
    whole = Scripted(said)
    expected = run(tmp_path / "whole", whole)
    first = Scripted(lambda text, seed: Killed() if len(first.asked) > after else said(text, seed))
    with pytest.raises(Killed):
        run(tmp_path / "cut", first)
    second = Scripted(said)
    assert run(tmp_path / "cut", second) == expected
    finished = first.asked[:after]
    assert sorted(finished + second.asked) == sorted(whole.asked)  # nothing twice, nothing else


KILLED = """
    import signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, {tests!r})
    from scripted import Scripted, run, said
    def slow(text, seed):
        time.sleep(0.01)
        return said(text, seed)
    run(Path({place!r}), Scripted(slow))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_resumes(tmp_path, kind):
    expected = run(tmp_path / "whole", Scripted(said))
    place = tmp_path / "cut"
    code = textwrap.dedent(KILLED).format(tests=os.path.dirname(__file__), place=str(place))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    calls = place / "scratch" / "calls.jsonl"
    while not calls.exists() or calls.read_bytes().count(b"\n") < 30:
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(kind)
    process.communicate()
    kept = calls.read_bytes().count(b"\n")
    generator = Scripted(said)
    assert run(place, generator) == expected
    assert len(generator.asked) == expected[0]["requests"] - kept


def test_lines_that_were_cut_or_damaged(tmp_path):
    expected = run(tmp_path, Scripted(said))
    calls, finished = (tmp_path / "scratch" / f"{name}.jsonl" for name in ("calls", "finished"))
    calls.write_bytes(calls.read_bytes()[:-9])
    lines = finished.read_bytes().splitlines(keepends=True)
    finished.write_bytes(b"".join([*lines[:9], b"\x00" * 30 + b"\n", *lines[10:]]))
    again = Scripted(said)
    assert run(tmp_path, again) == expected
    assert len(again.asked) == 1
    finished.unlink()
    assert run(tmp_path, Scripted(lambda *_: Killed())) == expected  # every call is there


def test_other_prompts_start_anew_with_the_calls_that_are_the_same(tmp_path):
    run(tmp_path, Scripted(said))
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "judge.en.jinja").write_text("Is {{ solution }} good?")
    generator = Scripted(said)
    counts, found = run(tmp_path, generator, SynthesisConfig(prompts=folder))
    assert all(" good?" in text for text, _ in generator.asked)
    assert 0 < len(generator.asked) < counts["requests"]
    origin = records(found, "demonstrations")[0]["origin"]
    assert origin["prompts"]["judge.en"] != prompt_digest("rejection", "judge.en")


def test_calls_can_be_kept_for_other_runs(tmp_path):
    config = limits(calls=tmp_path / "shared" / "calls.jsonl")
    first = run(tmp_path / "a", Scripted(said), config)
    assert run(tmp_path / "b", Scripted(lambda *_: Killed()), config) == first


def test_two_runs_cannot_write_to_one_log(tmp_path):
    log = CallLog(tmp_path / "calls.jsonl")
    with pytest.raises(OpenQwenError, match="Another run writes"):
        CallLog(tmp_path / "calls.jsonl")
    log.close()
    CallLog(tmp_path / "calls.jsonl").close()


@pytest.mark.parametrize("name", ["requests", "tokens"])
def test_a_limit_stops_and_a_higher_one_continues(tmp_path, name):
    expected = run(tmp_path / "whole", Scripted(said))
    first = Scripted(said)
    most = 50 if name == "requests" else 3000
    with pytest.raises(OpenQwenError, match=f"limit of .* {name} is reached"):
        run(tmp_path / "cut", first, limits(**{name: most}))
    if name == "requests":
        assert len(first.asked) == 50
    second = Scripted(said)
    assert run(tmp_path / "cut", second) == expected
    assert len(first.asked) + len(second.asked) == expected[0]["requests"]


def test_failed_requests_are_counted_and_asked_again_by_the_next_run(tmp_path):
    def sometimes(text, seed):
        return OpenQwenError("It is down.", "there") if seed % 10 == 0 else said(text, seed)

    counts, found = run(tmp_path / "few", Scripted(sometimes))
    assert counts["failures"] > 3
    reasons = [entry["reason"] for entry in records(found, "quarantine")]
    assert reasons.count("a request failed: It is down. (there)") == counts["failures"]

    with pytest.raises(OpenQwenError, match="the last: a request failed: It is down"):
        run(tmp_path / "cut", Scripted(sometimes), limits(errors=3))
    assert run(tmp_path / "cut", Scripted(said)) == run(tmp_path / "whole", Scripted(said))


def test_an_item_with_a_failed_request_is_done_again(tmp_path):
    early = Scripted(
        lambda text, seed: OpenQwenError("Down.") if len(early.asked) == 2 else said(text, seed)
    )
    with pytest.raises(OpenQwenError, match="limit of 60 requests"):
        run(tmp_path / "cut", early, limits(requests=60, concurrency=1))
    lines = (tmp_path / "cut" / "scratch" / "finished.jsonl").read_text().splitlines()
    assert [json.loads(line)["failures"] for line in lines[1:3]] == [1, 0]
    assert run(tmp_path / "cut", Scripted(said)) == run(tmp_path / "whole", Scripted(said))


def test_no_answer_at_all_stops_soon(tmp_path):
    generator = Scripted(lambda *_: OpenQwenError("It is down."))
    with pytest.raises(OpenQwenError, match="11 errors"):
        run(tmp_path, generator, limits(errors=10, concurrency=4))
    assert len(generator.asked) < 20


@pytest.mark.parametrize("answer", ["", " \n", "\x00", "�" * 9, "nonsense {", "9" * 100_000])
def test_answers_that_are_of_no_use(tmp_path, answer):
    counts, found = run(tmp_path, Scripted(lambda *_: answer))
    assert counts["items"] == 40
    assert max(len(line) for line in found["quarantine.jsonl"].splitlines()) < 20_000


def test_answers_without_an_end_and_halves_of_characters(tmp_path):
    endless = Output("8 8 8 8", finish_reason="length")
    counts, _ = run(tmp_path / "endless", Scripted(lambda *_: endless))
    assert counts["demonstrations"] == 0
    counts, found = run(tmp_path / "half", Scripted(lambda *_: "\ud800 8"))
    assert b"? 8" in found["demonstrations.jsonl"]
    assert run(tmp_path / "half", Scripted(lambda *_: Killed())) == (counts, found)


def test_a_record_that_is_no_json_is_refused(tmp_path):
    class Odd(Guess):
        def steps(self, item, work):
            yield from ()
            deep = []
            for _ in range(200):
                deep = [deep]
            origin = [{"score": float("nan")}, {"text": "\udc00"}, {"deep": deep}, {}][item.data]
            work.demonstration([assistant(str(item.data))], **origin)

    counts, found = run(tmp_path, Scripted(said), method=Odd(SynthesisConfig(), 4))
    assert counts["demonstrations"] == 1
    assert json.loads(found["synthesis.json"])["reasons"] == {"the record is no JSON": 3}


def test_a_log_that_is_something_else(tmp_path):
    other = tmp_path / "tasks.jsonl"
    other.write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(OpenQwenError, match="This is no log of calls"):
        run(tmp_path / "a", Scripted(said), limits(calls=other))
    assert other.read_text() == '{"question": "1 + 1?"}\n'
    with pytest.raises(OpenQwenError, match="cannot be written: Is a directory"):
        run(tmp_path / "a", Scripted(said), limits(calls=tmp_path))


def test_the_same_record_of_two_items_is_written_once(tmp_path):
    class Same(Guess):
        def steps(self, item, work):
            yield from ()
            work.demonstration([{"role": "user", "content": "a"}])

    counts, found = run(tmp_path, Scripted(said), method=Same(SynthesisConfig(), 5))
    assert (counts["demonstrations"], counts["duplicates"]) == (1, 4)
    assert len(records(found, "demonstrations")) == 1


def test_an_error_in_an_item_ends_the_item_alone(tmp_path):
    class Faulty(Guess):
        def steps(self, item, work):
            yield from super().steps(item, work)
            if item.data == 3:
                raise OpenQwenError("Three is too many.", "here")

    config = SynthesisConfig()
    counts, found = run(tmp_path, Scripted(said), method=Faulty(config, 40))
    assert counts["failures"] == 1
    assert {"item": "n/3", "reason": "Three is too many. (here)"} in records(found, "quarantine")
    assert "n/3" not in {r["origin"]["parents"][0] for r in records(found, "demonstrations")}


def test_a_program_and_a_task_that_cannot_be_used_end_their_items_alone(tmp_path):
    class Odd(Guess):
        def steps(self, item, work):
            language = "no such" if item.data == 1 else "python"
            (verdict,) = yield from work.run([Program("print(5)", language=language)])
            grader = "no such" if item.data == 2 else "exact"
            task = Task("t", [{"role": "user", "content": "?"}], grader, {"answer": "5"})
            (grade,) = yield from work.grade([task], [verdict.stdout])
            work.demonstration([assistant(f"{item.data} {grade.passed}")])

    counts, found = run(tmp_path, Scripted(said), method=Odd(SynthesisConfig(), 4))
    assert (counts["items"], counts["failures"]) == (4, 2)
    texts = [r["messages"][0]["content"] for r in records(found, "demonstrations")]
    assert texts == ["0 True", "3 True"]
    assert [entry["item"] for entry in records(found, "quarantine")] == ["n/1", "n/2"]


def test_prepare_runs_before_the_items_and_again_after_a_kill(tmp_path):
    class Prepared(Guess):
        def prepare(self, work):
            outputs = yield from work.ask([work.messages("solve", question="how many?")], SAMPLING)
            work.gate("prepared", True)
            self.count = 10 + len(outputs[0].text)

    from openqwen.engine import Sampling

    SAMPLING = Sampling(temperature=1.0)
    config = SynthesisConfig()
    expected = run(tmp_path / "whole", Scripted(said), method=Prepared(config, 0))
    assert 10 < expected[0]["items"] < 30
    assert json.loads(expected[1]["synthesis.json"])["gates"]["prepared"]["of"] == 1
    first = Scripted(lambda text, seed: Killed() if len(first.asked) > 20 else said(text, seed))
    with pytest.raises(Killed):
        run(tmp_path / "cut", first, method=Prepared(config, 0))
    assert run(tmp_path / "cut", Scripted(said), method=Prepared(config, 0)) == expected


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", Scripted(said))
    real = Journal.append
    written = []

    def full(self, value):
        if len(written) == 60:
            half = json.dumps(value).encode()[:20]
            os.write(self._file.fileno(), half)  # a disk takes what still fits
            raise OpenQwenError("There is no space left to write.", self.path)
        written.append(value)
        return real(self, value)

    monkeypatch.setattr(journal.Journal, "append", full)
    with pytest.raises(OpenQwenError, match="no space left"):
        run(tmp_path / "cut", Scripted(said))
    monkeypatch.undo()
    assert run(tmp_path / "cut", Scripted(said)) == expected


def test_a_disk_that_is_full_for_real(tmp_path):
    """A file limit stands for it: the system refuses to write on."""
    code = f"""
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        from scripted import Scripted, run, said
        from openqwen.support.errors import OpenQwenError
        try:
            run(Path({str(tmp_path)!r}), Scripted(said))
        except OpenQwenError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert "There is no space left to write." in done.stdout, done.stderr
    files = [tmp_path / "scratch" / f"{name}.jsonl" for name in ("calls", "finished")]
    assert all(path.read_bytes().endswith(b"\n") for path in files)  # no half of a line
    assert max(path.stat().st_size for path in files) > 8000
    expected = run(tmp_path / "whole", Scripted(said))
    assert run(tmp_path, Scripted(said)) == expected


def test_a_rate_is_kept(tmp_path, monkeypatch):
    config = limits(rate=60_000, concurrency=4)
    assert run(tmp_path / "a", Scripted(said), config) == run(tmp_path / "b", Scripted(said))
    clock, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        clock.append(clock[-1] + seconds)

    false_time = SimpleNamespace(sleep=sleep, monotonic=lambda: clock[-1])
    monkeypatch.setattr(runner, "time", false_time)
    counts, _ = run(tmp_path / "c", Scripted(said), limits(rate=600), method=Guess(config, 20))
    assert sum(slept) == pytest.approx((counts["requests"] - 1) / 10, abs=0.01)
