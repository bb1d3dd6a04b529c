"""Finetuning speed and memory of this project beside its peers: the same model, samples and steps, in alternation.

    make bench

Each contender runs in a process of its own, once a round, so that a noisy machine hurts all of them alike; the table
shows medians and ratios. Peers that are not installed are left out, with a line that says so.
"""

import importlib
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, alternate, call, chosen, matmul_flops, median, ratios, save, synchronize, table

from lit_llama import UserError
from lit_llama.adapter import AdapterConfig, apply_adapter
from lit_llama.checkpoint import empty_model
from lit_llama.cli import run
from lit_llama.distributed import peak_memory_bytes
from lit_llama.generation import default_device
from lit_llama.lora import LoRAConfig, apply_lora
from lit_llama.quantize import FOR_TRAINING
from lit_llama.run import Run
from lit_llama.training import TrainArgs, make_optimizer, train_step

IGNORED = -100


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = ROOT / "scripts/quickstart_records.json",
    rounds: int = 3,
    steps: int = 12,
    max_seq_length: int = 256,
    contenders: tuple[str, ...] = (),
    batch_size: int = 4,
    result: str = "finetune",
    worker: str = "",
    data_dir: Path | None = None,
) -> None:
    """Measure finetuning beside peft and litgpt, bf16.

    Args:
        checkpoint_dir: the model folder.
        source: JSON records of instruction, input and output.
        rounds: how often each contender runs.
        steps: optimizer steps in a round; the first three are not counted.
        max_seq_length: longest sample in tokens.
        contenders: names of those to run, as a list; default: all that are installed.
        batch_size: samples a micro-batch, and here an optimizer step.
        result: name of the file in benchmarks/results.
        worker: run this contender once; what the script calls itself with.
        data_dir: the prepared set of a worker.
    """
    if worker:
        print(json.dumps(measure(worker, checkpoint_dir, data_dir, steps, batch_size)))
        return
    known = {name: package for name, (package, _) in CONTENDERS.items()}
    if default_device().type == "cpu":
        known.pop("lit-llama LoRA, fp8")  # no CPU computes in it
    names = chosen(contenders, known)
    with tempfile.TemporaryDirectory() as folder:
        prepare = ["--source", source, "--checkpoint_dir", checkpoint_dir, "--data_dir", f"{folder}/data"]
        call("scripts/prepare_json.py", *prepare, "--val_size", 0, "--max_seq_length", max_seq_length)
        flags = ["--checkpoint_dir", checkpoint_dir, "--data_dir", f"{folder}/data", "--steps", steps]
        flags += ["--batch_size", batch_size]
        limit = matmul_flops()
        figures = alternate(names, rounds, lambda name: call("benchmarks/finetune.py", "--worker", name, *flags))
    parameters = sum(p.numel() for p in empty_model(checkpoint_dir, torch.bfloat16).parameters())
    rows = []
    for name in figures:
        speed, memory = median(figures, name, "tokens_per_second"), median(figures, name, "peak_memory_bytes")
        share = (6 if "full" in name else 4) * parameters * speed / limit  # FLOPs per parameter and token
        rows.append([name, f"{speed:,.0f}", f"{share:.0%}", f"{memory / 1e9:.2f} GB"])
    methods = ("LoRA", "adapter", "full")
    pairs = [(f"lit-llama {method}", f"{peer} {method}") for method in methods for peer in ("peft", "litgpt")]
    pairs += [(f"lit-llama LoRA, {kind}", "lit-llama LoRA") for kind in ("nf4", "fp8")]
    notes = ratios(figures, "tokens_per_second", pairs) + ratios(figures, "peak_memory_bytes", pairs)
    notes.append(
        f"matmul limit: {limit / 1e9:,.0f} GFLOP/s in bf16, measured; 4 FLOPs per parameter and token, full: 6"
    )
    setting = f"{checkpoint_dir.name}, {batch_size} samples a step cut at {max_seq_length} tokens, "
    setting += f"{steps - 3} steps counted in each of {rounds} rounds; padding is not counted."
    header = ["contender", "real tokens/s", "of the matmul limit", "peak memory"]
    save(result, "Finetuning beside peers", setting, table(header, rows), notes, figures)


