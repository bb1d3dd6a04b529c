"""The training loop, the same for every method: it trains whatever requires gradients."""

# Hyperparameters count samples, memory limits count tokens. `batch_size` samples make a step; they
# are packed into micro-batches of as many tokens as fit into memory, and spread over devices. The
# loss of a step is the sum over all its labels divided by their number. So the same seed gives the
# same loss curve for any micro-batch size and any number of devices, up to rounding.

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lit_llama.data import TokenizedDataset, pack_micro_batches, sample_indices, split_across_ranks
from lit_llama.dropout import token_rows
from lit_llama.errors import UserError
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.console import Console
from lit_llama.runtime.devices import StopSignals, shutdown
from lit_llama.runtime.hardware import peak_memory_bytes
from lit_llama.runtime.loggers import metrics_logger
from lit_llama.storage.datasets import Dataset
from lit_llama.storage.methods import METHODS, SaveInfo, save_methods
from lit_llama.storage.run_folder import Progress, RunFolder


def fit(
    fabric: Fabric,
    model: _FabricModule,
    dataset: Dataset,
    methods: Mapping[str, Any],  # settings of the applied methods, by their names in METHODS
    train: TrainArgs,
    run: RunArgs,
    flags: dict[str, Any],  # all of them, for config.yaml
) -> None:
    """Train a model, and save the result, metrics and checkpoints in `run.out_dir`."""
    trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    optimizer = fabric.setup_optimizers(make_optimizer(trained, train, methods))
    info = SaveInfo(model.module, str(run.checkpoint_dir), dataset.template)
    write_result = partial(save_methods, methods=methods, info=info)
    folder = RunFolder(fabric, run.out_dir, trained, optimizer, write_result, train.keep_last)
    with folder, StopSignals(fabric) as stop:
        progress = folder.begin(flags, run.resume, dataset.sha256)
        schedule = Schedule(train, len(dataset.train), progress)
        console = Console(fabric, model, train, schedule.num_steps, progress.step)
        if progress.step == 0:
            progress.first_val_loss = evaluate(fabric, model, dataset.val, train)
            console.val_loss(0, progress.first_val_loss)
        with metrics_logger(fabric, run.out_dir, run.logger, flags, progress) as log_step:
            for step in range(progress.step, schedule.num_steps):
                # The samples follow from the seed and the progress alone, so that a resumed run
                # continues as if it had never stopped. The same holds for the learning rate.
                sample_ids = schedule.sample_ids(progress, run.seed)
                learning_rate = schedule.set_learning_rate(optimizer, step)
                started = time.perf_counter()
                loss, grad_norm = train_step(
                    fabric, model, optimizer, dataset.train, sample_ids, train, run.seed, step
                )
                seconds = time.perf_counter() - started
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    # The weights are still those of the last good step.
                    folder.save_checkpoint(progress)
                    what = f"step {step + 1}: loss {loss} or grad norm {grad_norm} is not finite"
                    hint = "Lower --train.learning_rate"
                    if step == 0:  # the model is still the one that was loaded
                        hint = "The model's weights are damaged, or need --precision 32-true"
                    raise UserError(f"{what}. {hint}; samples: {sample_ids}")
                progress.step += 1
                progress.samples += len(sample_ids)
                last = progress.step == schedule.num_steps
                val_loss = None
                if last or progress.step % train.eval_interval == 0:
                    val_loss = evaluate(fabric, model, dataset.val, train)
                is_best = progress.update_best(val_loss)
                tokens = sum(dataset.train.lengths[index] for index in sample_ids)
                metrics = dict(step=progress.step, samples=len(sample_ids), tokens=tokens)
                metrics |= dict(loss=loss, val_loss=val_loss, learning_rate=learning_rate)
                metrics |= dict(grad_norm=grad_norm, tokens_per_second=tokens / seconds)
                metrics["peak_memory_bytes"] = peak_memory_bytes(fabric.device)
                log_step(metrics)
                console.step(metrics, seconds)

                if last:
                    folder.save_result()
                stop_signal = 0 if last else stop.agreed()
                if last or is_best or stop_signal or progress.step % train.save_interval == 0:
                    folder.save_checkpoint(progress)
                if stop_signal:
                    console.stopped(stop_signal, progress.step, run.out_dir)
                    shutdown(fabric)
                    raise SystemExit(128 + stop_signal if fabric.is_global_zero else 0)
        console.done(progress.first_val_loss, val_loss, run.out_dir)
    shutdown(fabric)


