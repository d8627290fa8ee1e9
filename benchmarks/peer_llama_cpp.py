"""llama.cpp's side of `bench_engine.py`; it runs under the peer's Python without OpenQwen.

Read on standard input: {"model", "threads", "prefill": [ids], "prompts": [[ids], ...], "written",
"new"}. Printed: JSON with seconds for reading `prefill`, for each of the `written` tokens after it,
and for all prompts at once (read, then `new` tokens of each).
"""

import ctypes
import json
import sys
import time

import llama_cpp as cpp

_BATCH = 2_048


class Context:
    """A model with several sequences; its batches hold (token, position, sequence, wanted)."""

    def __init__(self, path: str, threads: int, room: int, sequences: int):
        cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot read {path}")
        params = cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = room * sequences, _BATCH, sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # its own advice for sequences that share nothing
        self.context = cpp.llama_init_from_model(self.model, params)
        self.vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))
        self.batch = cpp.llama_batch_init(_BATCH, 0, 1)

    def clear(self) -> None:
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)

    def read(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """One call; returns the likeliest next token of each wanted row."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for n, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.logits[n] = (
                token,
                position,
                1,
                wanted,
            )
            batch.seq_id[n][0] = sequence
        if cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode a batch")
        found = []
        for n, row in enumerate(rows):
            if row[3]:
                logits = cpp.llama_get_logits_ith(self.context, n)
                found.append(_largest(logits, self.vocabulary))
        return found

    def prompt(self, ids: list[int], sequence: int = 0) -> int:
        """Read a prompt; returns the next token."""
        rows = [(t, p, sequence, p == len(ids) - 1) for p, t in enumerate(ids)]
        found: list[int] = []
        for start in range(0, len(rows), _BATCH):
            found = self.read(rows[start : start + _BATCH])
        return found[-1]


def _largest(logits: object, count: int) -> int:
    import numpy as np

    return int(np.ctypeslib.as_array(logits, shape=(count,)).argmax())  # type: ignore[call-overload]


@cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


def _one(context: Context, ids: list[int], written: int) -> tuple[float, float]:
    """Seconds for a prompt, and for each token after it."""
    context.clear()
    start = time.perf_counter()
    token = context.prompt(ids)
    read = time.perf_counter() - start
    start = time.perf_counter()
    for n in range(written):
        (token,) = context.read([(token, len(ids) + n, 0, True)])
    return read, (time.perf_counter() - start) / written


def _together(context: Context, prompts: list[list[int]], new: int) -> float:
    """Return the seconds for reading all prompts and generating `new` tokens of each, batched."""
    context.clear()
    start = time.perf_counter()
    tokens = [context.prompt(ids, sequence) for sequence, ids in enumerate(prompts)]
    for n in range(new - 1):
        tokens = context.read([(t, len(prompts[s]) + n, s, True) for s, t in enumerate(tokens)])
    return time.perf_counter() - start


def main() -> None:
    """See the module's docstring."""
    job = json.load(sys.stdin)
    alone = Context(job["model"], job["threads"], len(job["prefill"]) + job["written"] + 8, 1)
    alone.prompt(job["prefill"][:64])  # warm: the file is mapped, not read
    read, token = _one(alone, job["prefill"], job["written"])
    many = Context(
        job["model"], job["threads"], len(job["prompts"][0]) + job["new"] + 8, len(job["prompts"])
    )
    together = _together(many, job["prompts"], job["new"])
    print(json.dumps({"prefill": read, "token": token, "together": together}))


main()
