"""How long a model takes from its folder to its first logits, also in transformers.

`make bench` runs it.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from common import alternate, call, chosen, median, ratios, save, synchronize, table

from lit_llama import load_model
from lit_llama.lora import LoRAConfig, apply_lora, load_lora, merge_lora, save_lora
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import default_device, peak_memory_bytes

CONTENDERS = {
    "lit-llama": "lit_llama",
    "transformers": "transformers",
    "lit-llama, a LoRA merged": "lit_llama",
    "transformers, a LoRA merged": "peft",
}


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    rounds: int = 3,
    worker: str = "",
    lora_path: Path | None = None,
) -> None:
    """Measure loading in bf16, with and without a LoRA on all linear layers that is merged.

    Args:
        checkpoint_dir: Model folder.
        rounds: Runs of each contender.
        worker: Run this contender once; the script calls itself with it.
        lora_path: LoRA of a worker.
    """
    if worker:
        print(json.dumps(measure(worker, checkpoint_dir, lora_path)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, config = load_model(checkpoint_dir), LoRAConfig(targets=("all-linear",))
        apply_lora(model, config)
        save_lora(dict(model.named_parameters()), folder, config, str(checkpoint_dir))
        del model
        flags = ["--checkpoint_dir", checkpoint_dir, "--lora_path", folder]

        def call_worker(name: str) -> str:
            return call("benchmarks/load.py", "--worker", name, *flags)

        figures = alternate(chosen((), CONTENDERS), rounds, call_worker)
    rows = []
    for name in figures:
        seconds = median(figures, name, "seconds")
        memory = median(figures, name, "peak_memory_bytes")
        rows.append([name, f"{seconds:.2f} s", f"{memory / 1e9:.2f} GB"])
    pairs = [(f"lit-llama{kind}", f"transformers{kind}") for kind in ("", ", a LoRA merged")]
    notes = ratios(figures, "seconds", pairs) + ratios(figures, "peak_memory_bytes", pairs)
    setting = f"{checkpoint_dir.name} in bf16, to the logits of one token; "
    setting += "files were in the page cache, imports done."
    header = ["contender", "seconds", "peak memory"]
    save("load", "Loading", setting, table(header, rows), notes, figures)


def measure(name: str, checkpoint_dir: Path, lora_path: Path) -> dict[str, float]:
    device, token = default_device(), torch.tensor([[100]], device=default_device())
    if name.startswith("transformers"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        if name.startswith("lit-llama"):
            model = load_model(checkpoint_dir, device)
            if "LoRA" in name:
                load_lora(model, lora_path)
                merge_lora(model)
        else:
            model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.bfloat16)
            model = model.to(device)
            if "LoRA" in name:
                model = PeftModel.from_pretrained(model, lora_path).merge_and_unload()
        model(token)
    synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(device)}


if __name__ == "__main__":
    run(main)
