"""schemathesis against the OpenAPI document: whatever it invents, the answers are as documented and
never a 5xx.
"""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_found(start, tiny, reward, tmp_path):
    server = start(tiny, "--reward", reward, "--weights", tmp_path, "--max-context", 160)
    # What a schema cannot say ("tool_choice needs tools"), OpenAI's protocol refuses with 400.
    accepted = 'expected-statuses = ["2xx", "400", "404", "409"]'
    (tmp_path / "schemathesis.toml").write_text(f"[checks.positive_data_acceptance]\n{accepted}\n")
    command = [
        sys.executable,
        "-c",
        "from schemathesis.cli import schemathesis; schemathesis()",
        "run",
    ]
    command += [
        f"{server.url}/openapi.json",
        "--max-examples",
        "10",
        "--seed",
        "1",
        "--generation-database",
        "none",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
