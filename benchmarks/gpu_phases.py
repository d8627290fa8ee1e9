"""The phases of the GPU check; each measures one thing and writes its rows as JSON lines.

Weights are random, in published shapes. Rates are medians; the roofs (matrix products and copies of
the same card) are measured in the same run, and shares are shares of these.
"""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from openqwen.engine import Engine, Sampling
from openqwen.engine.config import EngineConfig
from openqwen.model import DualChunk, ModelConfig, Qwen2, Yarn, initialize
from openqwen.model import dual_chunk as chunks
from openqwen.model.experts import SparseFeedForward
from openqwen.model.feed_forward import FeedForward
from openqwen.recipe.verify import all_proofs
from openqwen.support.generators import Generators
from openqwen.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from openqwen.train.losses import next_token, token_log_probs
from openqwen.train.metrics import METRICS
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.trainer import Place, SaveConfig, Trainer, TrainingConfig

Row = dict[str, Any]
CUDA = torch.device(os.environ.get("GPU_CHECK_DEVICE", "cuda"))  # tests run phases on a CPU


def roofs() -> Iterator[Row]:
    """The card's best matrix product and copy: what the shares of the other phases are of."""
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / seconds_of(lambda: a @ b)
    x = torch.randn(2**30, device=CUDA)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / seconds_of(lambda: y.copy_(x))
    yield {
        "what": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bf16_tflops": round(flops / 1e12),
        "copy_gb_s": round(bandwidth / 1e9),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
    }


def parity() -> Iterator[Row]:
    """Compare logits, gradients and log-probabilities with those of the CPU in float64."""
    torch.set_float32_matmul_precision("highest")
    for name, config in small_networks().items():
        model = Qwen2(config)
        initialize(model, torch.Generator().manual_seed(0))
        for low, bound in ((False, 1e-4), (True, 2e-2)):
            found = gradient_of(copy.deepcopy(model).to(CUDA), low)
            exact = gradient_of(copy.deepcopy(model).double(), low=False)
            gaps = {key: round(relative(found[key], exact[key]), 7) for key in exact}
            kind = "bfloat16" if low else "float32"
            yield {"what": f"{name}, {kind}", **gaps, "holds": max(gaps.values()) <= bound}


