"""llama.cpp's own server tests, and vLLM's, against `openqwen serve`.

    python benchmarks/peer_server_tests.py MODEL --llama-cpp CHECKOUT --vllm CHECKOUT --quantize int8

Starts servers on loopback, runs the peers' own test files against them unchanged (llama.cpp's with
DEBUG_EXTERNAL=1), and says what passed. Tests that ask for something else than OpenAI's protocol
are left out, each with its reason, in the tables below. Three things are put into the tests' world:
llama.cpp's `match_regex`, which compares with the words of its own model of 260,000 parameters,
takes any words; vLLM's `RemoteOpenAIServer` is the server that already runs; and `vllm` itself is
hollow, as only tests of its insides need it. The names under which the tests ask for models are
names of ours. Needs pytest, pytest-asyncio, openai, requests, filelock and jsonschema.
"""

import argparse
import importlib.abc
import importlib.machinery
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

# What is left out: (what a test's name matches, why); the first that fits counts.
LLAMA_CPP = [
    (
        r"test_(infill|template|lora|slot_save|ctx_shift|ignore_eos|kv_keep_only_active|speculative|sleep|metrics|rerank)\b",
        "native",
    ),
    (
        r"test_(router|proxy|mcp_servers|tools_builtin|stream|compat_gcp|compat_anthropic)\b",
        "protocol",
    ),
    (r"vision_api|local_media_file|_mtmd|mtm_error", "media"),
    (r"server_(props|slots|multiple_addresses|model_aliases)|load_split_model|no_ui", "native"),
    (r"test_completion\.py(?!.*openai_library)|test_correct_api_key", "native"),
    (
        r"chat_template|apply_chat|json_schema\[|with(_invalid)?_grammar|timings|progress|telemetry|verbose|token_count",
        "native",
    ),
    (r"context_size_exceeded|static_assets|_cors_proxy|with_tools_enabled|pooling_none", "native"),
    (r"chat_completion\[|cached_tokens|usage_|with_bos|multiple_choices", "its model"),
    (r"invalid_chat_completion_req\[messages7\]", "two answers in a row: OpenAI takes them"),
    (
        r"mixed_input\[(-|input(3|5|7|8|9|10)-)|content_text_same",
        "empty, mixed or wrapped inputs: OpenAI refuses them",
    ),
    (
        r"cors_options|origins_localhost",
        "looks headers up by case; wants 200 for strangers, who get 400 here",
    ),
    (
        r"tool_call\.py(?!.*(without_tool_call_fast|required_tool_real_model.*Qwen2.5-7B))",
        "its model",
    ),
    (r"openai_library_stops", "its model"),
]
VLLM = [
    (r"_request_|null_top_logprobs|prompt_embeds|engine_dead|bad_words", "insides"),
    (
        r"prompt_logprobs|single_completion|truncation|token_ids_(round|stream)|logprob_token_ids|per_request_metrics",
        "own",
    ),
    (
        r"return_token_ids|kv_transfer|invocations|custom_role|test_top_logprobs|echo_and_continue|batch_completions|server_load",
        "own",
    ),
    (r"show_version|enable_response_messages|empty_prompt|long_seed|multiple_non_integer", "own"),
    (r"reasoning|tool_use|simple.py::test_max_tokens", "its model"),
    (r"single_chat_session|format_json_schema", "its model"),
    (
        r"chat_streaming|chat_completion_stream_options\[",
        "last words in the finishing chunk; llama.cpp's tests forbid it",
    ),
    (
        r"simple.py::test_streaming_(logprobs|types)",
        "log-probabilities and reasoning in /v1/responses: not offered",
    ),
]
WHY = {
    "native": "a route, field, flag or message of llama-server's own",
    "protocol": "another protocol than OpenAI's, or llama-server's router",
    "media": "images or sound",
    "its model": "the words or token counts of the peer's own model",
    "insides": "vLLM's own classes, not its server",
    "own": "a route, field or message of vLLM's own",
}
VLLM_FILES = [
    "openai/chat_completion/test_chat",
    "openai/chat_completion/test_chat_completion",
    "openai/chat_completion/test_chat_echo",
    "openai/chat_completion/test_chat_logit_bias_validation",
    "openai/completion/test_completion",
    "openai/completion/test_prompt_validation",
    "openai/responses/test_simple",
    "openai/test_chunked_prompt",
    "openai/test_return_token_ids",
    "serve/instrumentator/test_basic",
]  # the others test vLLM's own classes, or want models of another kind
SECRET = "sk-this-is-the-secret-key"  # of llama.cpp's test_security.py
OURS = [
    "llama-test-model",
    "tinyllama-2",
    "gpt-3.5-turbo-instruct",
    "davinci-002",
    "gpt-4.1",
    "text-embedding-3-small",
]
THEIRS = [f"Qwen/Qwen{kind}" for kind in ("2-1.5B-Instruct", "2.5-1.5B-Instruct", "3-0.6B", "3-8B")]
THEIRS += ["openai-community/gpt2", "HuggingFaceH4/zephyr-7b-beta", "zephyr-lora"]
RUNS = [  # peer, flags of our server, test files; none: all files that no run before names
    ("llama.cpp", ["--name", "tinyllama-2"], ["unit/test_basic.py"]),
    ("llama.cpp", ["--name", "gpt-3.5-turbo", "--api-key", SECRET], ["unit/test_security.py"]),
    ("llama.cpp", ["--name", *OURS], []),
    ("vllm", ["--name", *THEIRS], [f"tests/entrypoints/{name}.py" for name in VLLM_FILES]),
]


