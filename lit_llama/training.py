"""The training loop, the same for every method: it knows a model with trainable parameters and how to save them."""

import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lit_llama import fast
from lit_llama.checksums import write_checksums
from lit_llama.cli import used_flags
from lit_llama.data import step_samples
from lit_llama.distributed import (
    leave_together,
    peak_memory_bytes,
    together,
    whole_tensors,
    writing_together,
)
from lit_llama.dropout import token_rows
from lit_llama.errors import UserError
from lit_llama.files import replacing
from lit_llama.loggers import recording
from lit_llama.model import recompute
from lit_llama.quantize import QuantizedLinear
from lit_llama.run import Run
from lit_llama.run_folder import (
    Progress,
    check_unused,
    load_state,
    locked,
    newest_whole,
    prune,
    remove_leftovers,
    save_state,
    start_metrics,
)

Save = Callable[[Path, Iterator[tuple[str, Tensor]]], None]
"""Writes trained parameters (names, whole CPU tensors) into a folder in a method's format."""


@dataclass
class TrainArgs:
    """The recipe and the loop.

    Args:
        batch_size: samples an optimizer step sees, over all devices.
        micro_batch_tokens: tokens on a device at a time; a memory knob that leaves the results as they are.
        activation_checkpointing: keep each block's input only and compute the block again on the way back: less memory,
            a third more work.
        fast_paths: use the faster forms of lit_llama/fast.py; false: the plain ones that they equal.
        epochs: passes over the training set.
        max_steps: stop after that many steps, whatever epochs says.
        learning_rate: the learning rate at its peak.
        schedule: after the warm-up: cosine (to zero) or constant.
        warmup_steps: the learning rate rises over these; at most half of a short run.
        warmup_epochs: the same in passes over the training set; takes the place of warmup_steps.
        weight_decay: how strongly AdamW pulls weights to zero.
        beta1: AdamW's decay of the gradients' mean.
        beta2: AdamW's decay of their squares' mean.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        eval_interval: steps between validations; there is one before the first step and after the last as well.
        eval_samples: validate on the first that many samples; default: all.
        save_interval: steps between checkpoints to resume from.
        keep_last: how many of these are kept, and the best one by validation loss beside them.
        log_interval: steps between lines on a terminal that shows no progress bar.
    """

    batch_size: int = 128
    micro_batch_tokens: int = 2048
    activation_checkpointing: bool = False
    fast_paths: bool = True
    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    warmup_epochs: float | None = None
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
            least = int(not isinstance(TrainArgs.__dict__[name], float) and not name.startswith("warmup"))
            below = 1.0 if name.startswith("beta") else math.inf
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value < below:
                raise UserError(f"--train.{name} {value}: should be from {least} on, and below {below}")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"--train.schedule {self.schedule}: unknown. Known: cosine, constant")


def fit(
    run: Run,
    model: _FabricModule,
    args: TrainArgs,
    save: Save,
    learning_rate_ratio: Callable[[str], float] = lambda name: 1.0,
) -> None:
    """Train what requires gradients, and leave the result, `metrics.*` and `step-*` folders in `run.out_dir`.

    A step's loss is the sum over all its labels divided by their number, however its samples are cut into micro-batches
    and spread over devices. `model` is what `run.build` gave; `save` writes what was trained, by a method's format;
    `learning_rate_ratio(name)` multiplies the learning rate of the parameter of that name.

    Raises UserError where another run uses the folder, the loss is not finite, or no checkpoint to resume from is whole
    and fits the model; SystemExit with status 128 plus its number where a signal has asked to stop, after a checkpoint.
    """
    with ExitStack() as stack:
        with together(run.fabric):
            if run.fabric.is_global_zero:
                run.out_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(run.out_dir))
                if not run.resume:  # another one may have begun and ended while this one's model was loaded
                    check_unused(run.out_dir)
        train(run, model, args, save, learning_rate_ratio)


