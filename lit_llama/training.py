"""The training loop, the same for every method: it knows a model with trainable parameters and how to save them."""

import csv
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from lit_llama.checkpoint import load_pickled, new_folder, write_file
from lit_llama.cli import used_flags
from lit_llama.config import LLaMAConfig
from lit_llama.data import MicroBatch, PreparedSet, SampleOrder, check_vocabulary, open_prepared, pack
from lit_llama.distributed import PRECISIONS, make_fabric, peak_memory_bytes
from lit_llama.dropout import token_rows
from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

METRICS = (
    *("step", "samples", "tokens", "loss", "val_loss", "learning_rate", "grad_norm"),
    *("tokens_per_second", "peak_memory_bytes"),
)
STATE_FILE = "state.pt"


@dataclass
class TrainArgs:
    """The recipe and the loop.

    Args:
        batch_size: samples an optimizer step sees, over all devices.
        micro_batch_tokens: tokens on a device at a time; a memory knob that leaves the results as they are.
        epochs: passes over the training set.
        max_steps: stop after that many steps, whatever epochs says.
        learning_rate: at its peak.
        schedule: after the warm-up: cosine (to zero) or constant.
        warmup_steps: the learning rate rises over these; at most half of a short run.
        weight_decay: of AdamW.
        beta1: of AdamW.
        beta2: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        eval_interval: steps between validations; there is one before the first step and after the last as well.
        eval_samples: validate on the first that many samples; default all.
        save_interval: steps between checkpoints to resume from.
        keep_last: how many of these are kept.
        log_interval: steps between lines on a terminal that shows no progress bar.
    """

    batch_size: int = 128
    micro_batch_tokens: int = 2048
    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    eval_interval: int = 200
    eval_samples: int | None = None
    save_interval: int = 200
    keep_last: int = 2
    log_interval: int = 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = (
                0 if name in ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "beta1", "beta2") else 1
            )
            if isinstance(value, (int, float)) and not least <= value < math.inf:
                raise UserError(f"--train.{name} {value}: should be a number from {least} on")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"--train.schedule {self.schedule}: unknown. Known: cosine, constant")


@dataclass
class Run:
    """What a run works with, checked before a model is loaded: see `start_run`."""

    fabric: Fabric
    config: LLaMAConfig
    train_set: PreparedSet
    val_set: PreparedSet
    template: str
    out_dir: Path
    resume: bool
    seed: int
    weight_dtype: torch.dtype


