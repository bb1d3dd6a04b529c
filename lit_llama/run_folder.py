"""What a run leaves on disk beside its result: `config.yaml`, `metrics.csv`, and `step-*` folders to go on from."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from torch import Tensor, nn

from lit_llama.checksums import find_damage
from lit_llama.config import read_json
from lit_llama.distributed import local_part, local_rows
from lit_llama.errors import UserError
from lit_llama.files import (
    MAX_JSON_BYTES,
    check_new_folder,
    cut_into_files,
    open_safetensors,
    read_text,
    replacing,
    save_tensors,
)

METRICS = "step,samples,tokens,loss,val_loss,learning_rate,grad_norm,tokens_per_second,peak_memory_bytes"
FREE_FLAGS = re.compile(
    r"checkpoint_dir|data_dir|out_dir|devices|num_nodes|resume|config|logger|train\.(epochs|max_steps|micro_batch_tokens|"
    r"learning_rate|schedule|warmup_.*|weight_decay|beta.|max_grad_norm|eval_.*|save_.*|keep_last|log_interval|"
    r"activation_checkpointing|fast_paths)"
)
"""What may change when a run goes on. Others, the seed or a LoRA's rank, would make its state meaningless."""


@dataclass
class Progress:
    """How far a run has come: with it and the seed follow learning rate, dropout and which samples come next."""

    step: int = 0
    samples: int = 0
    first_val_loss: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    data_sha256: str = ""  # of the prepared set's meta.json


def check_flags(out_dir: Path, flags: str) -> None:
    """Raise UserError where a run would go on with flags that do not fit the state in `out_dir`."""
    old, new = flatten(read_flags(out_dir / "config.yaml")), flatten(yaml.safe_load(flags) or {})
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name] and not FREE_FLAGS.fullmatch(name):
            changed = f"--{name} was {old[name]!r} when this run began, now it is {new[name]!r}"
            raise UserError(f"{out_dir}: {changed}. Go on with the former, or start anew in another --out_dir")


def read_flags(file: Path) -> dict[str, Any]:
    """The flags in the `config.yaml` of a run. Raises UserError where it is damaged."""
    try:
        return dict(yaml.safe_load(read_text(file, MAX_JSON_BYTES)) or {})
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({error}). Start anew in another --out_dir") from None


def flatten(flags: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 5}} -> {"train.epochs": 5}."""
    flat = {}
    for name, value in flags.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def data_sha256(meta: dict[str, Any]) -> str:
    """Of a prepared set's meta.json, what it was made from and how; sets with the same one hold the same samples."""
    return hashlib.sha256(f"{json.dumps(meta, indent=2)}\n".encode()).hexdigest()


