"""The training loop, the same for every method: it knows a model with trainable parameters and how to save them."""

import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from lit_llama.checkpoint import read_tensors, replacing, save_tensors
from lit_llama.cli import used_flags
from lit_llama.config import LLaMAConfig
from lit_llama.data import open_prepared, pack, step_samples
from lit_llama.distributed import PRECISIONS, make_fabric, peak_memory_bytes
from lit_llama.dropout import token_rows
from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

METRICS = "step,samples,tokens,loss,val_loss,learning_rate,grad_norm,tokens_per_second,peak_memory_bytes"
STATE_FILE = "state.safetensors"


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
            least = int(self.__annotations__[name] is not float and name not in ("warmup_steps", "keep_last"))
            below = 1.0 if name.startswith("beta") else math.inf
            if isinstance(value, (int, float)) and not least <= value < below:
                raise UserError(f"--train.{name} {value}: should be from {least} on, and below {below}")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"--train.schedule {self.schedule}: unknown. Known: cosine, constant")


class Run:
    """A run's devices, data and folder, checked (UserError) before a model is loaded; takes finetune/*.py's flags."""

    def __init__(
        self, *, checkpoint_dir: Path, data_dir: Path, out_dir: Path, devices: int, num_nodes: int, precision: str,
        seed: int, resume: bool,
    ) -> None:  # fmt: skip
        config = LLaMAConfig.from_checkpoint(checkpoint_dir)
        self.train_set, self.val_set, meta = open_prepared(data_dir, Tokenizer(checkpoint_dir), config)
        self.template = meta["template"]
        if resume and not (out_dir / "config.yaml").is_file():
            raise UserError(f"{out_dir}: no run there to resume. Start one without --resume")
        if not resume and out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise UserError(f"{out_dir}: holds another run. Go on with it: --resume true; or give another --out_dir")
        self.fabric = make_fabric(devices, num_nodes, precision)
        self.out_dir, self.seed, self.resume, self.weight_dtype = out_dir, seed, resume, PRECISIONS[precision]
        torch.manual_seed(seed)