def start_run(
    checkpoint_dir: Path,
    data_dir: Path,
    out_dir: Path,
    devices: int,
    num_nodes: int,
    precision: str,
    seed: int,
    resume: bool,
) -> Run:
    """Check everything that can be checked without the weights, launch the devices and open `out_dir`.

    Raises:
        UserError: something is missing or does not fit together.
    """
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    check_vocabulary(tokenizer, config)
    train_set, val_set, meta = open_prepared(data_dir, tokenizer, config.vocab_size)
    longest = max(train_set.lengths + val_set.lengths)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"{data_dir}: its longest sample has {longest} tokens, the model's context only "
            f"{config.max_position_embeddings}. Prepare it again with --max_seq_length"
        )
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"{out_dir}: is a file. Give another --out_dir")
    if out_dir.exists() and any(out_dir.iterdir()) and not resume:
        raise UserError(f"{out_dir}: holds another run. Go on with it: --resume true; or give another --out_dir")
    if resume and not checkpoints(out_dir):
        raise UserError(f"{out_dir}: no step-* folder there to resume from. Start without --resume")
    fabric = make_fabric(devices, num_nodes, precision)
    torch.manual_seed(seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_file(out_dir / "config.yaml", lambda file: file.write_text(used_flags(), "utf-8"))
    return Run(fabric, config, train_set, val_set, meta["template"], out_dir, resume, seed, PRECISIONS[precision])


def fit(run: Run, model: nn.Module, args: TrainArgs, save: Callable[[Path], None]) -> None:
    """Train what requires gradients, and leave the result, `metrics.csv` and `step-*` folders in `run.out_dir`.

    A step's loss is the sum over all its labels divided by their number, however its samples are cut into
    micro-batches.

    Args:
        model: a LLaMA in which a method has made its parameters trainable (fp32).
        args: the recipe.
        save: writes what was trained into a folder, in the method's format.

    Raises:
        UserError: the loss is not finite, or a checkpoint does not fit the model.
    """
    fabric, train_set = run.fabric, run.train_set
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total_samples = args.epochs * len(train_set)
    if args.max_steps is not None:
        total_samples = min(total_samples, args.max_steps * args.batch_size)
    num_steps = math.ceil(total_samples / args.batch_size)
    order = SampleOrder(len(train_set), args.batch_size, run.seed)
    betas = (args.beta1, args.beta2)
    optimizer = torch.optim.AdamW(
        trained.values(), args.learning_rate, betas, weight_decay=args.weight_decay, fused=True
    )

    first_step = 0
    if run.resume:
        first_step = load_state(checkpoints(run.out_dir)[-1], trained, optimizer)
        if first_step >= num_steps:
            raise UserError(
                f"{run.out_dir}: is at step {first_step}, nothing is left of {num_steps}. Raise --train.epochs"
            )
    metrics = MetricsFile(run.out_dir / "metrics.csv", first_step)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(optimizer)

    count, whole = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    print(
        f"training {count:,} of {whole:,} parameters on {fabric.device}, {num_steps} steps of {args.batch_size} samples"
    )
    if warmup_steps(args, num_steps) < args.warmup_steps:
        print(f"warm-up: {warmup_steps(args, num_steps)} steps, half of this run, not {args.warmup_steps}")
    started = time.perf_counter()
    first_val_loss = val_loss = evaluate(run, model, args)
    if val_loss is not None:
        print(f"step {first_step}: val loss {val_loss:.4f}")
    seconds, tokens_seen = 0.0, 0
    bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
    for step in range(first_step, num_steps):
        step_started = time.perf_counter()
        sample_ids = order.step(step, total_samples)
        micro_batches = pack(sample_ids, train_set.lengths, args.micro_batch_tokens)
        num_labels = sum(train_set.label_counts[index] for index in sample_ids)
        learning_rate = args.learning_rate * schedule(step, num_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        loss = torch.zeros((), device=fabric.device)
        for ids in micro_batches:
            batch = train_set.micro_batch(ids).to(fabric.device)
            with token_rows(run.seed, step, ids, batch.lengths, fabric.device):
                part = loss_sum(model, batch) / num_labels
                fabric.backward(part)
            loss += part.detach()
            del part  # it holds what was kept for the backward pass
        grad_norm = nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm or math.inf)
        if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
            raise UserError(
                f"step {step + 1}: loss {loss.item()} and gradient norm {grad_norm.item()} are not finite; stopped "
                f"before this step changed anything. Lower --train.learning_rate, or look at samples {sample_ids[:8]}"
            )
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(train_set.lengths[index] for index in sample_ids)
        step_seconds = time.perf_counter() - step_started
        seconds, tokens_seen = seconds + step_seconds, tokens_seen + tokens
        done = step + 1
        last = done == num_steps
        val_loss = evaluate(run, model, args) if last or done % args.eval_interval == 0 else None
        values = (done, len(sample_ids), tokens, loss.item(), val_loss, learning_rate, grad_norm.item())
        metrics.add(*values, tokens / step_seconds, peak_memory_bytes(fabric.device))
        line = f"loss {loss.item():.4f}, {tokens_seen / seconds:.0f} tokens/s"
        bar.set_postfix_str(line, refresh=False)
        bar.update()
        if val_loss is not None:
            bar.write(f"step {done}: val loss {val_loss:.4f}")
        if bar.disable and (last or done % args.log_interval == 0 or done == 1):
            left = (num_steps - done) * seconds / (done - first_step)
            print(f"step {done}/{num_steps}: {line}, {left:.0f} s left", flush=True)
        if last or done % args.save_interval == 0:
            save_state(run.out_dir, done, trained, optimizer, args.keep_last)
    bar.close()
    save(run.out_dir)
    change = "" if val_loss is None else f"val loss {first_val_loss:.4f} -> {val_loss:.4f}, "
    print(
        f"done: {change}{time.perf_counter() - started:.1f} s, {tokens_seen / seconds:.0f} tokens/s, "
        f"peak memory {peak_memory_bytes(fabric.device) / 1e9:.2f} GB, result in {run.out_dir}"
    )


def loss_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Cross entropy summed over the labels of a micro-batch."""
    return model(batch.input_ids, lengths=batch.lengths, positions=batch.positions, labels=batch.labels)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, args: TrainArgs) -> float | None:
    """Mean loss over the labels of the validation set, None where there is none."""
    ids = range(len(run.val_set))[: args.eval_samples]
    labels = sum(run.val_set.label_counts[index] for index in ids)
    if not labels:
        return None
    model.eval()
    total = torch.zeros((), device=run.fabric.device)
    batches = pack(ids, run.val_set.lengths, args.micro_batch_tokens)
    for sample_ids in tqdm(batches, desc="validating", leave=False, delay=2, disable=None):
        total += loss_sum(model, run.val_set.micro_batch(sample_ids).to(run.fabric.device))
    model.train()
    return total.item() / labels


def warmup_steps(args: TrainArgs, num_steps: int) -> int:
    """Steps of warm-up that a run of `num_steps` gets."""
    return min(args.warmup_steps, num_steps // 2)


def schedule(step: int, num_steps: int, args: TrainArgs) -> float:
    """Factor on the learning rate at a step (from 0): linear warm-up, then constant or half a cosine to zero."""
    warmup = warmup_steps(args, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
    return cosine if args.schedule == "cosine" else 1.0


def save_state(
    out_dir: Path, step: int, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep_last: int
) -> None:
    """Write `step-000123/`, whole or not at all, then remove the oldest ones over `keep_last`."""
    tensors = {name: parameter.detach().cpu() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        tensors |= {f"{name}/{key}": value.cpu() for key, value in optimizer.state[parameter].items()}
    with new_folder(out_dir / f"step-{step:06}", replace=True) as folder:
        torch.save(tensors, folder / STATE_FILE)
    for old in checkpoints(out_dir)[:-keep_last]:
        shutil.rmtree(old)


def load_state(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_state` wrote into parameters and optimizer.

    Returns:
        how many steps the run has behind it.

    Raises:
        UserError: damaged, or of another model or method.
    """
    tensors = load_pickled(folder / STATE_FILE)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "/" not in name}
    if shapes != {name: tuple(parameter.shape) for name, parameter in trained.items()}:
        raise UserError(
            f"{folder}: was written with another model or other method flags. Resume with those of config.yaml"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
            state = {key.partition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            for key, value in state.items():
                optimizer.state[parameter][key] = value.clone().to(parameter.device)
    return int(folder.name.removeprefix("step-"))


def checkpoints(out_dir: Path) -> list[Path]:
    """Complete `step-*` folders of a run, oldest first (a folder has its name only once it is complete)."""
    return sorted(path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))


class MetricsFile:
    """`metrics.csv`: a row a step, flushed as it comes. Rows after the step that a run resumes from are dropped."""

    def __init__(self, file: Path, first_step: int) -> None:
        rows = []
        if first_step and file.is_file():
            with file.open(newline="") as old:
                rows = [row for row in csv.reader(old) if row[0].isdigit() and int(row[0]) <= first_step]

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="") as new:
                csv.writer(new, lineterminator="\n").writerows([METRICS, *rows])

        write_file(file, write)
        self.file = file

    def add(self, *values: float | None) -> None:
        """Append one row, in the order of `METRICS`."""
        with self.file.open("a", newline="") as file:
            row = ["" if v is None else f"{v:.8g}" if isinstance(v, float) else v for v in values]
            csv.writer(file, lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())