@contextmanager
def locked(out_dir: Path, shared: bool = False) -> Iterator[None]:
    """Inside the block no other process has `out_dir` locked, but for shared locks beside a shared one.

    The lock lies on the folder itself and ends with this process, however that ends. A file system that has no locks
    is used without. Raises UserError where another process holds one.
    """
    descriptor = os.open(out_dir, os.O_RDONLY)  # not inherited by processes that this one starts
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "Wait for its end, stop it, or give another --out_dir"
            raise UserError(f"{out_dir}: another run is using this folder. {hint}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def check_unused(out_dir: Path) -> None:
    """Raise UserError unless `out_dir` is absent or empty: a run may begin there."""
    check_new_folder(out_dir, "holds another run. Go on with it: --resume; or give another --out_dir")


def save_state(
    folder: Path, fabric: Fabric, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write what this process holds of parameters, optimizer and random states, and how far the run is, into `folder`.

    Each process writes `state-<rank>-<number>.safetensors`; a tensor's name ends in `@` and its first row in the whole
    tensor. Process 0 adds `state.json`.
    """

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained.items():
            first = local_rows(parameter).start
            yield f"{name}@{first}", local_part(parameter.detach()).cpu()
            for key, value in optimizer.state[parameter].items():
                # a sharded parameter's moments are sharded alike; the step count is one number everywhere
                yield f"{name}/{key}@{first if value.dim() else 0}", local_part(value).cpu()
        yield f"rng/cpu/{fabric.global_rank}@0", torch.get_rng_state()
        if fabric.device.type == "cuda":
            yield f"rng/cuda/{fabric.global_rank}@0", torch.cuda.get_rng_state(fabric.device)

    for number, group in enumerate(cut_into_files(parts())):
        group = {name: tensor.contiguous() for name, tensor in group.items() if tensor.numel()}
        save_tensors(group, folder / f"state-{fabric.global_rank:05}-{number:05}.safetensors")
        del group  # before the next one is gathered
    if fabric.is_global_zero:
        groups = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        shapes = {name: list(parameter.shape) for name, parameter in trained.items()}
        state = asdict(progress) | {"processes": fabric.world_size, "optimizer": groups, "shapes": shapes}
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")


@torch.no_grad()
def load_state(
    folder: Path, fabric: Fabric, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Progress:
    """Read what `save_state` wrote, on whatever number of processes. Raises UserError: damaged, or another model's."""

    def damaged(what: str) -> UserError:
        return UserError(f"{folder}: damaged, {what}. Remove this folder and resume again")

    state = read_json(folder / "state.json")
    if state.get("shapes") != {name: list(parameter.shape) for name, parameter in trained.items()}:
        raise UserError(f"{folder}: is of another model or other method flags. Resume with those of config.yaml")
    files: dict[str, list[tuple[int, Path]]] = {}  # name -> its pieces: first row, file
    shapes: dict[str, list[tuple[int, list[int]]]] = {}  # name -> its pieces: first row, shape
    for file in sorted(folder.glob("state-*.safetensors")):
        with open_safetensors(file) as handle:
            for stored in handle.keys():  # noqa: SIM118
                name, _, first = stored.rpartition("@")
                if not re.fullmatch(r"[0-9]{1,15}", first):
                    raise damaged(f"{file.name} holds {stored}")
                files.setdefault(name, []).append((int(first), file))
                shapes.setdefault(name, []).append((int(first), handle.get_slice(stored).get_shape()))

    def read(name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or those rows of it, put together from their pieces."""
        pieces = []
        for first, file in sorted(files.get(name, [])):
            with open_safetensors(file) as handle:
                piece = handle.get_slice(f"{name}@{first}")
                if rows is None:
                    return handle.get_tensor(f"{name}@{first}")
                begin, end = max(rows.start - first, 0), min(rows.stop - first, piece.get_shape()[0])
                if begin < end:
                    pieces.append(piece[begin:end])
        return torch.cat(pieces)

    keys = {name.partition("/")[2] for name in files if not name.startswith("rng/")} - {""}
    for name, parameter in trained.items():  # all processes see the same hole, whoever's rows they are
        for stored in (name, *(f"{name}/{key}" for key in keys if key != "step")):
            rows = 0
            for first, shape in sorted(shapes.get(stored, [])):
                if first != rows or shape[1:] != list(parameter.shape[1:]) or not shape:
                    raise damaged(f"{stored} has other rows")
                rows += shape[0]
            if rows != len(parameter):
                raise damaged(f"{stored} is not all there")
        steps = shapes.get(f"{name}/step", [])  # each process has written it
        if "step" in keys and (not steps or any(piece != (0, []) for piece in steps)):
            raise damaged(f"{name}/step is not all there")
    progress = {name: state.get(name) for name in Progress.__annotations__}
    for name, kind in Progress.__annotations__.items():
        if not isinstance(progress[name], kind) or (kind is int and progress[name] < 0):
            raise damaged(f"state.json has {progress[name]!r} for {name}")
    for name, parameter in trained.items():
        rows, state_of = local_rows(parameter), optimizer.state[parameter]
        state_of |= {key: torch.empty_like(parameter) for key in keys if key != "step"}
        for stored, value in ((name, parameter), *((f"{name}/{key}", value) for key, value in state_of.items())):
            if rows.start < rows.stop:  # else this process has no row of a small parameter
                local_part(value).copy_(read(stored, rows))
        if "step" in keys:
            state_of["step"] = read(f"{name}/step").to(fabric.device)
    if (own := f"rng/cpu/{fabric.global_rank}") in files:
        try:
            torch.set_rng_state(read(own))
        except (RuntimeError, TypeError):  # which is what torch says of a state that is none
            raise damaged(f"{own} is no random state") from None
    if fabric.device.type == "cuda" and (own := f"rng/cuda/{fabric.global_rank}") in files:
        torch.cuda.set_rng_state(read(own), fabric.device)
    return Progress(**progress)


def checkpoints(out_dir: Path) -> list[Path]:
    """Complete `step-*` folders of a run, oldest first (a folder has its name only once it is complete)."""
    found = (path for path in out_dir.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest_whole(out_dir: Path) -> Path | None:
    """The newest checkpoint whose checksums are right, None where a run was stopped before its first.

    Newer ones get another name, and a line on stderr each. Raises UserError where there are checkpoints and none is
    whole.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(checkpoints(out_dir)):
        if (damage := find_damage(folder)) is None:
            break
        damaged.append((folder, damage))
    else:
        earlier = sorted(out_dir.glob("step-*.damaged*"))
        if damaged or earlier:
            what = "; ".join([f"{path.name}/{why}" for path, why in damaged] or [path.name for path in earlier])
            raise UserError(f"{out_dir}: no whole checkpoint is left ({what}). Start anew in another --out_dir")
        return None
    for path, why in damaged:
        names = (path.with_name(f"{path.name}.damaged" + (f"-{n}" if n > 1 else "")) for n in count(1))
        aside = path.rename(next(name for name in names if not name.exists()))
        print(f"{path}/{why}; set aside as {aside.name}, going on from {folder.name}", file=sys.stderr, flush=True)
    return folder


def prune(out_dir: Path, keep_last: int, best_step: int | None) -> None:
    """Remove the oldest `step-*` folders over `keep_last`, but not the best one by validation loss."""
    for old in checkpoints(out_dir)[:-keep_last]:
        if old.name != f"step-{best_step or 0:06}":
            # renamed first: a folder that is half removed must not look whole
            trash = old.rename(old.with_name(f".{old.name}.old"))
            shutil.rmtree(trash)


def remove_leftovers(out_dir: Path) -> None:
    """Remove what a killed process has left half-written or half-removed."""
    for leftover in out_dir.glob(".*"):
        if re.fullmatch(r"\..*\.(tmp|old)(-\d+)?", leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def start_metrics(file: Path, first_step: int) -> None:
    """A `metrics.csv` with its header and, where a run goes on after `first_step`, the rows up to that."""
    old = read_text(file).splitlines() if first_step and file.is_file() else []
    whole = (row for row in old[1:] if row.count(",") == METRICS.count(",") and row.partition(",")[0].isdecimal())
    rows = [row for row in whole if int(row.partition(",")[0]) <= first_step]
    with replacing(file) as temporary:
        temporary.write_text("\n".join([METRICS, *rows, ""]), "utf-8")


def add_metrics(file: Path, *values: float | None) -> None:
    """Append a step's row, in the order of `METRICS`."""
    row = ("" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value) for value in values)
    with file.open("a", encoding="utf-8") as out:
        out.write(",".join(row) + "\n")
