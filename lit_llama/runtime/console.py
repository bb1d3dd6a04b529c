"""Progress of a training run in the terminal: a bar, or plain lines if stdout is redirected."""

import shlex
import signal
import sys
import time
from pathlib import Path

from lightning.fabric import Fabric
from torch import nn
from tqdm import tqdm

from lit_llama.fast.quantization import QuantizedLinear
from lit_llama.runtime.args import TrainArgs
from lit_llama.runtime.hardware import peak_memory_bytes


class Console:
    """Print the progress of a run from process 0; the other processes stay silent."""

    def __init__(
        self, fabric: Fabric, model: nn.Module, train: TrainArgs, num_steps: int, first_step: int
    ) -> None:
        self.fabric, self.log_interval = fabric, train.log_interval
        self.num_steps, self.first_step = num_steps, first_step
        self.started, self.tokens, self.seconds = time.perf_counter(), 0, 0.0
        disable = None if fabric.is_global_zero else True  # None: unless it is a terminal
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=disable)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]  # in buffers
        total += sum(layer.in_features * layer.out_features for layer in quantized)
        devices = f"{fabric.world_size} devices" if fabric.world_size > 1 else fabric.device
        steps = f"{num_steps} steps of {train.batch_size} samples"
        self.print(f"training {trained:,} of {total:,} parameters on {devices}, {steps}")
        if first_step > 0:
            self.print(f"resuming after step {first_step}")

    def print(self, line: str) -> None:
        if self.fabric.is_global_zero:
            print(line, flush=True) if self.bar.disable else self.bar.write(line)

    def val_loss(self, step: int, val_loss: float | None) -> None:
        if val_loss is not None:
            self.print(f"step {step}: val loss {val_loss:.4f}")

    def step(self, metrics: dict[str, float | None], seconds: float) -> None:
        """Report the metrics of a step."""
        step = metrics["step"]
        self.tokens += metrics["tokens"]
        self.seconds += seconds
        status = f"loss {metrics['loss']:.4f}, {self.tokens / self.seconds:.0f} tokens/s"
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update()
        self.val_loss(step, metrics["val_loss"])
        if self.bar.disable and (step in (1, self.num_steps) or step % self.log_interval == 0):
            eta = (self.num_steps - step) * self.seconds / (step - self.first_step)
            self.print(f"step {step}/{self.num_steps}: {status}, {eta:.0f} s left")

    def stopped(self, number: int, step: int, out_dir: Path) -> None:
        """Report that a signal has stopped the run."""
        self.bar.close()
        config = shlex.quote(f"{out_dir}/config.yaml")
        command = f"python {sys.argv[0]} --config {config} --resume"
        name = signal.Signals(number).name
        self.print(f"stopped by {name} after step {step}. Resume with: {command}")

    def done(self, first_val_loss: float | None, val_loss: float | None, out_dir: Path) -> None:
        """Report the end of the run."""
        self.bar.close()
        change = "" if val_loss is None else f"val loss {first_val_loss:.4f} -> {val_loss:.4f}, "
        seconds, speed = time.perf_counter() - self.started, self.tokens / self.seconds
        memory = f"peak memory {peak_memory_bytes(self.fabric.device) / 1e9:.2f} GB"
        line = f"{change}{seconds:.1f} s, {speed:.0f} tokens/s, {memory}, result in {out_dir}"
        self.print(f"done: {line}")
