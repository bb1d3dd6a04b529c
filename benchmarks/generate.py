"""Decoding speed and memory of this project beside its peers: the same model and prompt, greedy, in alternation.

    make bench

Each contender runs in a process of its own, once a round. Tokens a second are those after the first, of all prompts
together.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import alternate, bandwidth, call, chosen, median, ratios, save, table

from lit_llama import LLaMAConfig, UserError, load_model
from lit_llama.checkpoint import empty_model
from lit_llama.cli import run
from lit_llama.decoding import prepare
from lit_llama.distributed import peak_memory_bytes
from lit_llama.generation import Sampling, default_device, stream


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    rounds: int = 3,
    new_tokens: int = 100,
    contenders: tuple[str, ...] = (),
    worker: str = "",
) -> None:
    """Measure decoding beside transformers and litgpt, bf16, from a prompt of 100 tokens unless the name says another.

    Args:
        checkpoint_dir: the model folder.
        rounds: how often each contender runs.
        new_tokens: how many tokens are decoded.
        contenders: names of those to run, as a list; default: all that are installed.
        worker: run this contender once; what the script calls itself with.
    """
    if worker:
        print(json.dumps(measure(worker, checkpoint_dir, new_tokens)))
        return
    known = {name: package for name, (package, _) in CONTENDERS.items()}
    if default_device().type == "cpu":
        known = {name: package for name, package in known.items() if "compiled" not in name}
    names, speed_limit = chosen(contenders, known), bandwidth()
    flags = ["--checkpoint_dir", checkpoint_dir, "--new_tokens", new_tokens]
    figures = alternate(names, rounds, lambda name: call("benchmarks/generate.py", "--worker", name, *flags))
    size = sum(p.numel() for p in empty_model(checkpoint_dir, torch.bfloat16).parameters()) * 2
    rows = []
    for name in figures:
        speed, memory = median(figures, name, "tokens_per_second"), median(figures, name, "peak_memory_bytes")
        first, share = median(figures, name, "first_token_seconds"), f"{speed * size / speed_limit:.0%}"
        share = share if "bf16" in name and "prompts" not in name else ""
        rows.append([name, f"{speed:.1f}", share, f"{first * 1000:.0f} ms", f"{memory / 1e9:.2f} GB"])
    ours, theirs = "lit-llama bf16", "transformers bf16"
    pairs = [(f"lit-llama {kind}", theirs) for kind in ("bf16", "int8", "int4")]
    notes = [
        *ratios(figures, "tokens_per_second", [*pairs, (ours, "litgpt bf16"), (EIGHT, ours), (ours, LONG)]),
        f"memory bandwidth: {speed_limit / 1e9:.0f} GB/s measured; the share is of bandwidth / bytes of bf16 weights",
    ]
    header = ["contender", "tokens/s", "of the bandwidth limit", "first token", "peak memory"]
    setting = f"{checkpoint_dir.name}, {new_tokens} tokens greedily from a prompt of 100, {rounds} rounds."
    save("generate", "Decoding beside peers", setting, table(header, rows), notes, figures)


def measure(name: str, checkpoint_dir: Path, new_tokens: int) -> dict[str, float]:
    """Decode twice, the first time to warm up."""
    rows = 8 if name == EIGHT else 1
    length = next((size for size in (1900, 1000) if f"{size} tokens" in name), 100)
    vocab_size = LLaMAConfig.from_checkpoint(checkpoint_dir).vocab_size
    prompts = torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    decode = CONTENDERS[name][1](checkpoint_dir)
    decode(prompts, new_tokens if "compiled" in name else 8)
    started = time.perf_counter()
    times = decode(prompts, new_tokens)
    speed, first = rows * (len(times) - 1) / (times[-1] - times[0]), times[0] - started
    device = default_device()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = peak_memory_bytes(device) if device.type == "cuda" else memory
    return {"tokens_per_second": speed, "first_token_seconds": first, "peak_memory_bytes": memory}


Decode = Callable[[torch.Tensor, int], list[float]]
"""Prompts (rows, seq) and how many tokens to add to each -> when each step's had come."""


def ours(quantize: str | None = None, compile: bool = False) -> Callable[[Path], Decode]:
    """This project, as generate/base.py decodes."""

    def load(checkpoint_dir: Path) -> Decode:
        model = load_model(checkpoint_dir, torch.device("cpu") if quantize else default_device())
        prepare(model, default_device(), quantize, compile=compile)

        def decode(prompts: torch.Tensor, new: int) -> list[float]:
            return [time.perf_counter() for _ in stream(model, list(prompts), Sampling(new, 0.0), compile=compile)]

        return decode

    return load


def transformers(checkpoint_dir: Path) -> Decode:
    """Hugging Face's `generate`."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.bfloat16).to(default_device())

    class Times(list, BaseStreamer):
        def put(self, value: torch.Tensor) -> None:  # the prompt, then each token
            self.append(time.perf_counter())

        def end(self) -> None:
            pass

    def decode(prompts: torch.Tensor, new: int) -> list[float]:
        ids, times = prompts.to(default_device()), Times()
        length = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=times, **length)
        return times[1:]

    return decode


def litgpt(checkpoint_dir: Path) -> Decode:
    """LitGPT's `generate_fn`, bf16, random weights of the same shape."""
    from litgpt.config import configs
    from litgpt.generate.base import generate_fn
    from litgpt.model import GPT, Config

    known = {config["hf_config"]["name"]: config["name"] for config in configs}
    if checkpoint_dir.name not in known:
        raise UserError(f"{checkpoint_dir}: litgpt has no configuration called {checkpoint_dir.name}")
    model = GPT(Config.from_name(known[checkpoint_dir.name])).to(default_device(), torch.bfloat16).eval()

    def decode(prompts: torch.Tensor, new: int) -> list[float]:
        (ids,) = prompts.to(default_device())
        with torch.inference_mode():
            model.max_seq_length = len(ids) + new
            model.set_kv_cache(batch_size=1, device=ids.device, dtype=torch.bfloat16)
            tokens = generate_fn(
                model, ids, max_returned_tokens=len(ids) + new, temperature=0.0, include_prompt=False, include_eos=False
            )
            times = [time.perf_counter() for _ in tokens]
            model.clear_kv_cache()
        return times

    return decode


EIGHT, LONG = "lit-llama bf16, 8 prompts", "lit-llama bf16, prompt of 1900 tokens"
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
"""Name: the package that it needs, and what loads it. The compiled ones run on a GPU only."""


if __name__ == "__main__":
    run(main)
