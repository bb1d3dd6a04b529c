"""Decoding speed and memory of this project and its peers: same model and prompt, greedy.

    make bench

Each contender runs in a process of its own, in alternation, once a round, on a CPU in bf16 and in
fp32. Tokens per second are those after the first, of all prompts together.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import (
    PRECISIONS,
    Figures,
    alternate,
    bandwidth,
    best_ratios,
    call,
    chosen,
    median,
    precision_of,
    ratios,
    save,
    table,
)

from lit_llama import LLaMAConfig, UserError, load_model
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.generation import Sampling, stream
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import default_device, peak_memory_bytes
from lit_llama.storage.model_folder import empty_model

# prompts (rows, seq) and the number of tokens to add to each -> the time of each step
Decode = Callable[[torch.Tensor, int], list[float]]


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    rounds: int = 3,
    new_tokens: int = 100,
    contenders: tuple[str, ...] = (),
    worker: str = "",
) -> None:
    """Measure decoding from a prompt of 100 tokens, and that of transformers and litgpt.

    Args:
        checkpoint_dir: Model folder.
        rounds: Runs of each contender.
        new_tokens: Number of tokens to decode.
        contenders: Names of those to run, as a list; default: all that are installed.
        worker: Run this contender once; the script calls itself with it.
    """
    if worker:
        print(json.dumps(measure(worker, checkpoint_dir, new_tokens)))
        return
    names = chosen(contenders, known_contenders())
    flags = ["--checkpoint_dir", checkpoint_dir, "--new_tokens", new_tokens]

    def call_worker(name: str) -> str:
        return call("benchmarks/generate.py", "--worker", name, *flags)

    figures = alternate(names, rounds, call_worker)
    # only now: the peak memory of a worker is at least that of the process that starts it
    speed_limit = bandwidth()
    parameters = sum(p.numel() for p in empty_model(checkpoint_dir, torch.bfloat16).parameters())
    rows = []
    for name in figures:
        speed = median(figures, name, "tokens_per_second")
        memory = f"{median(figures, name, 'peak_memory_bytes') / 1e9:.2f} GB"
        first = f"{median(figures, name, 'first_token_seconds') * 1000:.0f} ms"
        share = ""
        if "int" not in name and "prompts" not in name:
            size = parameters * PRECISIONS[precision_of(name)].itemsize
            share = f"{speed * size / speed_limit:.0%}"
        rows.append([name, f"{speed:.1f}", share, first, memory])
    notes = comparisons(figures)
    measured = f"memory bandwidth: {speed_limit / 1e9:.0f} GB/s measured"
    notes.append(f"{measured}; the share is of bandwidth / bytes of the weights")
    header = ["contender", "tokens/s", "of the bandwidth limit", "first token", "peak memory"]
    setting = f"{checkpoint_dir.name}, {new_tokens} tokens greedily from a prompt of 100, "
    setting += f"{rounds} rounds."
    save("generate", "Decoding beside peers", setting, table(header, rows), notes, figures)


def known_contenders() -> dict[str, str]:
    """Return the contenders of this kind of device, and the package that each needs."""
    other = "compiled" if default_device().type == "cpu" else "fp32"
    return {name: package for name, (package, _) in CONTENDERS.items() if other not in name}


def comparisons(figures: Figures) -> list[str]:
    """Compare the speed with peers, in the best precisions, and with that of our other ways."""
    pairs = [(f"lit-llama{kind}", "transformers") for kind in ("", " int8", " int4")]
    notes = best_ratios(figures, [*pairs, ("lit-llama", "litgpt")])
    pairs = [("lit-llama int8", OURS), ("lit-llama int8 fp32", "lit-llama fp32")]
    return notes + ratios(figures, "tokens_per_second", [*pairs, (EIGHT, OURS), (OURS, LONG)])


def measure(name: str, checkpoint_dir: Path, new_tokens: int) -> dict[str, float]:
    """Decode twice, the first time to warm up."""
    rows = 8 if name == EIGHT else 1
    length = next((size for size in (1900, 1000) if f"{size} tokens" in name), 100)
    vocab_size = LLaMAConfig.from_checkpoint(checkpoint_dir).vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocab_size, (rows, length), generator=generator)
    decode = CONTENDERS[name][1](checkpoint_dir)
    decode(prompts, new_tokens if "compiled" in name else 8)
    started = time.perf_counter()
    times = decode(prompts, new_tokens)
    speed = rows * (len(times) - 1) / (times[-1] - times[0])
    figures = {"tokens_per_second": speed, "first_token_seconds": times[0] - started}
    return figures | {"peak_memory_bytes": peak_memory_bytes(default_device())}


def ours(
    quantize: str | None = None, dtype: torch.dtype = torch.bfloat16, compile: bool = False
) -> Callable[[Path], Decode]:
    """Decode with this project, as generate/base.py does."""

    def load(checkpoint_dir: Path) -> Decode:
        device = default_device()
        model = load_model(checkpoint_dir, torch.device("cpu") if quantize else device, dtype)
        optimize_for_inference(model, device, quantize, compile=compile)

        def decode(prompts: torch.Tensor, new: int) -> list[float]:
            tokens = stream(model, list(prompts), Sampling(new, temperature=0.0))
            return [time.perf_counter() for _ in tokens]

        return decode

    return load


def transformers(dtype: torch.dtype) -> Callable[[Path], Decode]:
    """Decode with Hugging Face's `generate`."""

    def load(checkpoint_dir: Path) -> Decode:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=dtype)
        return transformers_decode(model.to(default_device()))

    return load


