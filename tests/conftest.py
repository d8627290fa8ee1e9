"""Shared by all tests: one thread less noise, no network, a browser, a small Ray cluster."""

import os
import shutil
import sys

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
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    given = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import files of tests
        ray.init("local", num_cpus=4, object_store_memory=2 * 10**8, **given)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module", params=["processes", "ray"])
def kind(request):
    """The kinds of worker processes."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param