def measure(name: str, checkpoint_dir: Path, data_dir: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Tokens a second over all steps but the first three, and peak memory, of this process."""
    with tempfile.TemporaryDirectory() as folder:
        quantize = next((kind for kind in FOR_TRAINING if kind in name), None)
        job = Run(Path(folder) / "out", checkpoint_dir, data_dir, quantize=quantize)
        order = random.Random(0).sample(range(len(job.train_set)), steps * batch_size)
        batches = [order[n : n + batch_size] for n in range(0, len(order), batch_size)]
        step = CONTENDERS[name][1](job)
        tokens = 0
        for number, ids in enumerate(batches):
            if number == 3:
                synchronize()
                started = time.perf_counter()
            step(number, ids)
            tokens += sum(job.train_set.lengths[index] for index in ids) if number >= 3 else 0
        synchronize()
        seconds = time.perf_counter() - started
    memory = peak_memory_bytes(job.fabric.device)
    if job.fabric.device.type == "cpu":
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": tokens / seconds, "peak_memory_bytes": memory}


Step = Callable[[int, list[int]], object]


def ours(method: str) -> Callable[[Run], Step]:
    """This project, by the loop that users run."""

    def start(job: Run) -> Step:
        apply = {
            "lora": lambda model: apply_lora(model, LoRAConfig()),
            "adapter": lambda model: apply_adapter(model, AdapterConfig()),
            "full": lambda model: model.requires_grad_(True),
        }[method]
        model = job.build(apply)
        args = TrainArgs(micro_batch_tokens=10**6, max_grad_norm=0)  # the peers below do not scale gradients either
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        optimizer = job.fabric.setup_optimizers(make_optimizer(trained, args, lambda name: 1.0))
        return lambda number, ids: train_step(job, model.train(), trained, optimizer, args, number, ids)

    return start


def padded(job: Run, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The samples as a padded batch: input_ids, attention_mask and labels, each (batch, seq)."""
    data, device = job.train_set, job.fabric.device
    longest = max(data.lengths[index] for index in ids)
    tokens, labels = torch.zeros(2, len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    labels.fill_(IGNORED)
    for row, index in enumerate(ids):
        length, labelled, start = data.lengths[index], data.label_counts[index], sum(data.lengths[:index])
        tokens[row, :length] = data.tokens[start : start + length]
        labels[row, length - labelled : length] = tokens[row, length - labelled : length]
        mask[row, :length] = 1
    return tokens.to(device), mask.to(device), labels.to(device)


def peft_lora(job: Run) -> Step:
    """Hugging Face peft and transformers, bf16 weights and fp32 LoRA under autocast, padded batches."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = job.fabric.device
    base = AutoModelForCausalLM.from_pretrained(job.checkpoint_dir, dtype=torch.bfloat16).to(device)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, fused=True)

    def step(number: int, ids: list[int]) -> None:
        tokens, mask, labels = padded(job, ids)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def litgpt(method: str) -> Callable[[Run], Step]:
    """LitGPT's model and loss as its finetuning scripts call them, bf16-true, random weights of the same shape."""

    def start(job: Run) -> Step:
        module = importlib.import_module(
            {"lora": "litgpt.lora", "adapter": "litgpt.adapter", "full": "litgpt.model"}[method]
        )
        from litgpt.config import configs
        from litgpt.utils import chunked_cross_entropy

        known = {config["hf_config"]["name"]: config["name"] for config in configs}
        name = known.get(job.checkpoint_dir.name)
        if name is None:
            raise UserError(f"{job.checkpoint_dir}: litgpt has no configuration called {job.checkpoint_dir.name}")
        options = {}
        if method == "lora":
            options = dict(lora_r=8, lora_alpha=16, lora_dropout=0.05, lora_query=True, lora_value=True)
        device, before = job.fabric.device, torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = module.GPT(module.Config.from_name(name, **options)).to(device)
        finally:
            torch.set_default_dtype(before)
        if method == "lora":
            module.mark_only_lora_as_trainable(model)
        elif method == "adapter":
            module.mark_only_adapter_as_trainable(model)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, fused=True)

        def step(number: int, ids: list[int]) -> None:
            tokens, _, labels = padded(job, ids)
            for block in model.transformer.h if method == "adapter" else ():
                block.attn.adapter_kv_cache = None  # else its second step goes back through the first one's graph
            logits = model(tokens, lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            chunked_cross_entropy(logits, labels[..., 1:], ignore_index=IGNORED).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return start


CONTENDERS: dict[str, tuple[str, Callable[[Run], Step]]] = {
    "lit-llama LoRA": ("lit_llama", ours("lora")),
    "lit-llama LoRA, nf4": ("lit_llama", ours("lora")),
    "lit-llama LoRA, fp8": ("lit_llama", ours("lora")),
    "peft LoRA": ("peft", peft_lora),
    "litgpt LoRA": ("litgpt", litgpt("lora")),
    "lit-llama adapter": ("lit_llama", ours("adapter")),
    "litgpt adapter": ("litgpt", litgpt("adapter")),
    "lit-llama full": ("lit_llama", ours("full")),
    "litgpt full": ("litgpt", litgpt("full")),
}
"""Name: the package that it needs, and what starts it: a function that takes a step."""


if __name__ == "__main__":
    run(main)
