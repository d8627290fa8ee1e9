"""Which stages of the fake recipe really ran."""

import os

from openqwen.support.stage import StageRun


def log_run(run: StageRun) -> None:
    """Tests ask which stages really ran."""
    if "FAKE_LOG" in os.environ:
        with open(os.environ["FAKE_LOG"], "a") as log:
            log.write(run.label + "\n")
