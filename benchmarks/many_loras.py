"""What 1, 8 or 32 LoRAs on one base cost, in memory and in use by one batch.

`make bench` runs it.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from common import alternate, call, median, ratios, save, synchronize, table

from lit_llama import load_model
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.generation import Sampling, stream
from lit_llama.lora import LoRAConfig, apply_lora, load_lora, merge_lora, save_lora
from lit_llama.multi_lora import enable_multi_lora, load_adapter, set_adapters
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import default_device, peak_memory_bytes

CONTENDERS = {  # name -> LoRAs in memory, those in use, rows of the batch
    "no LoRA": (0, 0, 8),
    "1 LoRA, merged": (1, 0, 8),
    "1 LoRA for 8 rows": (1, 1, 8),
    "8 LoRAs for 8 rows": (8, 8, 8),
    "32 LoRAs, 8 of them for 8 rows": (32, 8, 8),
    "1 LoRA for 32 rows": (1, 1, 32),
    "32 LoRAs for 32 rows": (32, 32, 32),
}
PROMPT_TOKENS, NEW_TOKENS = 100, 50


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    rounds: int = 3,
    worker: str = "",
    lora_dir: Path | None = None,
) -> None:
    """Measure decoding in bf16 with LoRAs of rank 8 on all linear layers.

    Args:
        checkpoint_dir: Model folder.
        rounds: Runs of each contender.
        worker: Run this contender once; the script calls itself with it.
        lora_dir: Folder of a worker's LoRAs.
    """
    if worker:
        print(json.dumps(measure(worker, checkpoint_dir, lora_dir)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, config = load_model(checkpoint_dir), LoRAConfig(targets=("all-linear",))
        apply_lora(model, config)
        trained = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        for number in range(max(held for held, _, _ in CONTENDERS.values())):
            tensors = {name: torch.randn_like(p) * 0.01 for name, p in trained.items()}
            save_lora(tensors, f"{folder}/{number}", config, str(checkpoint_dir))
        del model, trained
        flags = ["--checkpoint_dir", checkpoint_dir, "--lora_dir", folder]

        def call_worker(name: str) -> str:
            return call("benchmarks/many_loras.py", "--worker", name, *flags)

        figures = alternate(CONTENDERS, rounds, call_worker)
    rows = []
    for name in figures:
        speed = f"{median(figures, name, 'tokens_per_second'):.1f}"
        first = f"{median(figures, name, 'first_token') * 1e3:.0f} ms"
        memory = f"{median(figures, name, 'peak_memory_bytes') / 1e9:.2f} GB"
        added = ""
        if "LoRA for" in name or "LoRAs" in name:
            added = f"{median(figures, name, 'adding') * 1e3:.0f} ms"
        rows.append([name, speed, first, memory, added])
    pairs = [
        ("8 LoRAs for 8 rows", "1 LoRA for 8 rows"),
        ("32 LoRAs, 8 of them for 8 rows", "1 LoRA for 8 rows"),
        ("32 LoRAs for 32 rows", "1 LoRA for 32 rows"),
        ("1 LoRA for 8 rows", "1 LoRA, merged"),
    ]
    notes = ratios(figures, "seconds", pairs) + ratios(figures, "peak_memory_bytes", pairs[:3])
    setting = f"{checkpoint_dir.name} in bf16, LoRAs of rank 8 on all linear layers, "
    setting += f"{NEW_TOKENS} tokens greedily from a prompt of {PROMPT_TOKENS} in each row, "
    setting += f"{rounds} rounds; seconds are those of the whole answer."
    header = ["contender", "tokens/s", "first tokens", "peak memory", "adding one"]
    save("many_loras", "Many LoRAs on one base", setting, table(header, rows), notes, figures)


def measure(name: str, checkpoint_dir: Path, lora_dir: Path) -> dict[str, float]:
    (held, used, rows), device = CONTENDERS[name], default_device()
    model, adding = load_model(checkpoint_dir, device), 0.0
    if held and not used:
        load_lora(model, lora_dir / "0")
        merge_lora(model)
    elif held:
        enable_multi_lora(model)
        started = time.perf_counter()
        for number in range(held):
            load_adapter(model, str(number), lora_dir / str(number))
        adding = (time.perf_counter() - started) / held
    optimize_for_inference(model, device)
    if used:
        set_adapters(model, [str(row % used) for row in range(rows)])
    prompts = list(torch.randint(100, model.config.vocab_size, (rows, PROMPT_TOKENS)))
    for _ in stream(model, prompts, Sampling(3, temperature=0)):  # makes kernels, reads pages
        pass
    synchronize()
    started, times = time.perf_counter(), []
    for _ in stream(model, prompts, Sampling(NEW_TOKENS, temperature=0)):
        times.append(time.perf_counter() - started)
    return {
        "tokens_per_second": rows * (NEW_TOKENS - 1) / (times[-1] - times[0]),
        "first_token": times[0],
        "seconds": times[-1],
        "peak_memory_bytes": peak_memory_bytes(device),
        "adding": adding,
    }


if __name__ == "__main__":
    run(main)
