"""Finetuning speed and memory of this project and its peers: same model, samples and steps.

    make bench

Each contender runs in a process of its own, in alternation, once a round, so that a noisy machine
affects all of them alike; the table shows medians and ratios. On a CPU each runs in bf16 and in
fp32, as some have no fast bf16, and the best of one is compared with the best of another. Peers
that are not installed are left out, with a line that says so.
"""

import importlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import common
import torch
from lightning.fabric import Fabric

from lit_llama import UserError
from lit_llama.data import TokenizedDataset
from lit_llama.fast import optimize_for_training
from lit_llama.fast.quantization import FOR_TRAINING
from lit_llama.runtime.args import TrainArgs
from lit_llama.runtime.cli import run
from lit_llama.runtime.devices import setup_fabric, setup_model
from lit_llama.runtime.hardware import (
    PRECISION_NAMES,
    default_device,
    faster_kernels,
    peak_memory_bytes,
    time_linears,
)
from lit_llama.storage.datasets import load_dataset
from lit_llama.storage.methods import METHODS, FullConfig
from lit_llama.storage.model_folder import empty_model
from lit_llama.training import make_optimizer, train_step

IGNORED = -100
SEED = 1337
Step = Callable[[int, list[int]], object]  # takes its number, and the samples
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # what `padded` returns
BatchStep = Callable[[Batch], torch.Tensor]


class Job(NamedTuple):
    """What a contender needs."""

    fabric: Fabric
    train_set: TokenizedDataset
    checkpoint_dir: Path
    quantize: str | None
    dtype: torch.dtype  # of the weights


def main(
    checkpoint_dir: Path = Path("checkpoints/SmolLM2-135M-Instruct"),
    source: Path = common.ROOT / "scripts/quickstart_records.json",
    rounds: int = 3,
    steps: int = 12,
    max_seq_length: int = 256,
    contenders: tuple[str, ...] = (),
    batch_size: int = 4,
    result: str = "finetune",
    worker: str = "",
    data_dir: Path | None = None,
) -> None:
    """Measure finetuning in bf16, on a CPU also in fp32, and that of peft and litgpt.

    Args:
        checkpoint_dir: Model folder.
        source: JSON records of instruction, input and output.
        rounds: Runs of each contender.
        steps: Optimizer steps in a round; the first three are not counted.
        max_seq_length: Longest sample in tokens.
        contenders: Name of one to run, repeat the flag for more; default: all that are installed.
        batch_size: Samples per micro-batch, which is an optimizer step here.
        result: Name of the file in benchmarks/results.
        worker: Run this contender once; the script calls itself with it.
        data_dir: Tokenized dataset of a worker.
    """
    if worker:
        print(json.dumps(measure(worker, checkpoint_dir, data_dir, steps, batch_size)))
        return
    names = common.chosen(contenders, known_contenders())
    with worker_calls(checkpoint_dir, source, steps, max_seq_length, batch_size) as call_worker:
        figures = common.alternate(names, rounds, call_worker)
    # only now: the peak memory of a worker is at least that of the process that starts it
    precisions = ("bf16", "fp32") if default_device().type == "cpu" else ("bf16",)
    limits = {kind: common.matmul_flops(common.PRECISIONS[kind]) for kind in precisions}
    parameters = sum(p.numel() for p in empty_model(checkpoint_dir, torch.bfloat16).parameters())
    rows = []
    for name in figures:
        speed = common.median(figures, name, "tokens_per_second")
        memory = common.median(figures, name, "peak_memory_bytes")
        flops = (6 if "full" in name else 4) * parameters  # per token
        share = flops * speed / limits[common.precision_of(name)]
        rows.append([name, f"{speed:,.0f}", f"{share:.0%}", f"{memory / 1e9:.2f} GB"])
    setting = f"{checkpoint_dir.name}, {batch_size} samples a step cut at {max_seq_length} tokens, "
    setting += f"{steps - 3} steps counted in each of {rounds} rounds; padding is not counted."
    header = ["contender", "real tokens/s", "of the matmul limit", "peak memory"]
    table, notes = common.table(header, rows), comparisons(figures)
    measured = ", ".join(f"{limit / 1e9:,.0f} GFLOP/s in {kind}" for kind, limit in limits.items())
    notes.append(f"matmul limit: {measured}, measured; 4 FLOPs per parameter and token, full: 6")
    common.save(result, "Finetuning beside peers", setting, table, notes, figures)