class Schedule:
    """The number of steps of a run, which samples they see, and their learning rates."""

    def __init__(self, train: TrainArgs, dataset_size: int, progress: Progress) -> None:
        self.train, self.dataset_size = train, dataset_size
        self.num_samples = train.epochs * dataset_size
        if train.max_steps is not None:
            self.num_samples = min(self.num_samples, train.max_steps * train.batch_size)
        left = max(0, self.num_samples - progress.samples)
        self.num_steps = progress.step + math.ceil(left / train.batch_size)
        if left == 0:
            problem = f"the run is done, at step {progress.step} of {self.num_steps}"
            raise UserError(f"{problem}. Raise --train.epochs or --train.max_steps to continue")
        warmup = train.warmup_steps
        if train.warmup_epochs is not None:
            warmup = math.ceil(train.warmup_epochs * dataset_size / train.batch_size)
        # A short run would otherwise end before it has reached its learning rate.
        self.warmup = min(warmup, self.num_steps // 2)

    def sample_ids(self, progress: Progress, seed: int) -> list[int]:
        """Return the samples of the next step: a function of the seed and the progress alone."""
        end = min(progress.samples + self.train.batch_size, self.num_samples)
        return sample_indices(range(progress.samples, end), self.dataset_size, seed)

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of a step, counted from 0, and return it."""
        # Linear warm-up, then constant or half a cosine to zero.
        factor = 1.0
        if step < self.warmup:
            factor = (step + 1) / self.warmup
        elif self.train.schedule == "cosine":
            done = (step - self.warmup) / (self.num_steps - self.warmup)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        learning_rate = self.train.learning_rate * factor
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        return learning_rate


def make_optimizer(
    trained: Mapping[str, nn.Parameter], train: TrainArgs, methods: Mapping[str, Any]
) -> torch.optim.AdamW:
    """Make AdamW (arXiv 1711.05101), with a parameter group for each ratio of learning rates."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        ratios = (METHODS[key].learning_rate_ratio(methods[key], name) for key in methods)
        groups.setdefault(math.prod(ratios), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "ratio": ratio} for ratio, parameters in groups.items()],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        weight_decay=train.weight_decay,
        fused=True,
    )


def train_step(
    fabric: Fabric,
    model: _FabricModule,
    optimizer: torch.optim.Optimizer,
    dataset: TokenizedDataset,
    sample_ids: list[int],
    train: TrainArgs,
    seed: int,
    step: int,
) -> tuple[float, float]:
    """Run one optimizer step. Returns the loss and the gradient norm."""
    # Not those of the model: after an evaluation, FSDP leaves some of them gathered for a while.
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    num_labels = sum(dataset.label_counts[index] for index in sample_ids)
    losses = []
    for ids in micro_batches(fabric, dataset, sample_ids, train):
        batch = dataset.micro_batch(ids, fabric.device)
        # Dropout depends on seed, step and sample: not on the micro-batch, nor on the device.
        with token_rows(seed, step, ids or [0], batch["lengths"], fabric.device):
            loss = model(**batch) / num_labels
            # FSDP averages the gradients of all processes; we need their sum.
            fabric.backward(loss * fabric.world_size)
        losses.append(loss.detach())
        del loss  # frees what was saved for backward
    total = fabric.all_reduce(torch.stack(losses).sum(), reduce_op="sum")
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    full_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # One synchronization with the device for both numbers.
    loss, grad_norm = torch.stack([total, full_norm]).tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return loss, grad_norm  # the weights stay unchanged
    if 0 < train.max_grad_norm < grad_norm:
        nn.utils.clip_grads_with_norm_(trained, train.max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss, grad_norm


@torch.no_grad()
def evaluate(
    fabric: Fabric, model: _FabricModule, dataset: TokenizedDataset, train: TrainArgs
) -> float | None:
    """Return the mean loss over all labels of the validation set; None if it is empty."""
    sample_ids = range(len(dataset))[: train.eval_samples]
    if not sample_ids:
        return None
    model.eval()
    total = torch.zeros((), device=fabric.device)
    batches = micro_batches(fabric, dataset, sample_ids, train)
    hidden = None if fabric.is_global_zero else True
    for ids in tqdm(batches, desc="validating", leave=False, delay=2, disable=hidden):
        total += model(**dataset.micro_batch(ids, fabric.device))
    model.train()
    total = fabric.all_reduce(total, reduce_op="sum")
    return total.item() / sum(dataset.label_counts[index] for index in sample_ids)


def micro_batches(
    fabric: Fabric, dataset: TokenizedDataset, sample_ids: Iterable[int], train: TrainArgs
) -> list[list[int]]:
    """Pack samples into the micro-batches of this process."""
    batches = pack_micro_batches(sample_ids, dataset.lengths, train.micro_batch_tokens)
    return split_across_ranks(batches, fabric.global_rank, fabric.world_size)
