"""Model folders in every layout of the hub; atomic writes; peak memory of loading."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf_model, save_checkpoint_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_llama import UserError, load_model
from lit_llama.storage.files import atomic_write
from lit_llama.storage.model_folder import save_model_folder, tokenizer_files

INPUT_IDS = torch.arange(30)[None]


@torch.no_grad()
def assert_same_logits(hf_model, folder: Path) -> None:
    expected = hf_model(INPUT_IDS).logits
    torch.testing.assert_close(
        load_model(folder, dtype=torch.float32)(INPUT_IDS), expected, atol=1e-4, rtol=0
    )  # fp32


def save_bin(model, folder: Path, shards: int) -> None:
    """As transformers before 5 wrote it."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    names = sorted(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in names[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(str({"metadata": {}, "weight_map": weight_map}).replace("'", '"'))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_every_layout_of_the_hub_loads(tmp_path: Path, layout: str, tied: bool) -> None:
    hf_model = make_hf_model(tie_word_embeddings=tied)
    if layout == "safetensors":
        hf_model.save_pretrained(tmp_path)
    elif layout == "sharded safetensors":
        hf_model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    else:
        save_bin(hf_model, tmp_path, 1 if layout == "bin" else 3)
    assert_same_logits(hf_model, tmp_path)


def test_rotary_buffers_of_old_exports_are_left_out(tmp_path: Path) -> None:
    hf_model = make_hf_model()
    save_bin(hf_model, tmp_path, 1)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_logits(hf_model, tmp_path)


def test_weights_are_frozen_and_rounded_to_the_dtype(tmp_path: Path) -> None:
    hf_model = make_hf_model()
    hf_model.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not model.training
    expected = {
        name.removeprefix("model."): value.bfloat16()
        for name, value in hf_model.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("max_bytes", [10**9, 60_000], ids=["one file", "shards"])
def test_saved_folder_loads_in_transformers_and_here(
    tmp_path: Path, monkeypatch, max_bytes: int
) -> None:
    monkeypatch.setattr("lit_llama.storage.files.MAX_FILE_BYTES", max_bytes)
    hf_model = save_checkpoint_folder(tmp_path / "from", num_key_value_heads=2)
    model = load_model(tmp_path / "from", dtype=torch.float32)
    save_model_folder(
        tmp_path / "to", model.config, model.named_parameters(), tokenizer_files(tmp_path / "from")
    )
    files = list((tmp_path / "to").glob("*.safetensors"))
    assert (len(files) > 1) == (max_bytes < 10**9)
    assert all(
        sum(tensor.nbytes for tensor in load_file(file).values()) <= max_bytes for file in files
    )
    assert_same_logits(hf_model, tmp_path / "to")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32)
    assert_same_logits(theirs, tmp_path / "from")
    assert (tmp_path / "to/tokenizer.json").read_bytes() == (
        tmp_path / "from/tokenizer.json"
    ).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in files} == {
        (tmp_path / "to/config.json").stat().st_mode & 0o777
    }


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "old").write_text("old")
    file.write_text("old")
    for path in (folder, file):
        with pytest.raises(RuntimeError), atomic_write(path) as temporary:  # noqa: PT012
            if path == folder:
                temporary.mkdir()
                (temporary / "new").write_text("half")
            else:
                temporary.write_text("half")
            raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_replacing_puts_the_whole_new_one_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        with atomic_write(folder) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
            assert not (folder / name).exists()
        assert [path.name for path in folder.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "mine") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes"]


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin"])
@pytest.mark.parametrize("what", ["cut off", "missing", "empty"])
def test_incomplete_weights_are_one_line(tmp_path: Path, layout: str, what: str) -> None:
    hf_model = make_hf_model()
    if layout == "bin":
        save_bin(hf_model, tmp_path, 1)
    else:
        size = "40KB" if layout == "sharded safetensors" else "1GB"
        hf_model.save_pretrained(tmp_path, max_shard_size=size)
    file = sorted([*tmp_path.glob("model*.safetensors"), *tmp_path.glob("*.bin")])[-1]
    if what == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -100 if what == "cut off" else 0])
    with pytest.raises(UserError) as raised:
        load_model(tmp_path)
    message = str(raised.value)
    if what == "missing" and layout != "sharded safetensors":
        assert "no model.safetensors and no pytorch_model.bin there. Download" in message
    else:
        assert message.startswith(f"{file}: ")
        assert re.search("truncated or corrupted .* Download it again|missing, truncated", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(intermediate_size=96),
            "mlp.gate_proj.weight has shape (64, 32), config.json requires (96, 32)",
        ),
        (
            dict(num_hidden_layers=3),
            "weights and config.json do not match in ['layers.2.input_layernorm",
        ),
        (
            dict(num_hidden_layers=1),
            "weights and config.json do not match in ['layers.1.input_layernorm",
        ),
    ],
    ids=["other sizes", "lacking", "surplus"],
)
def test_weights_of_another_model_are_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    make_hf_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    save_bin(make_hf_model(), tmp_path, 1)
    torch.save({"x": Path.unlink}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: refused, .* \(it could run code"):
        load_model(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"up_proj.weight is torch.float8_e4m3fn; quantized folders"
    ):
        load_model(tmp_path)


def test_a_folder_that_holds_something_is_not_overwritten(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    model = load_model(tiny_checkpoint)
    with pytest.raises(UserError, match="exists already"):
        save_model_folder(tmp_path, model.config, model.named_parameters(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


PEAK = """
import os, resource, sys, torch
from lit_llama import load_model
torch.zeros(8, 8).to(torch.bfloat16)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for dtype in (torch.float32, torch.bfloat16):
    if os.fork() == 0:
        before = peak()
        model = load_model(sys.argv[1], dtype=dtype)
        print((peak() - before) / sum(p.nbytes for p in model.parameters()), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_loading_as_stored_or_rounded_takes_less_than_1_2_times_the_models_memory(
    tmp_path: Path, layout: str
) -> None:
    sizes = dict(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8
    )
    hf_model = make_hf_model(**sizes)  # 400 MB
    hf_model.save_pretrained(tmp_path) if layout == "safetensors" else save_bin(
        hf_model, tmp_path, 1
    )
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True
    )
    as_stored, rounded = map(float, done.stdout.split())
    assert 0 < as_stored < 1.2
    assert 0.5 < rounded < 1.2


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    """As in transformers."""
    save_bin(make_hf_model(seed=1), tmp_path, 1)
    make_hf_model(seed=2).save_pretrained(tmp_path)
    assert (tmp_path / "pytorch_model.bin").is_file()
    assert_same_logits(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tmp_path
    )


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    make_hf_model().save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match=r"model.safetensors: a pointer of Git LFS.*git lfs pull"):
        load_model(tmp_path)