def known_contenders() -> dict[str, str]:
    """Return the contenders that this device can run, and the package that each needs."""
    # no CPU computes in fp8; the GPUs that this project is for have fast bf16
    other = "fp8" if default_device().type == "cpu" else "fp32"
    return {name: package for name, (package, _) in CONTENDERS.items() if other not in name}


@contextmanager
def worker_calls(
    checkpoint_dir: Path, source: Path, steps: int, max_seq_length: int = 256, batch_size: int = 4
) -> Iterator[Callable[[str], str]]:
    """Tokenize the data. Yields a function that runs a contender once, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = ["--checkpoint_dir", checkpoint_dir, "--data_dir", f"{folder}/data"]
        samples = ["--source", source, "--val_size", 0, "--max_seq_length", max_seq_length]
        common.call("scripts/prepare_json.py", *model, *samples)
        flags = [*model, "--steps", steps, "--batch_size", batch_size]
        yield lambda name: common.call("benchmarks/finetune.py", "--worker", name, *flags)


def comparisons(figures: common.Figures) -> list[str]:
    """Compare the speed of the best precisions, and the memory of the same ones."""
    pairs = []
    for method in ("LoRA", "adapter", "full"):
        pairs += [(f"lit-llama {method}", f"{peer} {method}") for peer in ("peft", "litgpt")]
    quantized = [(f"lit-llama LoRA, {kind}", "lit-llama LoRA, bf16") for kind in FOR_TRAINING]
    notes = common.best_ratios(figures, pairs)
    notes += common.ratios(figures, "tokens_per_second", quantized)
    same = [(f"{a}, {kind}", f"{b}, {kind}") for a, b in pairs for kind in common.PRECISIONS]
    return notes + common.ratios(figures, "peak_memory_bytes", same + quantized)


def measure(
    name: str, checkpoint_dir: Path, data_dir: Path, steps: int, batch_size: int
) -> dict[str, float]:
    """Return tokens per second after the first three steps, and the process's peak memory."""
    quantize = next((kind for kind in FOR_TRAINING if kind in name), None)
    train_set = load_dataset(data_dir, checkpoint_dir).train
    precision = common.precision_of(name)
    flag = "32-true" if precision == "fp32" else "bf16-mixed"
    fabric = setup_fabric(devices=1, num_nodes=1, precision=flag)
    torch.manual_seed(SEED)
    order = random.Random(0).sample(range(len(train_set)), steps * batch_size)
    batches = [order[n : n + batch_size] for n in range(0, len(order), batch_size)]
    job = Job(fabric, train_set, checkpoint_dir, quantize, common.PRECISIONS[precision])
    step = CONTENDERS[name][1](job)
    tokens = 0
    for number, ids in enumerate(batches):
        if number == 3:
            common.synchronize()
            started = time.perf_counter()
        step(number, ids)
        tokens += sum(train_set.lengths[index] for index in ids) if number >= 3 else 0
    common.synchronize()
    seconds = time.perf_counter() - started
    memory = peak_memory_bytes(fabric.device)
    return {"tokens_per_second": tokens / seconds, "peak_memory_bytes": memory}


def ours(method: str) -> Callable[[Job], Step]:
    """Train with this project, by the step that users run."""

    def start(job: Job) -> Step:
        # in bf16 with bf16 weights, as the peers have
        full = FullConfig(PRECISION_NAMES[job.dtype])
        model = empty_model(job.checkpoint_dir, job.dtype)
        METHODS[method].apply(model, full if method == "full" else METHODS[method].config())
        kernels = None
        if job.fabric.device.type == "cpu":  # as finetune/*.py chooses them
            seconds = time_linears(model.config, tokens=256, train=True)
            kernels = faster_kernels(seconds, job.dtype, job.checkpoint_dir, method == "full")
        optimize_for_training(model, job.fabric.device, kernels=kernels)
        model = setup_model(job.fabric, model, job.checkpoint_dir, job.quantize)
        # the peers below do not scale gradients either
        args = TrainArgs(micro_batch_tokens=10**6, max_grad_norm=0)
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        optimizer = job.fabric.setup_optimizers(make_optimizer(trained, args, methods={}))

        def step(number: int, ids: list[int]) -> None:
            model.train()
            train_step(job.fabric, model, optimizer, job.train_set, ids, args, SEED, number)

        return step

    return start


