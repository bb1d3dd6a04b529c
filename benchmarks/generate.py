"""Decoding speed and memory of this project and its peers: same model and prompt, greedy.

    make bench

Each contender runs in a process of its own, in alternation, once a round. Tokens per second are
those after the first, of all prompts together.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import alternate, bandwidth, call, chosen, median, ratios, save, table

from lit_llama import LLaMAConfig, UserError, load_model
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.generation import Sampling, stream
from lit_llama.runtime.cli import run
from lit_llama.runtime.devices import default_device, peak_memory_bytes
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
    """Measure decoding in bf16 from a prompt of 100 tokens, and that of transformers and litgpt.

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
    known = {name: package for name, (package, _) in CONTENDERS.items()}
    if default_device().type == "cpu":
        known = {name: package for name, package in known.items() if "compiled" not in name}
    names, speed_limit = chosen(contenders, known), bandwidth()
    flags = ["--checkpoint_dir", checkpoint_dir, "--new_tokens", new_tokens]

    def call_worker(name: str) -> str:
        return call("benchmarks/generate.py", "--worker", name, *flags)

    figures = alternate(names, rounds, call_worker)
    size = sum(p.numel() for p in empty_model(checkpoint_dir, torch.bfloat16).parameters()) * 2
    rows = []
    for name in figures:
        speed = median(figures, name, "tokens_per_second")
        memory = f"{median(figures, name, 'peak_memory_bytes') / 1e9:.2f} GB"
        first = f"{median(figures, name, 'first_token_seconds') * 1000:.0f} ms"
        share = ""
        if "bf16" in name and "prompts" not in name:
            share = f"{speed * size / speed_limit:.0%}"
        rows.append([name, f"{speed:.1f}", share, first, memory])
    ours, theirs = "lit-llama bf16", "transformers bf16"
    pairs = [(f"lit-llama {kind}", theirs) for kind in ("bf16", "int8", "int4")]
    pairs += [(ours, "litgpt bf16"), (EIGHT, ours), (ours, LONG)]
    notes = ratios(figures, "tokens_per_second", pairs)
    measured = f"memory bandwidth: {speed_limit / 1e9:.0f} GB/s measured"
    notes.append(f"{measured}; the share is of bandwidth / bytes of bf16 weights")
    header = ["contender", "tokens/s", "of the bandwidth limit", "first token", "peak memory"]
    setting = f"{checkpoint_dir.name}, {new_tokens} tokens greedily from a prompt of 100, "
    setting += f"{rounds} rounds."
    save("generate", "Decoding beside peers", setting, table(header, rows), notes, figures)


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


def ours(quantize: str | None = None, compile: bool = False) -> Callable[[Path], Decode]:
    """Decode with this project, as generate/base.py does."""

    def load(checkpoint_dir: Path) -> Decode:
        device = default_device()
        model = load_model(checkpoint_dir, torch.device("cpu") if quantize else device)
        optimize_for_inference(model, device, quantize, compile=compile)

        def decode(prompts: torch.Tensor, new: int) -> list[float]:
            tokens = stream(model, list(prompts), Sampling(new, temperature=0.0))
            return [time.perf_counter() for _ in tokens]

        return decode

    return load


def transformers(checkpoint_dir: Path) -> Decode:
    """Decode with Hugging Face's `generate`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.bfloat16)
    return transformers_decode(model.to(default_device()))


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


def litgpt(checkpoint_dir: Path) -> Decode:
    """Decode with LitGPT's `generate_fn` in bf16, with random weights of the same shape."""
    from litgpt.config import configs
    from litgpt.model import GPT, Config

    known = {config["hf_config"]["name"]: config["name"] for config in configs}
    name = checkpoint_dir.name
    if name not in known:
        raise UserError(f"{checkpoint_dir}: litgpt has no configuration called {name}")
    model = GPT(Config.from_name(known[name])).to(default_device(), torch.bfloat16)
    return litgpt_decode(model.eval())


def litgpt_decode(model: torch.nn.Module) -> Decode:
    from litgpt.generate.base import generate_fn

    def decode(prompts: torch.Tensor, new: int) -> list[float]:
        (ids,) = prompts.to(model.lm_head.weight.device)
        with torch.inference_mode():
            model.max_seq_length = len(ids) + new
            model.set_kv_cache(batch_size=1, device=ids.device, dtype=torch.bfloat16)
            options = dict(temperature=0.0, include_prompt=False, include_eos=False)
            tokens = generate_fn(model, ids, max_returned_tokens=len(ids) + new, **options)
            times = [time.perf_counter() for _ in tokens]
            model.clear_kv_cache()
        return times

    return decode


EIGHT, LONG = "lit-llama bf16, 8 prompts", "lit-llama bf16, prompt of 1900 tokens"
# name: the package that it needs, and what loads it. The compiled ones run on a GPU only
CONTENDERS: dict[str, tuple[str, Callable[[Path], Decode]]] = {
    "transformers bf16": ("transformers", transformers),
    "litgpt bf16": ("litgpt", litgpt),
    "lit-llama bf16": ("lit_llama", ours()),
    "lit-llama int8": ("lit_llama", ours("int8")),
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
