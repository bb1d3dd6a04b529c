"""Tables of bad input: how a case is set up and run, and what must hold for each.

A case is `(what breaks it, script, flags, what the line says, exit status)`. `{}` in the flags is
the folder of `place`. Tables: test_bad_input.py (models), test_bad_records.py, test_bad_flags.py.
"""

import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load_script
from safetensors.torch import load_file, save_file

from lit_llama import load_model
from lit_llama.adapter import AdapterConfig, apply_adapter
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.runtime.cli import run
from lit_llama.storage.methods import METHODS, SaveInfo

FINETUNE, BASE, LORA = "finetune/lora.py", "generate/base.py", "generate/lora.py"
ADAPTER, TRAIN_ADAPTER = "generate/adapter.py", "finetune/adapter.py"
JSON, ALPACA = "scripts/prepare_json.py", "scripts/prepare_alpaca.py"
META, LIT, GGUF = (f"scripts/convert_{kind}_checkpoint.py" for kind in ("meta", "lit", "gguf"))
MERGE = "scripts/merge_lora.py"

CHECKPOINT, NEW = "--checkpoint_dir {}/checkpoint", "--out_dir {}/new"
TRAIN = f"{CHECKPOINT} --data_dir {{}}/data --out_dir {{}}/out"
TRAIN += " --train.max_steps 1 --train.batch_size 2"
ASK = f"{CHECKPOINT} --prompt Hi --max_new_tokens 2"
ASK_LORA = "--lora_path {}/lora --prompt Hi --max_new_tokens 2"
ASK_ADAPTER = f"--adapter_path {{}}/lora {ASK}"
PREPARE = f"--source {{}}/records.json {CHECKPOINT} --data_dir {{}}/new --val_size 2"
MERGE_LORA = f"--lora_path {{}}/lora {NEW}"

Breaks = Callable[[Path], object]


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, records_file: Path) -> Path:
    """A folder of `checkpoint`, `data`, `lora` and `records.json` that fit together."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(records_file, tmp_path / "records.json")
    model, config = load_model(tiny_checkpoint), LoRAConfig()
    apply_lora(model, config)
    base = str(tmp_path / "checkpoint")
    save_lora(dict(model.named_parameters()), tmp_path / "lora", config, base, "alpaca")
    return tmp_path


def adapter(place: Path) -> None:
    """Replace the LoRA by a LLaMA-Adapter."""
    model, config = load_model(place / "checkpoint"), AdapterConfig(start_layer=1)
    apply_adapter(model, config)
    info = SaveInfo(model, str(place / "checkpoint"), "alpaca")
    METHODS["llama_adapter"].save(place / "lora", model.named_parameters(), config, info)


def write(name: str, content: str | bytes) -> Breaks:
    content = content.encode() if isinstance(content, str) else content
    return lambda place: (place / name).write_bytes(content)


def edit(name: str, **changes: object) -> Breaks:
    """Change fields of a JSON file."""

    def breaks(place: Path) -> None:
        value = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps(value | changes))

    return breaks


def cut_off(name: str) -> Breaks:
    return lambda place: os.truncate(place / name, (place / name).stat().st_size // 2)


def gone(name: str) -> Breaks:
    return lambda place: (place / name).unlink()


def tensors(name: str, change: Callable[[dict], object]) -> Breaks:
    """Change the tensors of a safetensors file."""

    def breaks(place: Path) -> None:
        found = load_file(place / name)
        change(found)
        save_file(found, place / name)

    return breaks


def no_space(place: Path) -> None:
    """Limit files to 4 KiB, which a writer sees as a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def contents(place: Path) -> dict[str, object]:
    """All files with their bytes, and folders."""
    paths = sorted(place.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else "other" for path in paths}


def assert_refused(
    place: Path, case: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Run a case: one line as the case says, its exit status, and nothing on disk has changed."""
    breaks, script, flags, message, status = (*case, 1)[:5]
    main = load_script(script).main
    words = flags.split() if isinstance(flags, str) else flags
    monkeypatch.setattr(sys, "argv", [script, *(word.replace("{}", str(place)) for word in words)])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if breaks not in (None, no_space):
        breaks(place)
    before = contents(place)
    capsys.readouterr()
    try:
        if breaks is no_space:
            no_space(place)
        with pytest.raises(SystemExit) as ended:
            run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    printed = capsys.readouterr().err.splitlines()
    printed = [line for line in printed if not line.startswith("precision ")]  # what was chosen
    lines = [line for line in printed if not line.startswith(("tokenizing", "converting"))]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0].removeprefix("error: ")), lines[0]
    assert lines[0].startswith("error: ")
    assert ended.value.code == status
    assert contents(place) == before