def padded(data: TokenizedDataset, ids: list[int], device: torch.device) -> Batch:
    """Return samples as a padded batch: input_ids, attention_mask and labels, (batch, seq)."""
    longest = max(data.lengths[index] for index in ids)
    tokens, labels = torch.zeros(2, len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    labels.fill_(IGNORED)
    for row, index in enumerate(ids):
        ids, is_label = data.sample(index)
        tokens[row, : len(ids)] = ids
        labels[row, : len(ids)][is_label] = ids[is_label].long()
        mask[row, : len(ids)] = 1
    return tokens.to(device), mask.to(device), labels.to(device)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=3e-4, fused=True)


def peft_lora(job: Job) -> Step:
    """Train with Hugging Face peft: padded batches, an fp32 LoRA, autocast if weights are bf16."""
    from transformers import AutoModelForCausalLM

    device = job.fabric.device
    base = AutoModelForCausalLM.from_pretrained(job.checkpoint_dir, dtype=job.dtype).to(device)
    train = peft_step(base, device, job.dtype)
    return lambda number, ids: train(padded(job.train_set, ids, device))


def peft_step(
    base: torch.nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> BatchStep:
    """Return a function that trains a LoRA of peft on a padded batch, and returns its loss."""
    from peft import LoraConfig, get_peft_model

    base.config.use_cache = False  # as transformers' trainer sets it
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config).train()
    optimizer = adamw(model)

    def step(batch: Batch) -> torch.Tensor:
        tokens, mask, labels = batch
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def litgpt(method: str) -> Callable[[Job], Step]:
    """Train with LitGPT as its scripts do with bf16-true or 32-true, from random weights."""

    def start(job: Job) -> Step:
        modules = {"lora": "litgpt.lora", "adapter": "litgpt.adapter", "full": "litgpt.model"}
        module = importlib.import_module(modules[method])
        from litgpt.config import configs

        known = {config["hf_config"]["name"]: config["name"] for config in configs}
        model_name = job.checkpoint_dir.name
        if model_name not in known:
            problem = f"litgpt has no configuration called {model_name}"
            raise UserError(f"{job.checkpoint_dir}: {problem}")
        options = {}
        if method == "lora":
            options = dict(lora_r=8, lora_alpha=16, lora_dropout=0.05)
            options |= dict(lora_query=True, lora_value=True)
        before = torch.get_default_dtype()
        torch.set_default_dtype(job.dtype)
        try:
            model = module.GPT(module.Config.from_name(known[model_name], **options))
            model = model.to(job.fabric.device)
        finally:
            torch.set_default_dtype(before)
        if method == "lora":
            module.mark_only_lora_as_trainable(model)
        elif method == "adapter":
            module.mark_only_adapter_as_trainable(model)
        train, device = litgpt_step(model), job.fabric.device
        return lambda number, ids: train(padded(job.train_set, ids, device))

    return start


def litgpt_step(model: torch.nn.Module) -> BatchStep:
    """Return a function that trains a model of LitGPT on a padded batch, and returns its loss."""
    from litgpt.utils import chunked_cross_entropy

    model.train()
    optimizer = adamw(model)

    def step(batch: Batch) -> torch.Tensor:
        tokens, _, labels = batch
        # else the second step's backward pass would enter the first one's graph
        for block in model.transformer.h:
            if hasattr(block.attn, "adapter_kv_cache"):
                block.attn.adapter_kv_cache = None
        logits = model(tokens, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, labels[..., 1:], ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# name: the package that it needs, and a function that returns its step
TRAINERS: dict[str, tuple[str, Callable[[Job], Step]]] = {
    "lit-llama LoRA": ("lit_llama", ours("LORA")),
    "peft LoRA": ("peft", peft_lora),
    "litgpt LoRA": ("litgpt", litgpt("lora")),
    "lit-llama adapter": ("lit_llama", ours("llama_adapter")),
    "litgpt adapter": ("litgpt", litgpt("adapter")),
    "lit-llama full": ("lit_llama", ours("full")),
    "litgpt full": ("litgpt", litgpt("full")),
}
CONTENDERS: dict[str, tuple[str, Callable[[Job], Step]]] = {
    f"{name}, {kind}": trainer
    for name, trainer in TRAINERS.items()
    for kind in (*common.PRECISIONS, *(FOR_TRAINING if name == "lit-llama LoRA" else ()))
}


if __name__ == "__main__":
    run(main)
