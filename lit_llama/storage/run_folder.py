"""Run directory: config.yaml, metrics.csv, and step-* checkpoints for resuming."""

import fcntl
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_llama.config import read_json
from lit_llama.errors import UserError
from lit_llama.runtime.args import RunArgs, TrainArgs
from lit_llama.runtime.devices import on_rank_zero, sync_errors
from lit_llama.runtime.hardware import choose_for_training
from lit_llama.runtime.loggers import check_logger, start_metrics
from lit_llama.storage import files
from lit_llama.storage.shards import gather_full_tensors, local_rows, local_shard

# Flags that may change when a run resumes. Others, such as the seed or a LoRA's rank, may not.
FREE_FLAGS = re.compile(
    r"checkpoint_dir|data_dir|out_dir|devices|num_nodes|resume|config|logger|train\.(?!batch_size).*"
)


def start_run(
    args: RunArgs, train: TrainArgs, **groups: Any
) -> tuple[RunArgs, TrainArgs, dict[str, Any]]:
    """Choose the precision and kernels that are left open, and check the folder and the logger.

    Returns arguments with these choices, and all flags, as in config.yaml. A run that resumes keeps
    what it chose when it began.
    """
    if args.resume and (args.out_dir / "config.yaml").exists():
        before = read_flags(args.out_dir)
        if args.precision == "auto":
            args = replace(args, precision=before.get("precision", "auto"))
        if train.kernels is None:
            train = replace(train, kernels=before.get("train", {}).get("kernels"))
    args, train = choose_for_training(args, train, trains_all=not groups)
    flags = args.as_flags(**groups, train=train)
    check_run_folder(args.out_dir, args.resume, flags)
    check_logger(args.logger)
    return args, train, flags


@dataclass
class Progress:
    """Progress of a run. With seed and recipe it determines what follows."""

    step: int = 0
    samples: int = 0
    first_val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    data_sha256: str = ""

    def update_best(self, val_loss: float | None) -> bool:
        """Record the step's validation loss if it is the best so far; return whether it is."""
        best = math.inf if self.best_val_loss is None else self.best_val_loss
        is_best = val_loss is not None and val_loss < best  # not if it is NaN
        if is_best:
            self.best_val_loss, self.best_step = val_loss, self.step
        return is_best


def check_run_folder(out_dir: Path, resume: bool, flags: dict[str, Any]) -> None:
    """Require an empty folder or, to resume, a run whose flags are compatible."""
    if not resume:
        hint = "Resume it with --resume, or pass another --out_dir"
        return files.require_empty_dir(out_dir, f"holds another run. {hint}")
    if not (out_dir / "config.yaml").is_file():
        raise UserError(f"{out_dir}: no run there to resume. Start one without --resume")
    old, new = flatten(read_flags(out_dir)), flatten(flags)
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if before != now and not FREE_FLAGS.fullmatch(name):
            problem = f"--{name} was {before!r} when this run began, now it is {now!r}"
            raise UserError(f"{out_dir}: {problem}. Change it back, or pass another --out_dir")


def read_flags(out_dir: Path) -> dict[str, Any]:
    """Load the flags of a run from its config.yaml."""
    try:
        return yaml.safe_load(files.read_text(out_dir / "config.yaml")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{out_dir}/config.yaml: corrupted ({error})") from None


def flatten(flags: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 5}} -> {"train.epochs": 5}."""
    flat = {}
    for name, value in flags.items():
        is_group = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": value}
    return flat


def lock_folder(folder: Path) -> int:
    """Lock a run's folder; return the file descriptor, which holds the lock until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "Wait for its end, stop it, or pass another --out_dir"
        raise UserError(f"{folder}: another run is using this folder. {hint}") from None
    except OSError:
        pass  # some network file systems have no locks
    return descriptor