def transformers_decode(model: torch.nn.Module) -> Decode:
    from transformers.generation.streamers import BaseStreamer

    class Times(list, BaseStreamer):
        def put(self, value: torch.Tensor) -> None:  # the prompt, then each token
            self.append(time.perf_counter())

        def end(self) -> None:
            pass

    def decode(prompts: torch.Tensor, new: int) -> list[float]:
        ids, times = prompts.to(model.device), Times()
        options = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, do_sample=False)
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=times, **options)
        return times[1:]

    return decode


def litgpt(dtype: torch.dtype) -> Callable[[Path], Decode]:
    """Decode with LitGPT's `generate_fn`, with random weights of the same shape."""

    def load(checkpoint_dir: Path) -> Decode:
        from litgpt.config import configs
        from litgpt.model import GPT, Config

        known = {config["hf_config"]["name"]: config["name"] for config in configs}
        name = checkpoint_dir.name
        if name not in known:
            raise UserError(f"{checkpoint_dir}: litgpt has no configuration called {name}")
        model = GPT(Config.from_name(known[name])).to(default_device(), dtype)
        return litgpt_decode(model.eval())

    return load


def litgpt_decode(model: torch.nn.Module) -> Decode:
    from litgpt.generate.base import generate_fn

    def decode(prompts: torch.Tensor, new: int) -> list[float]:
        weight = model.lm_head.weight
        (ids,) = prompts.to(weight.device)
        with torch.inference_mode():
            model.max_seq_length = len(ids) + new
            model.set_kv_cache(batch_size=1, device=ids.device, dtype=weight.dtype)
            options = dict(temperature=0.0, include_prompt=False, include_eos=False)
            tokens = generate_fn(model, ids, max_returned_tokens=len(ids) + new, **options)
            times = [time.perf_counter() for _ in tokens]
            model.clear_kv_cache()
        return times

    return decode


OURS = "lit-llama bf16"
EIGHT, LONG = f"{OURS}, 8 prompts", f"{OURS}, prompt of 1900 tokens"
BF16, FP32 = PRECISIONS.values()
# name: the package that it needs, and what loads it. The compiled ones run on a GPU only, those in
# fp32 on a CPU only
CONTENDERS: dict[str, tuple[str, Callable[[Path], Decode]]] = {
    "transformers bf16": ("transformers", transformers(BF16)),
    "transformers fp32": ("transformers", transformers(FP32)),
    "litgpt bf16": ("litgpt", litgpt(BF16)),
    "litgpt fp32": ("litgpt", litgpt(FP32)),
    OURS: ("lit_llama", ours()),
    "lit-llama fp32": ("lit_llama", ours(dtype=FP32)),
    "lit-llama int8": ("lit_llama", ours("int8")),
    "lit-llama int8 fp32": ("lit_llama", ours("int8", FP32)),
    "lit-llama int4": ("lit_llama", ours("int4")),
    EIGHT: ("lit_llama", ours()),
    LONG: ("lit_llama", ours()),
    "lit-llama bf16, prompt of 1000 tokens": ("lit_llama", ours()),
    "lit-llama bf16 compiled": ("lit_llama", ours(compile=True)),
    "lit-llama int8 compiled": ("lit_llama", ours("int8", compile=True)),
    "lit-llama int4 compiled": ("lit_llama", ours("int4", compile=True)),
}

if __name__ == "__main__":
    run(main)
