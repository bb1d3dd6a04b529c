"""Mistakes with models, LoRAs and runs: one line, a non-zero status, nothing on disk is touched."""
# ruff: noqa: F811, pytest finds the fixture `place` by its name

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input import (
    ADAPTER,
    ASK,
    ASK_ADAPTER,
    ASK_LORA,
    BASE,
    FINETUNE,
    GGUF,
    JSON,
    LIT,
    LORA,
    MERGE,
    MERGE_LORA,
    META,
    NEW,
    PREPARE,
    TRAIN,
    TRAIN_ADAPTER,
    Breaks,
    adapter,
    assert_refused,
    cut_off,
    edit,
    gone,
    no_space,
    place,  # noqa: F401
    tensors,
    write,
)
from conftest import make_hf_model, save_sentencepiece
from safetensors.torch import load_file
from test_convert import byte_level_bpe, noisy, save_gguf, save_meta

from lit_llama import LLaMAConfig, Tokenizer, load_model

CONFIG, WEIGHTS = "checkpoint/config.json", "checkpoint/model.safetensors"
TOKENIZER, INDEX = "checkpoint/tokenizer.json", "checkpoint/model.safetensors.index.json"
BIN = "checkpoint/pytorch_model.bin"
LORA_CONFIG, LORA_WEIGHTS = "lora/adapter_config.json", "lora/adapter_model.safetensors"
NORM = "model.norm.weight"


def norm(tensor: torch.Tensor) -> Breaks:
    return tensors(WEIGHTS, lambda found: found.update({NORM: tensor}))


def other_model(**settings: int) -> Breaks:
    settings = {"num_key_value_heads": 2} | settings
    return lambda place: make_hf_model(**settings).save_pretrained(place / "checkpoint")


def then(*steps: Breaks) -> Breaks:
    def breaks(place: Path) -> None:
        for step in steps:
            step(place)

    return breaks


def sharded(place: Path) -> None:
    (place / WEIGHTS).unlink()
    model = make_hf_model(num_key_value_heads=2)
    model.save_pretrained(place / "checkpoint", max_shard_size="40KB")


def without_a_shard(place: Path) -> None:
    sharded(place)
    max((place / "checkpoint").glob("model-*.safetensors")).unlink()


def pickled(place: Path) -> None:
    torch.save(load_file(place / WEIGHTS), place / BIN)
    (place / WEIGHTS).unlink()


def sentencepiece(place: Path) -> None:
    (place / TOKENIZER).unlink()
    save_sentencepiece(place / "checkpoint/tokenizer.model", ["the quick brown fox"] * 8, 280)


def meta(change: Callable[[dict], object]) -> Breaks:
    def breaks(place: Path) -> None:
        save_meta(make_hf_model(), place / "meta", 1)
        shutil.copy(place / TOKENIZER, place / "meta")
        file = place / "meta/consolidated.00.pth"
        found = torch.load(file)
        change(found)
        torch.save(found, file)

    return breaks


def gguf(place: Path) -> None:
    (place / "bpe").mkdir()
    save_gguf(noisy(vocab_size=300), place / "a.gguf", byte_level_bpe(place / "bpe"))


def gguf_of_phi(place: Path) -> None:
    gguf(place)
    file = place / "a.gguf"
    file.write_bytes(file.read_bytes().replace(b"llama", b"gemma"))