def fit(run: Run, model: nn.Module, args: TrainArgs, save: Callable[[Path], None]) -> None:
    """Train what requires gradients, and leave the result, `metrics.csv` and `step-*` folders in `run.out_dir`.

    A step's loss is the sum over all its labels divided by their number, however its samples are cut into
    micro-batches. Raises UserError where it is not finite, or a checkpoint to resume from does not fit the model.
    In `model` a method has made its parameters trainable (fp32); `save` writes them into a folder in its format.
    """
    fabric, train_set, device = run.fabric, run.train_set, run.fabric.device
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total_samples = args.epochs * len(train_set)
    if args.max_steps is not None:
        total_samples = min(total_samples, args.max_steps * args.batch_size)
    num_steps = math.ceil(total_samples / args.batch_size)
    adam = dict(lr=args.learning_rate, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(trained.values(), **adam)

    saved = checkpoints(run.out_dir) if run.resume else []  # none: the run was stopped before its first checkpoint
    first_step = load_state(saved[-1], trained, optimizer) if saved else 0
    if first_step >= num_steps:
        raise UserError(f"{run.out_dir}: is at step {first_step} of {num_steps}, done. Raise --train.epochs to go on")
    with replacing(run.out_dir / "config.yaml") as file:
        file.write_text(used_flags().replace("resume: true", "resume: false"), "utf-8")
    start_metrics(run.out_dir / "metrics.csv", first_step)
    model, optimizer = fabric.setup_module(model), fabric.setup_optimizers(optimizer)
    count, whole = (sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters()))
    print(f"training {count:,} of {whole:,} parameters on {device}, {num_steps} steps of {args.batch_size} samples")
    warmup = min(args.warmup_steps, num_steps // 2)
    started = time.perf_counter()
    first_val_loss = val_loss = evaluate(run, model, args)
    if val_loss is not None:
        print(f"step {first_step}: val loss {val_loss:.4f}")
    seconds, tokens_seen = 0.0, 0
    bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
    for step in range(first_step, num_steps):
        step_started = time.perf_counter()
        sample_ids = step_samples(step, args.batch_size, total_samples, len(train_set), run.seed)
        num_labels = sum(train_set.label_counts[index] for index in sample_ids)
        learning_rate = args.learning_rate * schedule(args.schedule, step, warmup, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = torch.zeros((), device=device)
        for ids in pack(sample_ids, train_set.lengths, args.micro_batch_tokens):
            batch = train_set.micro_batch(ids, device)
            with token_rows(run.seed, step, ids, batch["lengths"], device):
                part = model(**batch) / num_labels
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
        done, last = step + 1, step + 1 == num_steps
        val_loss = evaluate(run, model, args) if last or done % args.eval_interval == 0 else None
        values = (done, len(sample_ids), tokens, loss.item(), val_loss, learning_rate, grad_norm.item())
        add_metrics(run.out_dir / "metrics.csv", *values, tokens / step_seconds, peak_memory_bytes(device))
        line = f"loss {loss.item():.4f}, {tokens_seen / seconds:.0f} tokens/s"
        bar.set_postfix_str(line, refresh=False)
        bar.update()
        if val_loss is not None:
            bar.write(f"step {done}: val loss {val_loss:.4f}")
        if bar.disable and (last or done % args.log_interval == 0 or done == 1):
            left = (num_steps - done) * seconds / (done - first_step)
            print(f"step {done}/{num_steps}: {line}, {left:.0f} s left", flush=True)
        if last:
            save(run.out_dir)
        if last or done % args.save_interval == 0:
            save_state(run.out_dir, done, trained, optimizer, args.keep_last)
    bar.close()
    change = "" if val_loss is None else f"val loss {first_val_loss:.4f} -> {val_loss:.4f}, "
    print(
        f"done: {change}{time.perf_counter() - started:.1f} s, {tokens_seen / seconds:.0f} tokens/s, "
        f"peak memory {peak_memory_bytes(device) / 1e9:.2f} GB, result in {run.out_dir}"
    )


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, args: TrainArgs) -> float | None:
    """Mean loss over the labels of the validation set, None where there is none."""
    ids = range(len(run.val_set))[: args.eval_samples]
    if not ids:
        return None
    model.eval()
    total = torch.zeros((), device=run.fabric.device)
    batches = pack(ids, run.val_set.lengths, args.micro_batch_tokens)
    for sample_ids in tqdm(batches, desc="validating", leave=False, delay=2, disable=None):
        total += model(**run.val_set.micro_batch(sample_ids, run.fabric.device))
    model.train()
    return total.item() / sum(run.val_set.label_counts[index] for index in ids)


def schedule(kind: str, step: int, warmup: int, num_steps: int) -> float:
    """Factor on the learning rate at a step (from 0): linear warm-up, then constant or half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
    return cosine if kind == "cosine" else 1.0


def save_state(
    out_dir: Path, step: int, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, keep_last: int
) -> None:
    """Write `step-000123/`, whole or not at all, then remove the oldest ones over `keep_last`."""
    tensors = {name: parameter.detach().cpu() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        tensors |= {f"{name}/{key}": value.cpu() for key, value in optimizer.state[parameter].items()}
    with replacing(out_dir / f"step-{step:06}") as folder:
        folder.mkdir()
        save_tensors(tensors, folder / STATE_FILE)
    for old in checkpoints(out_dir)[: -keep_last or None]:
        shutil.rmtree(old)


@torch.no_grad()
def load_state(folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Read what `save_state` wrote; return how many steps the run has behind it. Raises UserError: another model's."""
    tensors, _ = read_tensors(folder / STATE_FILE)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if "/" not in name}
    if shapes != {name: parameter.shape for name, parameter in trained.items()}:
        raise UserError(f"{folder}: is of another model or other method flags. Resume with those of config.yaml")
    for name, tensor in tensors.items():
        name, _, key = name.partition("/")
        if key:
            optimizer.state[trained[name]][key] = tensor.to(trained[name].device)
        else:
            trained[name].copy_(tensor)
    return int(folder.name.removeprefix("step-"))


def checkpoints(out_dir: Path) -> list[Path]:
    """Complete `step-*` folders of a run, oldest first (a folder has its name only once it is complete)."""
    found = (path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def start_metrics(file: Path, first_step: int) -> None:
    """A `metrics.csv` with its header and, where a run goes on after `first_step`, the rows up to that."""
    old = file.read_text("utf-8").splitlines() if first_step and file.is_file() else []
    rows = [row for row in old if row.partition(",")[0].isdigit() and int(row.partition(",")[0]) <= first_step]
    with replacing(file) as temporary:
        temporary.write_text("\n".join([METRICS, *rows, ""]), "utf-8")


def add_metrics(file: Path, *values: float | None) -> None:
    """Append a step's row, in the order of `METRICS`."""
    row = ("" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value) for value in values)
    with file.open("a", encoding="utf-8") as out:
        out.write(",".join(row) + "\n")
