"""The same tests on PostgreSQL: same models, same migrations, same answers."""

import itertools

import pytest
from annotation import Place
from postgres import new_database, server
from test_annotation import (  # noqa: F401
    test_a_clock_that_jumps_changes_no_order,
    test_a_draft_comes_back_in_every_window_and_undo_brings_the_answer_back,
    test_a_key_is_counted_once_and_a_second_window_is_told,
    test_a_lease_that_has_run_out_loses_the_place_but_no_answer,
    test_a_refused_answer_returns_to_its_person_and_leaves_the_export,
    test_a_skipped_task_goes_to_others_and_not_to_me,
    test_a_task_whose_content_changes_is_asked_anew,
    test_an_answer_goes_from_the_page_to_the_export,
    test_an_empty_project_says_so,
    test_fifteen_at_once_never_hold_the_same_place,
    test_nobody_sees_answers_before_their_own_and_who_looked_gets_no_task,
    test_priorities_come_first_and_gold_tasks_are_everybodys,
)
from test_annotation_attacks import (  # noqa: F401
    test_html_sql_and_control_characters_are_text_in_every_field,
    test_the_log_and_the_exports_hold_no_secret,
)
from test_annotation_exports import test_an_export_of_events_fills_a_new_project  # noqa: F401

from openqwen.instruct.collaborate import accounts
from openqwen.instruct.collaborate.settings import AnnotateConfig
from openqwen.instruct.collaborate.site import Site
from openqwen.support.errors import OpenQwenError

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def postgresql():
    with server("-c fsync=off") as folder:
        yield folder


@pytest.fixture
def place(tmp_path, monkeypatch, postgresql):
    monkeypatch.setattr(accounts, "_COST", {"n": 16, "r": 1, "p": 1})
    places = []

    def make(folder="project", **settings):
        url = new_database(postgresql, f"d{next(NUMBERS)}")
        places.append(Place(tmp_path / folder, url, **settings))
        assert places[-1].site.database.is_postgresql
        return places[-1]

    yield make
    for one in places:
        one.site.database.close()


def test_a_database_of_another_project_is_refused(place, tmp_path):
    p = place()
    other = tmp_path / "other"
    with pytest.raises(OpenQwenError, match="belongs to the project p1"):
        Site(other, AnnotateConfig(database=p.site.config.database))


@pytest.mark.parametrize(
    "url", ["mysql://u@h/d", "nothing", "postgresql://u:secret@/d?host=/nowhere"]
)
def test_a_wrong_url_is_named_without_its_password(tmp_path, url):
    with pytest.raises(OpenQwenError) as error:
        Site(tmp_path / "p", AnnotateConfig(database=url))
    assert "secret" not in str(error.value)