@dataclass
class RunFolder(AbstractContextManager):
    """Write the checkpoints and the result of a run; its folder is locked from `begin` on.

    All processes call all methods together. An error in one process ends all of them.
    """

    fabric: Fabric
    out_dir: Path
    trained: dict[str, nn.Parameter]  # by name; may be sharded
    optimizer: torch.optim.Optimizer
    # writes the full tensors of `trained` into a folder in the method's format
    write_result: Callable[[Path, Iterator[tuple[str, Tensor]]], None]
    keep_last: int  # number of checkpoints to keep, besides the best
    last_saved_step: int = 0
    lock: int | None = None  # file descriptor, in process 0

    def __exit__(self, *error: object) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def begin(self, flags: dict[str, Any], resume: bool, data_sha256: str) -> Progress:
        """Lock the folder, load the latest checkpoint if `resume`, and write config.yaml."""
        start = Progress(data_sha256=data_sha256)
        checkpoint, progress = on_rank_zero(self.fabric, self._begin, flags, resume, start)
        with sync_errors(self.fabric):
            if checkpoint:
                self._load_state(checkpoint)
        self.last_saved_step = progress.step
        return progress

    def _begin(self, flags: dict[str, Any], resume: bool, progress: Progress) -> tuple:
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.out_dir)
        # checked again: another run may have ended while the model was loaded
        check_run_folder(self.out_dir, resume, flags)
        checkpoint = latest_valid_checkpoint(self.out_dir)
        if checkpoint:
            saved = read_json(checkpoint / "state.json")
            if saved["shapes"] != self._shapes():
                hint = "Resume with those of config.yaml"
                raise UserError(f"{checkpoint}: is of another model or other method flags. {hint}")
            if saved["data_sha256"] != progress.data_sha256:
                hint = "Resume with the --data_dir of config.yaml"
                raise UserError(f"{checkpoint}: trained on another tokenized dataset. {hint}")
            progress = Progress(**{field.name: saved[field.name] for field in fields(Progress)})
        # partial writes of a killed process
        for path in (*self.out_dir.glob(".*.tmp-*"), *self.out_dir.glob(".*.old*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with files.atomic_write(self.out_dir / "config.yaml") as file:
            file.write_text(yaml.safe_dump(flags | {"resume": False}, sort_keys=False), "utf-8")
        start_metrics(self.out_dir / "metrics.csv", progress.step)
        return checkpoint, progress

    def save_result(self, folder: Path | None = None) -> None:
        """Write the method's files, by default into the run directory itself."""
        tensors = gather_full_tensors(self.trained.items())
        with sync_errors(self.fabric):
            try:
                if self.fabric.is_global_zero:
                    self.write_result(folder or self.out_dir, tensors)
            finally:
                for _ in tensors:  # all processes must gather, even if rank 0 has failed
                    pass

    def save_checkpoint(self, progress: Progress) -> None:
        """Write step-000123 with state and result atomically, and remove old checkpoints."""
        if progress.step == self.last_saved_step:
            return
        target = files.atomic_write(self.out_dir / f"step-{progress.step:06}")
        with ExitStack() as writing:
            folder = on_rank_zero(self.fabric, writing.enter_context, target)
            with sync_errors(self.fabric):
                folder.mkdir(exist_ok=True)
                self._save_state(folder, progress)
            self.save_result(folder)
            on_rank_zero(self.fabric, files.write_checksums, folder)
            on_rank_zero(self.fabric, writing.close)  # which renames the folder
        self.last_saved_step = progress.step
        on_rank_zero(self.fabric, prune, self.out_dir, self.keep_last, progress.best_step)

    def _save_state(self, folder: Path, progress: Progress) -> None:
        rank = self.fabric.global_rank
        for number, group in enumerate(files.split_into_files(self._state())):
            shards = {name: t.contiguous() for name, t in group.items() if t.numel()}
            files.save_tensors(shards, folder / f"state-{rank:05}-{number:05}.safetensors")
            del group, shards  # before the next ones are copied
        if rank == 0:
            text = json.dumps(asdict(progress) | {"shapes": self._shapes()}, indent=2)
            (folder / "state.json").write_text(f"{text}\n", "utf-8")

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.trained.items()}

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this process's shards, named by their first row (`name@row`), and random states."""
        for name, parameter in self.trained.items():
            row = local_rows(parameter).start
            yield f"{name}@{row}", local_shard(parameter.detach()).cpu()
            for key, value in self.optimizer.state[parameter].items():
                # moments are sharded like their parameter; `step` is a scalar
                yield f"{name}/{key}@{row if value.dim() else 0}", local_shard(value).cpu()
        rank, device = self.fabric.global_rank, self.fabric.device
        yield f"rng/cpu/{rank}@0", torch.get_rng_state()
        if device.type == "cuda":
            yield f"rng/cuda/{rank}@0", torch.cuda.get_rng_state(device)

    @torch.no_grad()
    def _load_state(self, folder: Path) -> None:
        """Load the shards that overlap with this process's, whoever saved them."""
        for file in sorted(folder.glob("state-*.safetensors")):
            with files.open_safetensors(file) as handle:
                for stored in handle.keys():  # noqa: SIM118
                    self._load_tensor(stored, handle)

    def _load_tensor(self, stored: str, handle: Any) -> None:
        rank, device = self.fabric.global_rank, self.fabric.device
        name, _, first = stored.rpartition("@")
        name, _, key = name.partition("/")
        if name == "rng":
            if key == f"cpu/{rank}":
                torch.set_rng_state(handle.get_tensor(stored))
            elif key == f"{device.type}/{rank}":
                torch.cuda.set_rng_state(handle.get_tensor(stored), device)
            return
        target, state = self.trained[name], self.optimizer.state[self.trained[name]]
        if key == "step":
            state[key] = handle.get_tensor(stored).to(device)
            return
        if key:
            if key not in state:
                state[key] = torch.empty_like(target)
            target = state[key]
        saved, first, rows = handle.get_slice(stored), int(first), local_rows(target)
        start = max(rows.start, first)
        stop = min(rows.stop, first + saved.get_shape()[0])
        if start < stop:  # this process holds some of these rows
            shard = local_shard(target)[start - rows.start : stop - rows.start]
            shard.copy_(saved[start - first : stop - first])


def checkpoints(out_dir: Path) -> list[Path]:
    """List the step-* folders of a run, oldest first."""
    found = [path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_valid_checkpoint(out_dir: Path) -> Path | None:
    """Return the latest checkpoint (None before the first save); rename corrupted ones."""
    corrupted, valid = {}, checkpoints(out_dir)
    while valid and (problem := files.verify_checksums(valid[-1])):
        corrupted[valid.pop()] = problem
    if not valid:
        problems = [f"{folder.name}/{problem}" for folder, problem in corrupted.items()]
        if problems := problems or sorted(path.name for path in out_dir.glob("step-*")):
            problem = f"no valid checkpoint is left ({'; '.join(problems)})"
            raise UserError(f"{out_dir}: {problem}. Pass another --out_dir")
        return None
    for folder, problem in corrupted.items():
        earlier = len(list(out_dir.glob(f"{folder.name}.damaged*")))
        aside = folder.rename(f"{folder}.damaged" + (f"-{earlier + 1}" if earlier else ""))
        message = f"set aside as {aside.name}, resuming from {valid[-1].name}"
        print(f"{folder}/{problem}; {message}", file=sys.stderr, flush=True)
    return valid[-1]


def prune(out_dir: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the last `keep_last` checkpoints and the one with the best loss."""
    for folder in checkpoints(out_dir)[:-keep_last]:
        if folder.name != f"step-{best_step or 0:06}":
            # renamed first: a partly removed folder must not look valid
            shutil.rmtree(folder.rename(out_dir / f".{folder.name}.old"))