if "PEER" in os.environ:
    sys.modules["wget"] = types.ModuleType(
        "wget"
    )  # llama.cpp's tests import it to download their models


# ---- Inside pytest, of which this file is a plugin


def pytest_configure(config: pytest.Config) -> None:
    """Make the world that the tests expect."""
    if os.environ["PEER"] == "llama.cpp":
        import utils

        strict = utils.match_regex
        utils.match_regex = lambda regex, text: (
            strict(regex, text) if _structured() else isinstance(text, str)
        )
    else:
        sys.meta_path.append(_Hollow())
        sys.modules["tests.utils"] = _Hollow.module("tests.utils")
        sys.modules["tests.utils"].RemoteOpenAIServer = Running  # type: ignore[attr-defined]
        config.pluginmanager.import_plugin("tests.entrypoints.conftest")


def _structured() -> bool:
    """Whether the words are forced by a schema, whatever the model."""
    return "response_format" in os.environ["PYTEST_CURRENT_TEST"]


class _Hollow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of vllm, with every name in it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return self.module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass

    @staticmethod
    def module(name: str) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__path__ = []
        made.__getattr__ = lambda attribute: _inside(name, attribute)  # type: ignore[method-assign]
        return made


def _inside(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "get_tokenizer":
        return lambda *_, **__: _Tokenizer()
    if name == "ModelConfig":
        return lambda *_, **__: types.SimpleNamespace(get_vocab_size=lambda: _Tokenizer().size)
    return MagicMock(name=f"{module}.{name}")


class _Tokenizer:
    """The few methods of transformers' tokenizers that the tests use."""

    def __init__(self) -> None:
        from openqwen import load_tokenizer

        self._ours = load_tokenizer(os.environ["PEER_MODEL"])
        self.size = self._ours.vocab_size

    def encode(self, text: str, **_: Any) -> list[int]:
        return self._ours.encode(text)

    def decode(self, ids: list[int], **_: Any) -> str:
        return self._ours.decode(ids, skip_control=False)

    def __call__(self, text: str, **_: Any) -> Any:
        return types.SimpleNamespace(input_ids=self.encode(text))


class Running:
    """vLLM's RemoteOpenAIServer, of a server that runs already."""

    DUMMY_API_KEY = "token-abc123"
    url_root = f"http://127.0.0.1:{os.environ.get('PORT')}"

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        return self.url_root + "/" + "/".join(parts)

    def get_client(self, **options: Any) -> Any:
        import openai

        given = {
            "base_url": self.url_for("v1"),
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            "timeout": 600,
        }
        return openai.OpenAI(**(given | options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        given = {
            "base_url": self.url_for("v1"),
            "api_key": self.DUMMY_API_KEY,
            "max_retries": 0,
            "timeout": 600,
        }
        return openai.AsyncOpenAI(**(given | options))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the table names."""
    rules: list[list[str]] = json.loads(os.environ["PEER_RULES"])
    kept = []
    for item in items:
        reason = next((why for part, why in rules if re.search(part, item.nodeid)), None)
        if reason is None:
            kept.append(item)
        else:
            _say(item.nodeid, "left out", reason)
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell how a test ended."""
    if report.when == "call" or not report.passed:
        _say(report.nodeid, report.outcome, str(report.longrepr or "").strip().splitlines()[-1:])


def _say(name: str, outcome: str, why: Any) -> None:
    with open(os.environ["PEER_RESULTS"], "a") as file:
        file.write(json.dumps([name, outcome, why]) + "\n")


# ---- Outside pytest


def main() -> None:
    """Run what applies and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, or a .gguf file")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        help="a checkout of llama.cpp, or what holds its tools/server/tests",
    )
    parser.add_argument("--vllm", type=Path, help="a checkout of vLLM, or what holds its tests")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="a Python that has pytest and what the tests import",
    )
    parser.add_argument("--quantize", help="as for openqwen serve")
    given = parser.parse_args()
    roots = {
        "llama.cpp": given.llama_cpp and given.llama_cpp / "tools/server/tests",
        "vllm": given.vllm,
    }
    more = ["--quantize", given.quantize] if given.quantize else []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(__file__, folder)  # alone: other files here bear names of modules
        for peer, root in roots.items():
            if root is None:
                continue
            outcomes = []
            for number, (whose, flags, files) in enumerate(RUNS):
                if whose == peer:
                    named = {file for _, _, before in RUNS[:number] for file in before}
                    tests = files or [
                        f"unit/{path.name}" for path in sorted((root / "unit").glob("test_*.py"))
                    ]
                    tests = [test for test in tests if test not in named]
                    outcomes += run(
                        peer, root.resolve(), tests, given, [*flags, *more], Path(folder)
                    )
            failed |= report(peer, outcomes)
    sys.exit(failed)


def run(
    peer: str, root: Path, tests: list[str], given: Any, flags: list[str], folder: Path
) -> list[list[Any]]:
    """(test, outcome, why) of tests against a server of ours."""
    length = "8192" if peer == "vllm" else "512"  # llama.cpp's are told that there is little room
    command = [
        sys.executable,
        "-m",
        "openqwen.cli",
        "serve",
        given.model,
        "--port",
        "0",
        "--max-context",
        length,
        *flags,
    ]
    wide = os.environ | {"COLUMNS": "1000"}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=wide
    )
    try:
        assert server.stdout is not None
        port = next(
            found[1] for line in server.stdout if (found := re.search(r"http://\S+:(\d+)$", line))
        )
        results = folder / "results.jsonl"
        results.write_text("")
        rules = [(part, WHY.get(why, why)) for part, why in (VLLM if peer == "vllm" else LLAMA_CPP)]
        variables = {
            "PEER": peer,
            "PORT": port,
            "PEER_MODEL": given.model,
            "PEER_RESULTS": str(results),
        }
        variables |= {"DEBUG_EXTERNAL": "1", "PEER_RULES": json.dumps(rules)}
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(folder), str(root), os.environ.get("PYTHONPATH", "")]
        )
        pytest = [
            given.python,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "peer_server_tests",
            "-p",
            "no:cacheprovider",
        ]
        own = ["--noconftest", "-o", "asyncio_mode=auto"] if peer == "vllm" else []
        done = subprocess.run(
            [*pytest, *own, *tests],
            cwd=root,
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        if done.returncode > 1:  # not a test that failed, but pytest
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        return [json.loads(line) for line in results.read_text().splitlines()]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def report(peer: str, outcomes: list[list[Any]]) -> bool:
    """Print what became of a peer's tests; whether one failed."""
    counts = Counter(outcome for _, outcome, _ in outcomes)
    applied = counts["passed"] + counts["failed"]
    print(
        f"{peer}: {len(outcomes)} tests, {applied} applied, {counts['passed']} passed, "
        f"{counts['failed']} failed"
    )
    for why, count in Counter(
        why for _, outcome, why in outcomes if outcome == "left out"
    ).most_common():
        print(f"  {count:4} left out: {why}")
    for name, outcome, why in outcomes:
        if outcome not in ("passed", "left out"):
            print(f"  {outcome}: {name} {why}")
    return counts["failed"] > 0


if __name__ == "__main__":
    main()