def verify() -> Iterator[Row]:
    """The proofs of `openqwen verify` on the GPU, in float32: dense, then with experts."""
    torch.set_float32_matmul_precision("highest")
    tokenizer = small_tokenizer()
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(256, (n,), generator=generator).tolist()  # noqa: E731
    samples = [(draw(n), [0] * (n // 2) + [1] * (n - n // 2)) for n in (40, 100, 70, 33, 90)]
    for name in ("dense", "experts"):
        config = replace(small_networks()[name], vocab_size=tokenizer.vocab_size)
        model = Qwen2(config).to(CUDA)
        initialize(model, torch.Generator(CUDA).manual_seed(0))
        for proof in all_proofs(model, tokenizer, samples, seed=0):
            yield {
                "what": f"{name}: {proof.statement}",
                "seen": proof.difference,
                "bound": proof.bound,
                "holds": proof.holds,
            }


def train() -> Iterator[Row]:
    """Measure tokens/s and MFU of pre-training in bfloat16 over float32 weights."""
    peak = roof("bf16_tflops") * 1e12
    uneven = [600, 3000, 8192, 1500, 7000, 900, 5000, 6576]
    plans = [
        ("qwen2.5-0.5b", 24, [8192] * 4, "nothing", True),
        ("qwen2.5-7b", 5, [8192] * 2, "nothing", True),
        ("qwen2.5-0.5b", 24, uneven, "nothing", True),
        ("qwen2.5-7b", 5, [32768], "cheap", True),
        ("qwen2.5-0.5b", 24, [32768], "nothing", True),
        ("qwen2.5-0.5b", 24, [8192] * 4, "nothing", False),
    ]
    for name, layers, lengths, recompute, compiled in plans:
        config = replace(ModelConfig.named(name), num_hidden_layers=layers)
        shape = f"{len(lengths)} of {min(lengths):,} to {max(lengths):,}"
        label = f"{name}, {layers} layers, {shape}, recompute {recompute}"
        label += ", compiled" if compiled else ""
        torch.cuda.reset_peak_memory_stats()
        try:
            log = steps_of(config, lengths, recompute, compiled)
        except Exception as error:
            yield {"what": label, "failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        seconds = statistics.median(entry["seconds"] for entry in log[2:])
        speed = sum(lengths) / seconds
        seen = sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)
        yield {
            "what": label,
            "tokens_per_second": round(speed),
            "mfu": round(config.flops_per_token(seen) * speed / peak, 3),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }
        torch.cuda.empty_cache()


def experts() -> Iterator[Row]:
    """Time a sparse layer of 57B-A14B beside a dense layer of the same active size."""
    config = ModelConfig.named("qwen2-57b-a14b")
    width = config.num_experts_per_tok * config.moe_intermediate_size
    width += config.shared_expert_intermediate_size
    sparse = SparseFeedForward(config).to(CUDA, torch.bfloat16)
    for parameter in sparse.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    dense = FeedForward(config.hidden_size, width).to(CUDA, torch.bfloat16)
    x = torch.randn(
        16384, config.hidden_size, device=CUDA, dtype=torch.bfloat16, requires_grad=True
    )
    times = [seconds_of(lambda layer=layer: layer(x).sum().backward()) for layer in (sparse, dense)]
    yield {
        "what": "57B-A14B's layer, 16,384 tokens",
        "sparse_ms": round(times[0] * 1e3, 2),
        "dense_ms": round(times[1] * 1e3, 2),
        "speed_of_dense": round(times[1] / times[0], 2),
    }


def dual_chunk() -> Iterator[Row]:
    """Time Dual Chunk Attention beside FlashAttention of the same length, with 7B's heads."""
    dual = DualChunk(chunk_size=8192, local_size=1024, original_max_position_embeddings=8192)
    for length in (32768, 131072):
        yield _dual_chunk_row(length, dual.chunk_len)


def _dual_chunk_row(length: int, chunk_len: int) -> Row:
    shape = {"device": CUDA, "dtype": torch.bfloat16, "requires_grad": True}
    queries = tuple(torch.randn(length, 28, 128, **shape) for _ in range(3))
    k, v = (torch.randn(length, 4, 128, **shape) for _ in range(2))

    def flash() -> Tensor:
        one = [x[None].transpose(1, 2) for x in (queries[0], k, v)]
        out = scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)[0]

    def dual() -> Tensor:
        return chunks.attend(queries, k, v, chunk_len)

    row: Row = {"what": f"{length:,} tokens"}
    for name, way in (("dual", dual), ("flash", flash)):
        forward, both = both_ways(way)
        row |= {f"{name}_forward_ms": round(forward * 1e3, 2), f"{name}_ms": round(both * 1e3, 2)}
    row["forward_ratio"] = round(row["dual_forward_ms"] / row["flash_forward_ms"], 2)
    row["ratio"] = round(row["dual_ms"] / row["flash_ms"], 2)
    return row


def both_ways(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds of a function, then with its backward pass."""
    with torch.no_grad():
        forward = seconds_of(call, repeats=5)
    return forward, seconds_of(lambda: call().sum().backward(), repeats=5)


def decode() -> Iterator[Row]:
    """One request's time a token against the time that reading the weights takes."""
    tokenizer, bandwidth = small_tokenizer(), roof("copy_gb_s") * 1e9
    for name in ("qwen2.5-0.5b", "qwen2.5-7b"):
        for quantize in (None, "int8", "int4"):
            try:
                model = random_model(ModelConfig.named(name), quantize)
                engine = Engine(model, tokenizer, EngineConfig(cache_bytes=2**31, max_context=4096))
                prompt = torch.randint(256, (512,)).tolist()
                generate(engine, [prompt], 16)
                start, whole = (generate(engine, [prompt], tokens) for tokens in (8, 136))
            except Exception as error:
                yield {
                    "what": f"{name}, {quantize}",
                    "failed": f"{type(error).__name__}: {error}"[:300],
                }
                continue
            token = (whole - start) / 128
            row: Row = {"what": f"{name}, {quantize or 'bfloat16'}, one request"}
            row["ms_per_token"] = round(token * 1e3, 2)
            if quantize != "int4":  # torchao's tensors tell the size of what they stand for
                bound = _read_bytes(model) / bandwidth
                row |= {"weights_ms": round(bound * 1e3, 2), "ratio": round(token / bound, 2)}
            yield row
            del engine, model
            torch.cuda.empty_cache()


def _read_bytes(model: Qwen2) -> int:
    """Return the bytes of weights that a token reads: all but an embedding table that is not tied."""
    weights = chain(model.named_parameters(), model.named_buffers())
    passed = sum(x.nbytes for name, x in weights if "embed_tokens" not in name)
    return passed + (model.model.embed_tokens.weight.nbytes if model.lm_head is None else 0)


def serving() -> Iterator[Row]:
    """256 requests of 512 tokens in and 256 out, against the sum of their bounds; 7B's shape."""
    tokenizer, config = small_tokenizer(), ModelConfig.named("qwen2.5-7b")
    model = random_model(config, None)
    settings = EngineConfig(cache_bytes=24 * 2**30, max_running=256, max_context=4096)
    engine = Engine(model, tokenizer, settings)
    prompts = torch.randint(256, (256, 512)).tolist()
    generate(engine, prompts, 3)  # kernels are compiled and graphs are captured
    prefill = generate(engine, prompts, 1)
    engine.refresh()
    seconds = generate(engine, prompts, 256)
    reading = 256 * 512 * config.flops_per_token(256) / 3 / (roof("bf16_tflops") * 1e12)
    cache = 256 * (512 + 128) * 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * 128
    writing = 256 * (_read_bytes(model) + cache) / (roof("copy_gb_s") * 1e9)
    yield {
        "what": "7B's shape, 256 requests, 512 in, 256 out",
        "seconds": round(seconds, 2),
        "prefill_seconds": round(prefill, 2),
        "bound_seconds": round(reading + writing, 2),
        "ratio": round(seconds / (reading + writing), 2),
        "tokens_per_second": round(256 * 256 / seconds),
    }


def seconds_of(call: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of a call, by the GPU's own clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def roof(name: str) -> float:
    """A roof that the first phase measured; measured now where it was left out."""
    rows = json.loads(os.environ.get("GPU_ROOFS", "[]")) or list(roofs())
    return rows[0][name]


def small_networks() -> dict[str, ModelConfig]:
    """Networks that a CPU can check: dense, with experts, and both long contexts."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "vocab_size": 512,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    dense = ModelConfig(**sizes, **heads, tie_word_embeddings=False)
    sparse = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    dual = DualChunk(chunk_size=256, local_size=64, original_max_position_embeddings=256)
    return {
        "dense": dense,
        "experts": replace(dense, **sparse, shared_expert_intermediate_size=256),
        "YARN": replace(dense, yarn=Yarn(4.0, 256)),
        "dual chunk": replace(dense, dual_chunk=dual),
    }


def small_tokenizer() -> Tokenizer:
    """Bytes and control tokens."""
    return train_tokenizer(["a"], TokenizerConfig(vocabulary=256))


def gradient_of(model: Qwen2, low: bool) -> dict[str, Tensor]:
    """Return logits, log-probabilities and gradients of three packed documents, in float64."""
    generator = torch.Generator().manual_seed(2)
    lengths = (700, 45, 260)
    samples = [(torch.randint(512, (n,), generator=generator).tolist(), [1] * n) for n in lengths]
    rows = PackedBatch.of(samples, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
        logits = model.logits(model(rows.tokens, rows.positions, rows.attention))
        log_probs = token_log_probs(model, rows)
        loss = next_token(model, rows)
    loss.sum.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    found = {"logits": logits, "log_probs": log_probs, "gradients": torch.cat(gradients)}
    return {name: x.detach().double().cpu() for name, x in found.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def steps_of(
    config: ModelConfig, lengths: Sequence[int], recompute: str, compiled: bool
) -> list[Row]:
    """Return the trainer's log of six steps on random documents, one micro-batch per step."""
    model = Qwen2(config).to(CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    initialize(model, generator)

    def batch(step: int) -> list[PackedBatch]:
        ids = [torch.randint(1000, (n + 1,)).tolist() for n in lengths]
        return [PackedBatch.of([(row, [1] * len(row)) for row in ids], CUDA)]

    optimizer = OptimizerConfig(learning_rate=1e-5, recompute=recompute, compile=compiled)
    settings = TrainingConfig(train=optimizer, save=SaveConfig(seconds=1e9))
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name) / "output", Path(name) / "scratch", 0, "gpu")
        loss = lambda rows: next_token(model, rows)  # noqa: E731
        Trainer(place, settings, model, batch, loss, 6, Generators(0), log_mfu=True).run()
        return [json.loads(line) for line in (place.output / METRICS).read_text().splitlines()]


def random_model(config: ModelConfig, quantize: str | None) -> Qwen2:
    """A network in bfloat16, or quantised, made on the GPU."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(CUDA):
        model = Qwen2(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.requires_grad_(False)
    if quantize:
        from openqwen.model.quantize_gpu import quantize_on_gpu

        quantize_on_gpu(model, quantize)
    return model


def generate(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Seconds of answering prompts with so many tokens each; nothing is found in the cache."""
    engine.refresh()
    torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = engine.generate(prompts, Sampling(max_tokens=tokens, ignore_eos=True))
    torch.cuda.synchronize()
    assert all(len(output.token_ids) == tokens for output in outputs)
    return time.perf_counter() - start


def main() -> None:
    """Run one phase; its rows go into a file as they come."""
    phase, place = sys.argv[1:3]
    wrong = False
    with open(place, "w", encoding="utf-8") as file:
        for row in globals()[phase]():
            file.write(json.dumps(row) + "\n")
            file.flush()
            print("  " + json.dumps(row), flush=True)
            wrong |= row.get("holds") is False or "failed" in row
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
