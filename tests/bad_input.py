"""The tables of bad input: how a case is set up and run, and what must hold for each.

A case is `(what breaks it, the script, its flags, what the line says, the exit status)`; `{}` in the flags is the
folder that `place` makes. Tables are in test_bad_input.py (models) and test_bad_calls.py (records, flags, folders).
"""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import load_script, make_hf_model
from safetensors.torch import load_file, save_file

from lit_llama import cli, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter, save_adapter
from lit_llama.lora import LoRAConfig, apply_lora, save_lora

MAX_SECONDS, MAX_BYTES = 10, 10**9

FINETUNE, BASE, LORA = "finetune/lora.py", "generate/base.py", "generate/lora.py"
JSON, ALPACA = "scripts/prepare_json.py", "scripts/prepare_alpaca.py"
META, LIT, GGUF = (f"scripts/convert_{kind}_checkpoint.py" for kind in ("meta", "lit", "gguf"))
MERGE = "scripts/merge_lora.py"
ADAPTER, TRAIN_ADAPTER = "generate/adapter.py", "finetune/adapter.py"


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, records_file: Path) -> Path:
    """`checkpoint`, `data`, `lora` and `records.json` that fit together, to be broken."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copy(records_file, tmp_path / "records.json")
    model, config = load_model(tiny_checkpoint), LoRAConfig()
    apply_lora(model, config)
    save_lora(
        dict(model.named_parameters()),
        tmp_path / "lora",
        config,
        base_model=str(tmp_path / "checkpoint"),
        template="alpaca",
    )
    return tmp_path


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def change_weights(file: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


class RunsCode:
    def __reduce__(self):
        return (print, ("code of a pickle has run",))


def pickled_code(place: Path) -> None:
    (place / "meta").mkdir()
    (place / "meta/params.json").write_text("{}")
    torch.save({"weight": RunsCode()}, place / "meta/consolidated.00.pth", pickle_module=pickle)


def shrink_embedding(place: Path) -> None:
    make_hf_model(vocab_size=200).save_pretrained(place / "checkpoint")


def other_tokenizer(place: Path) -> None:
    file = place / "checkpoint/tokenizer.json"
    file.write_text(file.read_text() + " ")


def other_model(place: Path) -> None:
    make_hf_model(hidden_size=64).save_pretrained(place / "checkpoint")


def adapter(place: Path) -> None:
    """A LLaMA-Adapter in the LoRA's place."""
    model, config = load_model(place / "checkpoint"), AdapterConfig(start_layer=1)
    apply_adapter(model, config)
    save_adapter(dict(model.named_parameters()), place / "lora", config, model, str(place / "checkpoint"), "alpaca")


def no_space(place: Path) -> None:
    """A file may not grow over 4 KiB, which the writer sees as it sees a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def conversation(place: Path) -> None:
    turns = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    (place / "records.json").write_text(json.dumps([{"messages": turns}] * 3))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_text(text)


CHECKPOINT, WEIGHTS = "--checkpoint_dir {}/checkpoint", "checkpoint/model.safetensors"
TRAIN = f"{CHECKPOINT} --data_dir {{}}/data --out_dir {{}}/out --train.max_steps 1 --train.batch_size 2"
ASK = f"{CHECKPOINT} --prompt Hi --max_new_tokens 2"
PREPARE = f"--source {{}}/records.json {CHECKPOINT} --data_dir {{}}/new --val_size 2"
ASK_ADAPTER = "--adapter_path {}/lora --checkpoint_dir {}/checkpoint --prompt Hi --max_new_tokens 2"
ASK_LORA = "--lora_path {}/lora --prompt Hi --max_new_tokens 2"


def contents(place: Path) -> dict[str, object]:
    """All that is there: files with their bytes, links with where they lead, folders."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(place):
        for path in (Path(folder, name) for name in (*folders, *files)):
            name = str(path.relative_to(place))
            if path.is_symlink():
                found[name] = os.readlink(path)
            elif path.is_file():
                found[name] = path.read_bytes()
            else:
                found[name] = "a folder" if path.is_dir() else "something else"
    return found


def peak_bytes() -> int:
    """Most memory that this process has held since `reset_peak`."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak() -> int:
    """Let the peak begin anew; returns what is held now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def too_long(number: int, frame: object) -> None:
    raise AssertionError(f"still not ended after {MAX_SECONDS} s")


def assert_refused(place: Path, case: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """Run a case: one line that is as the case says, in time, within memory, and nothing on disk has changed."""
    breaks, script, flags, message, status = (*case, 1)[:5]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    main = load_script(script).main
    words = [word.replace("{}", str(place)) for word in (flags.split() if isinstance(flags, str) else flags)]
    monkeypatch.setattr(sys, "argv", [script, *words])
    if breaks is not None and breaks is not no_space:
        breaks(place)
    before = contents(place)
    capsys.readouterr()
    held = reset_peak()
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(MAX_SECONDS)
    try:
        if breaks is no_space:
            no_space(place)
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert peak_bytes() - held < MAX_BYTES
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("tokenizing")]
    assert ended.value.code == status
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1000
    assert re.search(message, lines[0]), lines[0]
    assert "code of a pickle has run" not in printed.out
    assert contents(place) == before
    return lines[0]
