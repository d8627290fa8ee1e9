"""Shared by all tests: one thread less noise, no network, a browser, a small Ray cluster."""

import os
import shutil
import sys
from contextlib import ExitStack

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="module")
def chromium():
    """Chromium, by Playwright; the test is skipped where either is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("there is no chromium; set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray with 4 CPUs on this machine; the test is skipped where it is not installed."""
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    from openqwen.support.workers import WorkersConfig, joined_ray

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import files of tests
        yield stack.enter_context(joined_ray(WorkersConfig(count=4, cpus=1)))


@pytest.fixture(scope="module", params=["processes", "ray"])
def kind(request):
    """The kinds of worker processes."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param