def train(
    run: Run, model: _FabricModule, args: TrainArgs, save: Save, learning_rate_ratio: Callable[[str], float]
) -> None:
    """`fit`, in a folder that is this run's alone."""
    fabric, train_set = run.fabric, run.train_set
    fast.enabled = args.fast_paths
    if args.activation_checkpointing:
        for layer in model.module.layers:
            layer.forward = partial(recompute, layer.forward, preserve_rng_state=True)
    trained = {name: parameter for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    total_samples = args.epochs * len(train_set)
    if args.max_steps is not None:
        total_samples = min(total_samples, args.max_steps * args.batch_size)
    warmup = args.warmup_steps
    if args.warmup_epochs is not None:
        warmup = math.ceil(args.warmup_epochs * len(train_set) / args.batch_size)
    adamw = make_optimizer(trained, args, learning_rate_ratio)

    progress = Progress(data_sha256=run.data_sha256)
    saved = None
    with together(fabric):
        if fabric.is_global_zero and run.resume:
            saved = newest_whole(run.out_dir)
    if saved := fabric.broadcast(saved):
        progress = load_state(saved, fabric, trained, adamw)
        if progress.data_sha256 != run.data_sha256:
            raise UserError(f"{saved}: is of another prepared set. Resume with the --data_dir of config.yaml")
    first_step = kept = progress.step
    num_steps = first_step + max(0, math.ceil((total_samples - progress.samples) / args.batch_size))
    warmup = min(warmup, num_steps // 2)
    if first_step == num_steps:
        raise UserError(f"{run.out_dir}: is at step {first_step} of {num_steps}, done. Raise --train.epochs to go on")
    with together(fabric):
        if fabric.is_global_zero:
            remove_leftovers(run.out_dir)
            with replacing(run.out_dir / "config.yaml") as file:
                file.write_text(used_flags().replace("resume: true", "resume: false"), "utf-8")
            start_metrics(run.out_dir / "metrics.csv", first_step)
    optimizer = fabric.setup_optimizers(adamw)
    count, whole = (sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters()))
    whole += sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    say = partial(print, flush=True) if fabric.is_global_zero else lambda line: None
    where = f"{fabric.device}" if fabric.world_size == 1 else f"{fabric.world_size} devices"
    say(f"training {count:,} of {whole:,} parameters on {where}, {num_steps} steps of {args.batch_size} samples")
    started, seconds, tokens_seen = time.perf_counter(), 0.0, 0
    if progress.step == 0:
        progress.first_val_loss = evaluate(run, model, args)
        if progress.first_val_loss is not None:
            say(f"step 0: val loss {progress.first_val_loss:.4f}")
    else:
        say(f"going on after step {first_step}, from {saved}")

    def keep() -> None:
        nonlocal kept
        with writing_together(fabric, run.out_dir / f"step-{progress.step:06}") as folder:
            with together(fabric):
                save_state(folder, fabric, trained, adamw, progress)
            save_result(run, trained, save, folder)
            if fabric.is_global_zero:
                write_checksums(folder)
        kept = progress.step
        if fabric.is_global_zero:
            prune(run.out_dir, args.keep_last, progress.best_step)

    hidden = None if fabric.is_global_zero else True
    bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=hidden, dynamic_ncols=True)
    with StopSignals() as stop, recording(fabric, run.out_dir, run.logger, progress) as record:
        for step in range(first_step, num_steps):
            step_started = time.perf_counter()
            places = range(progress.samples, min(progress.samples + args.batch_size, total_samples))
            sample_ids = step_samples(places, len(train_set), run.seed)
            learning_rate = args.learning_rate * schedule(args.schedule, step, warmup, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["ratio"]
            try:
                loss, grad_norm = train_step(run, model, trained, optimizer, args, step, sample_ids)
            except UserError:
                if step > kept:
                    keep()  # what is good still
                raise

            tokens = sum(train_set.lengths[index] for index in sample_ids)
            step_seconds = time.perf_counter() - step_started
            seconds, tokens_seen = seconds + step_seconds, tokens_seen + tokens
            done, last = step + 1, step + 1 == num_steps
            progress.step, progress.samples = done, progress.samples + len(sample_ids)
            val_loss = evaluate(run, model, args) if last or done % args.eval_interval == 0 else None
            is_best = val_loss is not None and val_loss < (progress.best_val_loss or math.inf)
            if is_best:
                progress.best_val_loss, progress.best_step = val_loss, done
            values = (done, len(sample_ids), tokens, loss, val_loss, learning_rate, grad_norm)
            with together(fabric):
                if fabric.is_global_zero:
                    speed, memory = tokens / step_seconds, peak_memory_bytes(fabric.device)
                    record(*values, speed, memory)
            line = f"loss {loss:.4f}, {tokens_seen / seconds:.0f} tokens/s"
            bar.set_postfix_str(line, refresh=False)
            bar.update()
            if val_loss is not None and fabric.is_global_zero:
                bar.write(f"step {done}: val loss {val_loss:.4f}")
            if bar.disable and (last or done % args.log_interval == 0 or done == 1):
                left = (num_steps - done) * seconds / (done - first_step)
                say(f"step {done}/{num_steps}: {line}, {left:.0f} s left")
            if last:
                save_result(run, trained, save, run.out_dir)
            stopped_by = 0 if last else stop.agreed(run)
            if last or is_best or stopped_by or done % args.save_interval == 0:
                keep()
            if stopped_by:
                bar.close()
                command = shlex.join(["python", sys.argv[0], "--config", f"{run.out_dir}/config.yaml", "--resume"])
                say(f"stopped by {signal.Signals(stopped_by).name} after step {done}. Go on with: {command}")
                leave_together(fabric)
                raise SystemExit(128 + stopped_by if fabric.is_global_zero else 0)
        bar.close()
        change = "" if val_loss is None else f"val loss {progress.first_val_loss:.4f} -> {val_loss:.4f}, "
        say(
            f"done: {change}{time.perf_counter() - started:.1f} s, {tokens_seen / seconds:.0f} tokens/s, "
            f"peak memory {peak_memory_bytes(fabric.device) / 1e9:.2f} GB, result in {run.out_dir}"
        )
    leave_together(fabric)


def make_optimizer(
    trained: dict[str, nn.Parameter], args: TrainArgs, learning_rate_ratio: Callable[[str], float]
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with a group for each ratio of learning rates."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(learning_rate_ratio(name), []).append(parameter)
    adam = dict(lr=args.learning_rate, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay, fused=True)
    return torch.optim.AdamW([{"params": params, "ratio": ratio} for ratio, params in groups.items()], **adam)


def train_step(
    run: Run,
    model: _FabricModule,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    args: TrainArgs,
    step: int,
    sample_ids: list[int],
) -> tuple[float, float]:
    """One optimizer step on the samples; returns loss and gradient norm. Raises UserError where one is not finite."""
    fabric, train_set = run.fabric, run.train_set
    num_labels = sum(train_set.label_counts[index] for index in sample_ids)
    losses = []
    for ids in run.pack(sample_ids, train_set.lengths, args.micro_batch_tokens):
        batch = train_set.micro_batch(ids, fabric.device)
        with token_rows(run.seed, step, ids or [0], batch["lengths"], fabric.device):
            loss = model(**batch) / num_labels
            # fully_shard takes the mean of the processes' gradients, this is a sum
            fabric.backward(loss * fabric.world_size)
        losses.append((ids, loss.detach()))
        del loss  # it holds what was kept for the backward pass
    total = fabric.all_reduce(torch.stack([loss for _, loss in losses]).sum(), reduce_op="sum")
    norm = nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
    loss, grad_norm = torch.stack([total, norm.full_tensor() if isinstance(norm, DTensor) else norm]).tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        bad = [index for ids, part in losses if not torch.isfinite(part) for index in ids]
        bad = [index for rank in range(fabric.world_size) for index in fabric.broadcast(bad, src=rank)]
        raise UserError(
            f"step {step + 1}: loss {loss} and gradient norm {grad_norm} are not finite; stopped before this step "
            f"changed anything. Lower --train.learning_rate and resume, or look at samples {bad or sample_ids} of train"
        )
    if 0 < args.max_grad_norm < grad_norm:
        nn.utils.clip_grads_with_norm_(trained.values(), args.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


@torch.no_grad()
def evaluate(run: Run, model: _FabricModule, args: TrainArgs) -> float | None:
    """Mean loss over the labels of the validation set, None where there is none."""
    ids = range(len(run.val_set))[: args.eval_samples]
    if not ids:
        return None
    model.eval()
    total = torch.zeros((), device=run.fabric.device)
    batches = run.pack(ids, run.val_set.lengths, args.micro_batch_tokens)
    hidden = None if run.fabric.is_global_zero else True
    for sample_ids in tqdm(batches, desc="validating", leave=False, delay=2, disable=hidden):
        total += model(**run.val_set.micro_batch(sample_ids, run.fabric.device))
    model.train()
    total = run.fabric.all_reduce(total, reduce_op="sum")
    return total.item() / sum(run.val_set.label_counts[index] for index in ids)


def schedule(kind: str, step: int, warmup: int, num_steps: int) -> float:
    """Factor on the learning rate at a step (from 0): linear warm-up, then constant or half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))
    return cosine if kind == "cosine" else 1.0


def save_result(run: Run, trained: dict[str, nn.Parameter], save: Save, folder: Path) -> None:
    """Let process 0 write the trained parameters into a folder in the method's format, each gathered as it comes."""
    tensors = whole_tensors(trained.items())
    with together(run.fabric):
        try:
            if run.fabric.is_global_zero:
                save(folder, tensors)
        finally:
            for _ in tensors:  # where nothing is written, or no longer, the gathering must go on
                pass


class StopSignals:
    """Inside the block, SIGTERM and SIGINT (Ctrl-C) are noted instead of ending the process; the second one ends it."""

    def __enter__(self) -> "StopSignals":
        self.number = 0
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there signals can be caught
        numbers = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()
        self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number: int, frame: object) -> None:
        self.__exit__()
        self.number = number
        print(f"{signal.Signals(number).name}: finishing this step (again: stop at once)", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, run: Run) -> int:
        """The number of a signal that any process has got, 0 for none: all stop after the same step."""
        number = torch.tensor(float(self.number), device=run.fabric.device)
        return int(run.fabric.all_reduce(number, reduce_op="max"))
