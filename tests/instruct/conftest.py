"""Projects of the annotation site for tests."""

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make projects that are served without a network; passwords are hashed quickly."""
    annotation = pytest.importorskip("annotation")  # skipped without openqwen[annotate]
    monkeypatch.setattr(annotation.accounts, "_COST", {"n": 16, "r": 1, "p": 1})
    places = []

    def make(database=None, folder="project", **settings):
        places.append(annotation.Place(tmp_path / folder, database, **settings))
        return places[-1]

    yield make
    for one in places:
        one.site.database.close()