# what is wrong: (what breaks it, script, flags, what the line says)
MODELS = {
    "no model folder": (None, BASE, "--checkpoint_dir {}/none --prompt Hi", r"none.*download.py"),
    "a file for a model": (
        None,
        BASE,
        f"{ASK} --checkpoint_dir {{}}/records.json",
        r"records.json",
    ),
    "no config": (gone(CONFIG), BASE, ASK, r"checkpoint: no config.json.*download.py"),
    "empty config": (write(CONFIG, ""), BASE, ASK, r"config.json: cannot be read"),
    "config cut off": (cut_off(CONFIG), FINETUNE, TRAIN, r"config.json: cannot be read"),
    "a field of config.json is missing": (
        edit(CONFIG, vocab_size=None),
        BASE,
        ASK,
        r"'vocab_size'",
    ),
    "another architecture": (
        edit(CONFIG, model_type="gemma2"),
        *(BASE, ASK, r"config.json: model_type 'gemma2' is not supported"),
    ),
    "another kind of RoPE": (
        edit(CONFIG, rope_parameters={"rope_type": "yarn"}),
        *(BASE, ASK, r"config.json: .*yarn.* is not supported"),
    ),
    "no weights": (gone(WEIGHTS), BASE, ASK, r"checkpoint: no model.safetensors.*download.py"),
    "weights cut off": (cut_off(WEIGHTS), BASE, ASK, r"model.safetensors: .*truncated"),
    "empty weights": (write(WEIGHTS, ""), BASE, ASK, r"model.safetensors: .*truncated"),
    "a page of HTML for weights": (
        write(WEIGHTS, "<html>" * 99),
        BASE,
        ASK,
        r"model.safetensors: ",
    ),
    "a pointer of Git LFS for weights": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        *(FINETUNE, TRAIN, r"model.safetensors: "),
    ),
    "wrong shape": (norm(torch.ones(3)), BASE, ASK, r"norm.weight has shape \(3,\).*\(32,\)"),
    "missing tensor": (tensors(WEIGHTS, lambda t: t.pop(NORM)), BASE, ASK, r"\['norm.weight'\]"),
    "surplus tensor": (
        tensors(WEIGHTS, lambda t: t.update({"vision.weight": torch.ones(3)})),
        *(BASE, ASK, r"checkpoint: .*vision.weight"),
    ),
    "quantized to int8": (norm(torch.ones(32, dtype=torch.int8)), BASE, ASK, r"norm.weight.*int8"),
    "quantized to float8": (norm(torch.ones(32).to(torch.float8_e4m3fn)), BASE, ASK, r"float8"),
    "NaN in the weights": (norm(torch.full((32,), torch.nan)), BASE, ASK, r"logits.*NaN"),
    "a shard is missing": (without_a_shard, BASE, ASK, r"model-0000\d-of-0000\d.safetensors"),
    "index cut off": (then(sharded, cut_off(INDEX)), BASE, ASK, r"index.json: cannot be read"),
    "index of another program": (then(sharded, write(INDEX, "{}")), BASE, ASK, r"checkpoint"),
    ".bin cut off": (then(pickled, cut_off(BIN)), BASE, ASK, r"model.bin: "),
    "empty .bin": (then(pickled, write(BIN, "")), BASE, ASK, r"model.bin: "),
    "no tokenizer": (gone(TOKENIZER), FINETUNE, TRAIN, r"checkpoint.*tokenizer"),
    "another JSON for a tokenizer": (write(TOKENIZER, "{}"), BASE, ASK, r"tokenizer.json: .*not a"),
    "tokenizer.json cut off": (cut_off(TOKENIZER), BASE, ASK, r"tokenizer.json: .*not a tokenizer"),
    "tokenizer.model cut off": (
        then(sentencepiece, cut_off("checkpoint/tokenizer.model")),
        *(BASE, ASK, r"tokenizer.model: .*not a tokenizer"),
    ),
    "tokenizer_config.json cut off": (
        cut_off("checkpoint/tokenizer_config.json"),
        *(BASE, ASK, r"tokenizer_config.json: cannot be read"),
    ),
    "tokenizer of a larger model": (
        other_model(vocab_size=200),
        *(FINETUNE, TRAIN, r"data: has token ids >= 200"),
    ),
    "prompt too long": (None, BASE, f"{ASK}0000", r"the prompt has \d+ tokens.* holds 512"),
}
CONVERTERS = {
    "no .pth": (write("params.json", "{}"), META, f"--source {{}} {NEW}", r": no consolidated"),
    "no folder of .pth": (None, META, f"--source {{}}/none {NEW}", r"none/params.json: "),
    ".pth cut off": (
        then(meta(len), cut_off("meta/consolidated.00.pth")),
        *(META, f"--source {{}}/meta {NEW}", r"consolidated.00.pth: "),
    ),
    ".pth of another size": (
        meta(lambda t: t.update({"layers.1.attention.wq.weight": torch.ones(30, 32)})),
        *(META, f"--source {{}}/meta {NEW}", r"meta: wrong shape behind layers.0.post_att"),
    ),
    ".pth without a tensor": (
        meta(lambda t: t.pop("layers.0.attention.wk.weight")),
        *(META, f"--source {{}}/meta {NEW}", r"meta: no tensor layers.0.attention.wk.weight"),
    ),
    "Llama 3's file of tiktoken ranks": (
        then(
            meta(len), gone("meta/tokenizer.json"), write("meta/tokenizer.model", "IQ== 0\nIg== 1")
        ),
        *(META, f"--source {{}}/meta {NEW}", r"tokenizer.model: .*tiktoken.*tokenizer.json"),
    ),
    ".pth of another program": (
        lambda p: torch.save({"a": torch.ones(2)}, p / "lit.pth"),
        *(LIT, f"--source {{}}/lit.pth {NEW}", r"lit.pth: has no transformer.wte.weight"),
    ),
    "text for a .pth": (write("lit.pth", "no"), LIT, f"--source {{}}/lit.pth {NEW}", r"lit.pth: "),
    "text for a GGUF": (write("a.gguf", "no"), GGUF, f"--source {{}}/a.gguf {NEW}", r"a.gguf: "),
    "no GGUF": (None, GGUF, f"--source {{}}/a.gguf {NEW}", r"a.gguf: "),
    "GGUF cut off": (
        then(gguf, cut_off("a.gguf")),
        GGUF,
        f"--source {{}}/a.gguf {NEW}",
        r"a.gguf: ",
    ),
    "GGUF of another architecture": (
        gguf_of_phi,
        *(GGUF, f"--source {{}}/a.gguf {NEW}", r"a.gguf: .*gemma.* not supported"),
    ),
}
METHODS = {
    "LoRA of another model": (
        other_model(hidden_size=64),
        LORA,
        ASK_LORA,
        r"lora: .*shapes.*another",
    ),
    "LoRA of a deeper model": (
        other_model(num_hidden_layers=1),
        *(MERGE, MERGE_LORA, r"lora: .*layers.1.*another model"),
    ),
    "no LoRA": (None, LORA, ASK_LORA.replace("/lora", "/none"), r"none: no adapter_config.json"),
    "settings cut off": (cut_off(LORA_CONFIG), LORA, ASK_LORA, r"adapter_config.json: cannot be"),
    "weights of the LoRA cut off": (
        cut_off(LORA_WEIGHTS),
        LORA,
        ASK_LORA,
        r"adapter_model.*truncated",
    ),
    "no weights of the LoRA": (gone(LORA_WEIGHTS), MERGE, MERGE_LORA, r"adapter_model.*missing"),
    "another method of PEFT": (
        edit(LORA_CONFIG, peft_type="IA3"),
        LORA,
        ASK_LORA,
        r"config.*'IA3'",
    ),
    "trained parameters": (
        edit(LORA_CONFIG, target_parameters=["o_proj.weight"]),
        LORA,
        ASK_LORA,
        r"config.json: target_parameters is \['o_proj.weight'\]",
    ),
    "the base is gone": (
        edit(LORA_CONFIG, base_model_name_or_path="/gone"),
        *(LORA, ASK_LORA, r"lora: .*'/gone'.*--checkpoint_dir"),
    ),
    "no adapter": (
        None,
        ADAPTER,
        ASK_ADAPTER.replace("/lora", "/none"),
        r"none: no adapter_config",
    ),
    "adapter cut off": (
        then(adapter, cut_off(LORA_WEIGHTS)),
        ADAPTER,
        ASK_ADAPTER,
        r"adapter_model",
    ),
    "adapter of another model": (
        then(adapter, other_model(hidden_size=64)),
        *(ADAPTER, ASK_ADAPTER, r"lora: .*another model"),
    ),
    "adapter of a deeper model": (
        then(adapter, other_model(num_hidden_layers=1)),
        *(ADAPTER, ASK_ADAPTER, r"start_layer 1: the model has 1"),
        2,
    ),
    "version 2 of version 1": (
        then(adapter, edit(LORA_CONFIG, method="llama_adapter_v2")),
        *(ADAPTER, ASK_ADAPTER, r"lora: .*adapter_scale|norm.weight"),
    ),
    "start_layer beyond the model": (
        None,
        *(
            TRAIN_ADAPTER,
            f"{TRAIN} --adapter.start_layer 9",
            r"--adapter.start_layer 9: .*2 layers",
        ),
        2,
    ),
    "an unknown target": (None, FINETUNE, f"{TRAIN} --lora.targets c_attn", r"'c_attn'.*q_proj", 2),
    "full result that is missing": (
        None,
        "generate/full.py",
        ASK.replace("/checkpoint", "/o"),
        r"/o",
    ),
    "merge with an adapter": (
        lambda p: (p / "lora/adapter").mkdir(),
        MERGE,
        MERGE_LORA,
        r"adapter",
    ),
    "merge into something": (
        None,
        MERGE,
        MERGE_LORA.replace("/new", "/data"),
        r"data: exists already",
    ),
    "merge into a full disk": (no_space, MERGE, MERGE_LORA, r"cannot be written|too large"),
}
RUNS = {
    "no dataset": (None, FINETUNE, TRAIN.replace("/data ", "/none "), r"none: .*prepare_alpaca.py"),
    "dataset cut off": (
        cut_off("data/train.safetensors"),
        FINETUNE,
        TRAIN,
        r"data/train.safetensors",
    ),
    "dataset of another tokenizer": (
        lambda p: (p / TOKENIZER).write_text((p / TOKENIZER).read_text() + " "),
        *(FINETUNE, TRAIN, r"data: .*another tokenizer"),
    ),
    "samples longer than the context": (
        edit(CONFIG, max_position_embeddings=64),
        *(FINETUNE, TRAIN, r"data: has a sample of \d+ tokens, .* 64"),
    ),
    "out_dir of another run": (
        lambda p: ((p / "out").mkdir(), (p / "out/notes").write_text("mine")),
        *(FINETUNE, TRAIN, r"out: holds another run.*--resume"),
    ),
    "the model's folder for a run": (
        None,
        FINETUNE,
        f"{TRAIN} --out_dir {{}}/checkpoint",
        r"another",
    ),
    "a run in a file": (None, FINETUNE, f"{TRAIN} --out_dir {{}}/records.json/a", r"records.json"),
    "nothing to resume": (None, FINETUNE, f"{TRAIN} --resume", r"out: no run there to resume"),
    "two nodes without an address": (None, FINETUNE, f"{TRAIN} --num_nodes 2", r"MASTER_ADDR", 2),
    "a full disk for a dataset": (no_space, JSON, PREPARE, r"cannot be written|too large"),
}
CASES = MODELS | CONVERTERS | METHODS | RUNS


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_touched(place: Path, monkeypatch, capsys, case: tuple) -> None:
    assert_refused(place, case, monkeypatch, capsys)


def test_links_as_in_the_hubs_cache_are_followed(place: Path) -> None:
    folder = place / "checkpoint"
    edit(CONFIG, auto_map={"AutoModelForCausalLM": "code.Model"})(place)
    (place / "blobs").mkdir()
    for file in list(folder.iterdir()):
        shutil.move(file, place / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    Tokenizer(folder)
    model = load_model(folder)
    (place / "saved").mkdir()
    (place / "saved/config.json").write_text(model.config.to_json(torch.float32))
    assert "auto_map" not in json.loads((place / "saved/config.json").read_text())
    assert LLaMAConfig.from_checkpoint(place / "saved") == model.config
