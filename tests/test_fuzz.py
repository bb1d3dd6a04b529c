"""Readers of a model's files under seeded damage: each reads, or says in one line what is wrong.

FUZZ_TRIES=500 python -m pytest -q -s tests/test_fuzz.py
"""
# ruff: noqa: F811, pytest finds the fixture `place` by its name

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from bad_input import place  # noqa: F401
from conftest import load_script, make_hf_model, save_sentencepiece, save_tokenizer
from fuzzing import attack, mutate_bytes
from test_convert import byte_level_bpe, noisy, save_gguf, save_meta

from lit_llama import LLaMA, LLaMAConfig, Tokenizer, UserError, load_model
from lit_llama.lora import load_lora
from lit_llama.storage.datasets import load_dataset
from lit_llama.storage.files import write_checksums
from lit_llama.storage.run_folder import latest_valid_checkpoint, read_flags


def survives(files: Path | list[Path], read: Callable[[], object]) -> None:
    """Read undamaged files; then damage one of them at a time."""
    files = [files] if isinstance(files, Path) else files
    read()
    contents = {file: file.read_bytes() for file in files}

    def make(random: Random) -> None:
        for file, content in contents.items():
            file.write_bytes(content)
        file = random.choice(files)
        file.write_bytes(mutate_bytes(contents[file], random))

    attack(files[0].name, make, read)


def test_config(place: Path) -> None:
    file = place / "checkpoint/config.json"
    survives(file, lambda: LLaMAConfig.from_checkpoint(file.parent))


@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin"])
def test_weights(tmp_path: Path, layout: str) -> None:
    model = make_hf_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB" if layout == "shards" else "1GB")
    if layout == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    files = [file for file in tmp_path.iterdir() if "model" in file.name]
    survives(files, lambda: load_model(tmp_path))


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("the dog</s> é 🦙", bos=False, special=True)
    tokenizer.decode(ids)


def test_tokenizer_json(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    survives(list(tmp_path.iterdir()), lambda: use_tokenizer(tmp_path))


def test_tokenizer_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    save_sentencepiece(file, ["the quick brown fox jumps over the lazy dog"] * 8, 300)
    added = tmp_path / "added_tokens.json"
    added.write_text(json.dumps({"<pad>": 300, "<|im_end|>": 301}))
    survives([file, added], lambda: use_tokenizer(tmp_path))


def test_lora(place: Path) -> None:
    config = LLaMAConfig.from_checkpoint(place / "checkpoint")

    def read() -> None:
        with torch.device("meta"):
            model = LLaMA(config)
        load_lora(model, place / "lora")

    survives(list((place / "lora").iterdir()), read)


def test_dataset(place: Path) -> None:
    data = place / "data"
    survives(list(data.iterdir()), lambda: load_dataset(data, place / "checkpoint"))


def test_step_folder(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.json").write_text('{"step": 1}')
    (folder / "state-00000-00001.safetensors").write_bytes(bytes(range(256)) * 20)
    write_checksums(folder)
    file = max(folder.glob("*.safetensors"))
    good = file.read_bytes()

    assert latest_valid_checkpoint(tmp_path) == folder
    for number in range(50):
        damaged = mutate_bytes(good, Random(number))
        file.write_bytes(damaged)
        if damaged != good:
            with pytest.raises(UserError, match=rf"step-000001/{file.name}: .*corrupted"):
                latest_valid_checkpoint(tmp_path)


def test_config_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\ntrain:\n  epochs: 3\nlora:\n  targets:\n  - q_proj\n  - v_proj\n")
    survives(file, lambda: read_flags(tmp_path))


@pytest.mark.parametrize("kind", ["gguf", "meta", "lit"])
def test_converters(tmp_path: Path, kind: str) -> None:
    script, out = load_script(f"scripts/convert_{kind}_checkpoint.py"), tmp_path / "out"
    save_tokenizer(tmp_path)
    source, flags = tmp_path / kind, {}
    files = [source]
    if kind == "gguf":
        save_gguf(noisy(vocab_size=300), source, byte_level_bpe(tmp_path))
    elif kind == "meta":
        save_meta(make_hf_model(), source, 1)
        files = list(source.iterdir())
    else:
        torch.save(lit_tensors(), source)
        flags = dict(num_attention_heads=2)

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        script.main(source, out, **flags)

    survives(files, read)


def lit_tensors() -> dict[str, torch.Tensor]:
    layer = {"rms_1.scale": (8,), "attn.c_attn.weight": (24, 8), "attn.c_proj.weight": (8, 8)}
    layer |= {"rms_2.scale": (8,), "mlp.c_fc1.weight": (16, 8), "mlp.c_fc2.weight": (16, 8)}
    layer |= {"mlp.c_proj.weight": (8, 16)}
    shapes = {"transformer.wte.weight": (300, 8), "transformer.ln_f.scale": (8,)}
    shapes |= {f"transformer.h.0.{name}": shape for name, shape in layer.items()}
    shapes["lm_head.weight"] = (300, 8)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_fault_of_a_reader_is_found() -> None:
    def crashes() -> None:
        raise IndexError("beyond")

    with pytest.raises(AssertionError, match="a reader, try 0: IndexError: beyond"):
        attack("a reader", lambda random: None, crashes, 1)

    def refuses() -> None:
        raise UserError("no")

    assert attack("a reader", lambda random: None, refuses, 3) == 0
    assert attack("a reader", lambda random: None, lambda: None, 3) == 3
