"""What users get wrong: one clear line on stderr, a non-zero status, and nothing on disk is touched."""
# ruff: noqa: F811, pytest finds the fixture `place` by its name

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from bad_input import (
    ADAPTER,
    ALPACA,
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
    META,
    PREPARE,
    TRAIN,
    TRAIN_ADAPTER,
    WEIGHTS,
    RunsCode,
    adapter,
    assert_refused,
    change_weights,
    conversation,
    edit_json,
    no_space,
    other_model,
    other_tokenizer,
    pickled_code,
    place,  # noqa: F401
    shrink_embedding,
    truncate,
    write,
)
from conftest import load_script, make_hf_model, save_sentencepiece, save_tokenizer
from model_files import join_safetensors, read_gguf, read_zip, split_safetensors, write_gguf, write_zip
from safetensors.torch import load_file, save_file
from test_convert import byte_level_bpe, meta_tensors, noisy, save_gguf
from transformers import AutoModelForCausalLM

from lit_llama import LLaMAConfig, Tokenizer, cli, load_model

# what is wrong: (what breaks it, the script, its flags, what the line says, the exit status)
CASES = {
    "no checkpoint folder": (None, BASE, "--checkpoint_dir {}/none --prompt Hi", r"none: .*scripts/download.py"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), BASE, ASK, r"no model.safetensors.*scripts/download.py"),
    "truncated safetensors": (lambda p: truncate(p / WEIGHTS), BASE, ASK, r"model.safetensors: damaged or cut off"),
    "empty safetensors": (write(WEIGHTS, ""), BASE, ASK, r"model.safetensors: damaged or cut off"),
    "wrong shape": (
        lambda p: change_weights(p / WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        *(BASE, ASK, r"norm.weight has shape \(3,\), config.json asks for \(32,\)"),
    ),
    "missing tensor": (
        lambda p: change_weights(p / WEIGHTS, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        *(BASE, ASK, r"the weights lack \['layers.1.mlp.up_proj.weight'\]"),
    ),
    "surplus tensor": (
        lambda p: change_weights(p / WEIGHTS, lambda t: t.update({"vision.weight": torch.ones(3)})),
        *(BASE, ASK, r"vision.weight"),
    ),
    "quantized weights": (
        lambda p: change_weights(
            p / WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
        ),
        *(BASE, ASK, r"norm.weight holds torch.int8; quantized"),
    ),
    "malformed config": (write("checkpoint/config.json", "{"), BASE, ASK, r"config.json: cannot be read as JSON"),
    "unknown model type": (
        lambda p: edit_json(p / "checkpoint/config.json", model_type="gemma2"),
        *(BASE, ASK, r"config.json: model_type 'gemma2' is not supported, only llama or mistral"),
    ),
    "unknown rope kind": (
        lambda p: edit_json(p / "checkpoint/config.json", rope_parameters={"rope_type": "yarn"}),
        *(BASE, ASK, r"rope type 'yarn' is not supported"),
    ),
    "missing tokenizer": (
        lambda p: (p / "checkpoint/tokenizer.json").unlink(),
        *(FINETUNE, TRAIN, r"checkpoint: no tokenizer.json and no tokenizer.model"),
    ),
    "damaged tokenizer": (write("checkpoint/tokenizer.json", "{}"), BASE, ASK, r"tokenizer.json: not a tokenizer"),
    "vocabulary larger than the embedding": (
        shrink_embedding,
        *(FINETUNE, TRAIN, r"tokenizer.json: has 300 tokens, the model's embedding only 200"),
    ),
    "pickled code in a .pth": (pickled_code, META, "--source {}/meta --out_dir {}/new", r"00.pth: refused.*run code"),
    "no .pth": (write("params.json", "{}"), META, "--source {} --out_dir {}/new", r"no consolidated"),
    "a .pth of another program": (
        lambda p: torch.save({"a": torch.ones(2)}, p / "lit.pth"),
        *(LIT, "--source {}/lit.pth --out_dir {}/new", r"lit.pth: has no transformer.wte.weight"),
    ),
    "damaged .pth": (
        write("lit.pth", "no"),
        LIT,
        "--source {}/lit.pth --out_dir {}/new",
        r"lit.pth: .*(damaged|refused)",
    ),
    "no GGUF": (write("a.gguf", "no"), GGUF, "--source {}/a.gguf --out_dir {}/new", r"a.gguf: not a GGUF file"),
    "missing GGUF": (None, GGUF, "--source {}/a.gguf --out_dir {}/new", r"a.gguf: cannot be read"),
    "malformed JSON": (
        write("records.json", '[\n{"a": 1},\n{"a" 2}]'),
        JSON,
        PREPARE,
        r"records.json, line 3, column 6",
    ),
    "malformed JSONL": (
        write("records.jsonl", '{"instruction": "a", "output": "b"}\n\n{"a": }\n'),
        *(JSON, PREPARE.replace("records.json", "records.jsonl"), r"records.jsonl, line 3, column 7"),
    ),
    "missing column": (
        write("records.json", '[{"instruction": "a", "answer": "b"}, {}, {}]'),
        *(JSON, PREPARE, r"record 1: no column 'output', found: instruction, answer.*--columns"),
    ),
    "number for text": (
        write("records.json", '[{"instruction": "a", "output": 3}, {}, {}]'),
        *(JSON, PREPARE, r"record 1: instruction, input and output should be text"),
    ),
    "CSV with a comma too many": (
        write("records.csv", "instruction,output\na,b\nc,d, e\n"),
        *(JSON, PREPARE.replace("records.json", "records.csv"), r"records.csv, line 3: more fields than the header"),
    ),
    "CSV with a field too few": (
        write("records.csv", "instruction,output\na\nc,d\n"),
        *(JSON, PREPARE.replace("records.json", "records.csv"), r"records.csv, line 2: fewer fields than the header"),
    ),
    "CSV with a stray quote": (
        write("records.csv", 'instruction,output\na,"b\nc,d\n'),
        *(JSON, PREPARE.replace("records.json", "records.csv"), r"records.csv, line 2: malformed CSV"),
    ),
    "JSON with an endless number": (
        write("records.json", f'[{{"instruction": {"1" * 5000}, "output": "b"}}]'),
        *(JSON, PREPARE, r"records.json, line 1: JSON that cannot be read"),
    ),
    "record that is no object": (
        write("records.json", '["a", "b", "c"]'),
        JSON,
        PREPARE,
        r"record 1: should be an object",
    ),
    "malformed conversation": (
        write("records.json", '[{"messages": [{"role": "human", "content": "a"}]}, {}, {}]'),
        *(JSON, PREPARE, r"record 1: `messages` should be"),
    ),
    "system message in an Alpaca prompt": (
        conversation,
        JSON,
        PREPARE,
        r"record 1: template 'alpaca'.*--template chatml",
    ),
    "lone surrogate": (
        write("records.json", '[{"instruction": "\\ud800", "output": "b"}, {}, {}]'),
        *(JSON, PREPARE, r"record 1: the text holds a lone surrogate"),
    ),
    "empty file": (write("records.json", " \n"), JSON, PREPARE, r"records.json: the file is empty"),
    "no records": (write("records.json", "[]"), JSON, PREPARE, r"records.json: should hold an array of records"),
    "not UTF-8": (lambda p: (p / "records.json").write_bytes(b"[\xff]"), JSON, PREPARE, r"records.json: not UTF-8"),
    "missing source": (None, ALPACA, PREPARE.replace("records", "none"), r"none.json: cannot be read.*--source"),
    "unknown kind of source": (
        write("records.txt", "a"),
        *(JSON, PREPARE.replace("records.json", "records.txt"), r"records.txt: unknown kind of file"),
    ),
    "val_size too large": (None, JSON, f"{PREPARE}0000", r"--val_size 20000: should be from 0 to 59", 2),
    "no room for any response": (None, JSON, f"{PREPARE} --max_seq_length 5", r"no sample is left.*--max_seq_length 5"),
    "unknown template": (None, JSON, f"{PREPARE} --template vicuna", r"unknown template 'vicuna'. Known: alpaca"),
    "data_dir that is something else": (
        None,
        *(JSON, PREPARE.replace("{}/new", "{}/checkpoint"), r"checkpoint: exists already"),
    ),
    "no prepared set": (None, FINETUNE, TRAIN.replace("/data ", "/none "), r"none: no prepared set.*prepare_alpaca.py"),
    "damaged prepared set": (
        lambda p: truncate(p / "data/train.safetensors"),
        *(FINETUNE, TRAIN, r"train.safetensors: damaged or cut off"),
    ),
    "prepared with another tokenizer": (other_tokenizer, FINETUNE, TRAIN, r"data: was prepared with another tokenizer"),
    "samples longer than the context": (
        lambda p: edit_json(p / "checkpoint/config.json", max_position_embeddings=64),
        *(FINETUNE, TRAIN, r"data: has a sample of \d+ tokens, the model's context holds 64"),
    ),
    "out_dir that holds another run": (
        lambda p: (p / "out").mkdir() or (p / "out/notes").write_text("mine"),
        *(FINETUNE, TRAIN, r"out: holds another run.*--resume"),
    ),
    "nothing to resume": (None, FINETUNE, f"{TRAIN} --resume true", r"out: no run there to resume"),
    "unknown precision": (
        None,
        FINETUNE,
        f"{TRAIN} --precision fp8",
        r"--precision fp8: unknown. Known: bf16-mixed",
        2,
    ),
    "r of 0": (None, FINETUNE, f"{TRAIN} --lora.r 0", r"--lora.r 0: should be at least 1", 2),
    "dropout of 1": (None, FINETUNE, f"{TRAIN} --lora.dropout 1", r"--lora.dropout 1.*less than 1", 2),
    "unknown target": (
        None,
        FINETUNE,
        f"{TRAIN} --lora.targets [c_attn]",
        r"'c_attn'. There are: all-linear, q_proj, k_proj",
        2,
    ),
    "no target": (None, FINETUNE, f"{TRAIN} --lora.targets []", r"--lora.targets \[\]: should name at least one", 2),
    "vocabulary size of null": (
        lambda p: edit_json(p / "checkpoint/config.json", vocab_size=None),
        *(BASE, ASK, r"'vocab_size' is missing"),
    ),
    "rope_theta of text": (
        lambda p: edit_json(p / "checkpoint/config.json", rope_parameters={"rope_theta": "1e4"}),
        *(BASE, ASK, r"'rope_theta' should be float"),
    ),
    "batch of 0": (None, FINETUNE, f"{TRAIN} --train.epochs 0", r"--train.epochs 0: should be from 1 on", 2),
    "unknown flag": (None, FINETUNE, f"{TRAIN} --lora.rank 4", r"rank.*--help", 2),
    "word for a number": (None, FINETUNE, f"{TRAIN} --seed many", r"seed.*--help", 2),
    "LoRA for another model": (other_model, LORA, ASK_LORA, r"lora: .* has shapes .* the model asks for"),
    "no LoRA": (None, LORA, ASK_LORA.replace("/lora", "/none"), r"none: no adapter_config.json.*finetune/"),
    "LoRA of another kind": (
        lambda p: edit_json(p / "lora/adapter_config.json", peft_type="IA3"),
        *(LORA, ASK_LORA, r"peft_type is 'IA3', not LORA"),
    ),
    "truncated LoRA": (
        lambda p: truncate(p / "lora/adapter_model.safetensors"),
        *(LORA, ASK_LORA, r"adapter_model.safetensors: damaged or cut off"),
    ),
    "LoRA whose base is gone": (
        lambda p: edit_json(p / "lora/adapter_config.json", base_model_name_or_path="/gone"),
        *(LORA, ASK_LORA, r"base model '/gone' is no folder here.*--checkpoint_dir"),
    ),
    "adapter given as a LoRA": (adapter, LORA, ASK_LORA, r"peft_type is None \(but llama_adapter\), not LORA"),
    "LoRA given as an adapter": (None, ADAPTER, ASK_ADAPTER, r"method is None, not llama_adapter or llama_adapter_v2"),
    "no adapter": (None, ADAPTER, ASK_ADAPTER.replace("/lora", "/none"), r"none: no adapter_config.json"),
    "truncated adapter": (
        lambda p: (adapter(p), truncate(p / "lora/adapter_model.safetensors")),
        *(ADAPTER, ASK_ADAPTER, r"adapter_model.safetensors: damaged or cut off"),
    ),
    "start_layer of text": (
        lambda p: (adapter(p), edit_json(p / "lora/adapter_config.json", start_layer="2")),
        *(ADAPTER, ASK_ADAPTER, r"start_layer should be integers"),
    ),
    "start_layer beyond the model": (
        None,
        *(TRAIN_ADAPTER, f"{TRAIN} --adapter.start_layer 9", r"--adapter.start_layer 9: the model has 2 layers", 2),
    ),
    "prompt of 0": (
        None,
        TRAIN_ADAPTER,
        f"{TRAIN} --adapter.prompt_length 0",
        r"--adapter.prompt_length .*at least 1",
        2,
    ),
    "no full result": (None, "generate/full.py", ASK.replace("/checkpoint", "/out"), r"out: no tokenizer.json"),
    "devices of 0": (None, FINETUNE, f"{TRAIN} --devices 0", r"--devices 0: should be at least 1", 2),
    "two nodes without an address": (None, FINETUNE, f"{TRAIN} --num_nodes 2", r"--num_nodes 2: .*MASTER_ADDR", 2),
    "LoRA+ ratio of 0": (None, FINETUNE, f"{TRAIN} --lora.loraplus_lr_ratio 0", r"loraplus_lr_ratio 0.*more than 0", 2),
    "nothing kept": (None, FINETUNE, f"{TRAIN} --train.keep_last 0", r"--train.keep_last 0: should be from 1 on", 2),
    "merge with an adapter": (
        lambda p: (p / "lora/adapter").mkdir(),
        *(MERGE, "--lora_path {}/lora --out_dir {}/new", r"was trained with an adapter, which cannot be merged"),
    ),
    "merge into a folder that exists": (None, MERGE, "--lora_path {}/lora --out_dir {}/data", r"data: exists already"),
    "prompt too long": (None, BASE, f"{ASK}0000", r"the prompt has \d+ tokens .* holds 512"),
    "top_p of 0": (None, BASE, f"{ASK} --top_p 0", r"--top_p", 2),
    "no disk space for a prepared set": (no_space, JSON, PREPARE, r"(File too large|cannot be written)"),
    "no disk space for a model": (no_space, MERGE, "--lora_path {}/lora --out_dir {}/new", r"cannot be written"),
}

CONFIG, INDEX, BIN = "checkpoint/config.json", WEIGHTS + ".index.json", "checkpoint/pytorch_model.bin"
TOKENIZER, SETTINGS = "checkpoint/tokenizer.json", "checkpoint/tokenizer_config.json"
LORA_CONFIG, LORA_WEIGHTS = "lora/adapter_config.json", "lora/adapter_model.safetensors"
NEW, LONG = "--out_dir {}/new", 50_000_000


def put(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content())


def edit(name: str, **changes) -> Callable[[Path], object]:
    return lambda place: edit_json(place / name, **changes)


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else where a file was: a folder, a pipe, a link."""
    return lambda place: ((place / name).unlink(), make(place / name))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


# of a JSON file that must be an object
NO_OBJECTS = {
    "empty": (b"", r"cannot be read as JSON"),
    "an array": (b"[]", r"should hold a JSON object, holds list"),
    "null": (b"null", r"holds NoneType"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r"not UTF-8"),
    "NUL bytes": (b'{"a": 1}\0\0', r"holds a NUL"),
    "nested arrays": (b'{"a": ' + b"[" * 10_000, r"cannot be read as JSON"),
    "nested objects": (b'{"a":' * 10_000, r"cannot be read as JSON"),
    "a line of 50 MB": (lambda: b'{"a": "' + b"x" * LONG + b'"}', r"has 50,000,009 bytes"),
    "the same key twice": (b'{"hidden_size": 1, "r": 2, "hidden_size": 3}', r"the key 'hidden_size' is there twice"),
    "an endless number": (b'{"a": ' + b"9" * 5000 + b"}", r"cannot be read as JSON"),
    "cut off": (b'{"a": "b', r"cannot be read as JSON \(.*line 1 column 7"),
    "a lone surrogate": (b'{"\xed\xa0\x80": 1}', r"not UTF-8"),
}
NO_FILES = {"a folder": Path.mkdir, "a pipe": os.mkfifo, "a link to a device": endless}

# fields of config.json, each with what the line says
FIELDS = [
    *(
        (dict(rms_norm_eps=value), r"'rms_norm_eps' should be float of more than 0")
        for value in (float("nan"), -1, "x")
    ),
    *(
        (dict(rope_parameters={"rope_theta": value}), r"'rope_theta' should be")
        for value in (float("inf"), 0, True, [])
    ),
    *((dict(hidden_size=value), r"'hidden_size' should be int") for value in (10**12, -32, True, [32], 32.0, {}, "32")),
    *((dict(num_hidden_layers=value), r"'num_hidden_layers' should be int") for value in (10**6, 0, 2**63)),
    *((dict(vocab_size=value), r"vocab_size'? should be int") for value in ("384", [384])),
    (dict(max_position_embeddings=-1), r"'max_position_embeddings' should be"),
    (dict(intermediate_size=10**30), r"'intermediate_size' should be"),
    *((dict(rope_parameters=value), r"rope type .* is not supported") for value in ([1], 3, {"rope_type": ["linear"]})),
    *(
        (dict(rope_parameters={"rope_type": "linear", "factor": value}), r"needs a positive number 'factor'")
        for value in ("2", float("nan"), 0, None)
    ),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8}), r"needs a positive number 'low_freq_factor'"),
    *(
        (dict(eos_token_id=value), r"eos_token_id .*(none of the 384 ids|should be int)")
        for value in ("</s>", [2, "x"], 384, -1, 1.5)
    ),
    *(
        (dict(bos_token_id=value), r"bos_token_id .*(none of the 384 ids|should be int)")
        for value in (10**9, [1], True)
    ),
    (dict(num_attention_heads=5), r"5 heads are no multiple of 2"),
    (dict(num_attention_heads=64, head_dim=None), r"head_dim 0 is odd or 0"),
    (dict(head_dim=7), r"head_dim 7 is odd"),
    (dict(hidden_act=["silu"]), r"hidden_act \['silu'\] is not supported"),
    (dict(tie_word_embeddings="no"), r"'tie_word_embeddings' should be bool"),
]
# all that reads a model folder, in turn
READERS = [
    (BASE, ASK),
    (FINETUNE, TRAIN),
    (LORA, ASK_LORA),
    (MERGE, f"--lora_path {{}}/lora {NEW}"),
    ("scripts/combine_loras.py", f"--lora_path {{}}/lora {NEW}"),
    ("scripts/estimate_memory.py", "--model {}/checkpoint --device cpu"),
]
CASES |= {
    f"config.json: {what}": (put(CONFIG, content), *reader, rf"config\.json.*{message}")
    for (what, (content, message)), reader in zip(NO_OBJECTS.items(), cycle(READERS), strict=False)
}
CASES |= {
    f"config.json: {fields}": (edit(CONFIG, **fields), *reader, rf"config\.json: .*{message}")
    for (fields, message), reader in zip(FIELDS, cycle(READERS), strict=False)
}
CASES |= {
    f"{Path(name).name}: {what}": (
        instead(name, make),
        script,
        flags,
        rf"{name}.*cannot be read.*(is no file|is a|is no)",
    )
    for what, make in NO_FILES.items()
    for name, script, flags in (
        (CONFIG, BASE, ASK),
        (WEIGHTS, BASE, ASK),
        (TOKENIZER, BASE, ASK),
        (SETTINGS, BASE, ASK),
        (LORA_CONFIG, LORA, ASK_LORA),
        (LORA_WEIGHTS, MERGE, f"--lora_path {{}}/lora {NEW}"),
    )
}
CASES |= {
    "config.json: a link to itself": (instead(CONFIG, loop), BASE, ASK, r"checkpoint: no config.json there"),
    "weights: a link to nothing": (instead(WEIGHTS, loop), BASE, ASK, r"checkpoint: no model.safetensors"),
}


def header(change: Callable[[dict], object], name: str = WEIGHTS) -> Callable[[Path], object]:
    """Change a safetensors header; a value that comes back is the header instead."""

    def breaks(place: Path) -> None:
        entries, body = split_safetensors((place / name).read_bytes())
        changed = change(entries)
        (place / name).write_bytes(join_safetensors(entries if changed is None else changed, body))

    return breaks


def entry(**changes) -> Callable[[Path], object]:
    return header(lambda entries: entries["model.norm.weight"].update(changes))


def says_size(size: int) -> Callable[[Path], object]:
    def breaks(place: Path) -> None:
        file = place / WEIGHTS
        file.write_bytes(join_safetensors(*split_safetensors(file.read_bytes()), size=size))

    return breaks


def twice(entries: dict) -> bytes:
    text = json.dumps(entries)
    return f'{text[:-1]}, "model.norm.weight": {json.dumps(entries["model.norm.weight"])}}}'.encode()


HEADERS = {
    "longer than the file": says_size(10**8 - 1),
    "of 2**63 bytes": says_size(2**63),
    "of no bytes": says_size(0),
    "no JSON": header(lambda entries: b"{no"),
    "an array": header(lambda entries: [1, 2]),
    "no UTF-8": header(lambda entries: b'{"\xff": 1}'),
    "nested": header(lambda entries: b'{"a":' * 10_000),
    "negative offsets": entry(data_offsets=[-4, 124]),
    "overlapping offsets": entry(data_offsets=[0, 128]),
    "offsets behind the end": entry(data_offsets=[10**9, 10**9 + 128]),
    "offsets the wrong way round": entry(data_offsets=[128, 0]),
    "three offsets": entry(data_offsets=[0, 1, 2]),
    "an unknown dtype": entry(dtype="F31"),
    "a dtype of another size": entry(dtype="F64"),
    "shape of text": entry(shape=["32"]),
    "negative shape": entry(shape=[-32]),
    "shape beyond numbers": entry(shape=[2**62, 2**62]),
    "no shape": header(lambda entries: entries["model.norm.weight"].pop("shape")),
    "an entry of null": header(lambda entries: entries.update({"model.norm.weight": None})),
    "metadata of numbers": header(lambda entries: entries.update({"__metadata__": {"a": 1}})),
}
CASES |= {
    f"safetensors header: {what}": (breaks, BASE, ASK, rf"{WEIGHTS}: damaged") for what, breaks in HEADERS.items()
}
CASES |= {
    "safetensors: trailing bytes": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes() + b"\0" * 4),
        *(BASE, ASK, rf"{WEIGHTS}: damaged"),
    ),
    "weights that are not numbers": (
        lambda p: change_weights(p / WEIGHTS, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        *(BASE, ASK, r"the model's logits are not numbers"),
    ),
    "safetensors: seven bytes": (put(WEIGHTS, b"\0" * 7), BASE, ASK, rf"{WEIGHTS}: damaged"),
    "safetensors: float8": (
        lambda p: change_weights(
            p / WEIGHTS, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
        ),
        *(BASE, ASK, r"norm.weight holds torch.float8_e4m3fn"),
    ),
    "safetensors: one tensor under two names": (
        lambda p: change_weights(p / WEIGHTS, lambda t: t.update({"norm.weight": torch.ones(32)})),
        *(BASE, ASK, r"has norm.weight, but model.norm.weight|has model.norm.weight, but norm.weight"),
    ),
}


def sharded(change: Callable[[dict], object], other: str | None = None) -> Callable[[Path], object]:
    """The weights in a file and its index; `change` changes the index, `other` is a tensor moved into a second file."""

    def breaks(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        (place / WEIGHTS).unlink()
        index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
        save_file(tensors, place / "checkpoint/a.safetensors")
        if other:
            save_file({other: tensors[other]}, place / "checkpoint/b.safetensors")
            index["weight_map"][other] = "b.safetensors"
        changed = change(index)
        (place / INDEX).write_text(json.dumps(index if changed is None else changed))

    return breaks


def to(name: str) -> Callable[[dict], object]:
    return lambda index: index["weight_map"].update({"model.norm.weight": name})


def lacks(name: str) -> Callable[[Path], object]:
    def breaks(place: Path) -> None:
        sharded(lambda index: None)(place)
        change_weights(place / "checkpoint/a.safetensors", lambda tensors: tensors.pop(name))

    return breaks


NOWHERE = r"index.json: names .*which is not in this folder"
INDICES = {
    "a missing file": (sharded(to("c.safetensors")), NOWHERE),
    "a file of the folder above": (
        sharded(to("../lora/adapter_model.safetensors")),
        r"names \.\./lora.*not in this folder",
    ),
    "a file by its whole path": (sharded(to("/etc/passwd")), NOWHERE),
    "the folder above": (sharded(to("..")), NOWHERE),
    "no name": (sharded(to("")), NOWHERE),
    "a name of 5,000 letters": (sharded(to("a" * 5000)), NOWHERE),
    "a name with a NUL": (sharded(to("a\0")), NOWHERE),
    "a number": (sharded(to(3)), r"index.json: has no weight_map of names to files"),
    "a list": (sharded(lambda index: {"weight_map": ["a.safetensors"]}), r"has no weight_map"),
    "nothing": (sharded(lambda index: {"weight_map": {}}), r"has no weight_map"),
    "config.json": (sharded(to("config.json")), r"index.json: names files that are .json"),
    "a file without the tensor": (lacks("model.norm.weight"), r"the weights lack \['norm.weight'\]"),
    "a tensor that is in two": (
        sharded(lambda index: None, "model.norm.weight"),
        r"b.safetensors: has model.norm.weight, but",
    ),
    "nested": (
        lambda p: (sharded(lambda index: None)(p), (p / INDEX).write_text("[" * 10_000)),
        r"cannot be read as JSON",
    ),
}
CASES |= {f"index: {what}": (breaks, BASE, ASK, message) for what, (breaks, message) in INDICES.items()}


def pickled(value: object) -> Callable[[Path], object]:
    """A `pytorch_model.bin` in the weights' place; a function makes it from the tensors."""

    def breaks(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        (place / WEIGHTS).unlink()
        torch.save(value(tensors) if callable(value) else value, place / BIN)

    return breaks


def with_norm(norm: object) -> Callable[[Path], object]:
    return pickled(lambda tensors: tensors | {"model.norm.weight": norm})


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda p: (pickled(lambda tensors: tensors)(p), (p / BIN).write_bytes(change((p / BIN).read_bytes())))


def shorter(content: bytes) -> bytes:
    """What the pickle says of sizes stays; a storage is cut."""
    parts = read_zip(content)
    last = max((name for name in parts if "/data/" in name), key=lambda name: len(parts[name]))
    return write_zip({name: part for name, part in parts.items() if name != last} | {last: parts[last][:8]})


BINS = {
    "cut off": (rewritten(lambda content: content[:-300]), r"damaged or cut off"),
    "empty": (rewritten(lambda content: b""), r"damaged or cut off"),
    "code": (with_norm(RunsCode()), r"refused, its pickle .*could run code"),
    "a list": (pickled([torch.ones(2)]), r"should hold named tensors"),
    "numbers": (pickled({"model.norm.weight": 3}), r"should hold named tensors"),
    "names that are numbers": (pickled({3: torch.ones(2)}), r"should hold named tensors"),
    "a sparse tensor": (with_norm(torch.eye(32).to_sparse()), r"model.norm.weight is another kind"),
    "a quantized tensor": (
        with_norm(torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8)),
        r"model.norm.weight is another kind|refused",
    ),
    "a tensor without data": (with_norm(torch.ones(32, device="meta")), r"model.norm.weight is larger than what"),
    "a tensor that is one number 10**12 times": (
        with_norm(torch.ones(1).expand(10**12)),
        r"is larger than what the file",
    ),
    "complex numbers": (with_norm(torch.ones(32, dtype=torch.complex64)), r"norm.weight holds torch.complex64"),
    "compressed": (
        rewritten(lambda content: write_zip(read_zip(content), zipfile.ZIP_DEFLATED)),
        r"damaged or cut off \(compressed\)",
    ),
    "a storage shorter than its shape": (rewritten(shorter), r"damaged or cut off"),
}
CASES |= {
    f".bin: {what}": (breaks, BASE, ASK, rf"{BIN}.*{message}|{message}") for what, (breaks, message) in BINS.items()
}


def meta(change: Callable[[dict], object] = dict, **params) -> Callable[[Path], object]:
    """A checkpoint of Meta's with changed tensors and params.json."""

    def breaks(place: Path) -> None:
        tensors = meta_tensors(make_hf_model())
        change(tensors)
        (place / "meta").mkdir()
        torch.save(tensors, place / "meta/consolidated.00.pth")
        known = dict(dim=32, n_layers=2, n_heads=4, norm_eps=1e-5)
        (place / "meta/params.json").write_text(json.dumps(known | params))
        shutil.copy(place / TOKENIZER, place / "meta")

    return breaks


METAS = {
    "dim of text": (meta(dim="32"), r"dim in params.json \('32'\) is no size"),
    "dim of another model": (meta(dim=64), r"would have shape|no multiple"),
    "10**9 layers": (meta(n_layers=10**9), r"params.json: the field 'num_hidden_layers'"),
    "no heads": (meta(n_heads=0), r"params.json: the field 'num_attention_heads'"),
    "eps of text": (meta(norm_eps="1e-5"), r"params.json: the field 'rms_norm_eps'"),
    "theta of a list": (meta(rope_theta=[1]), r"params.json: the field 'rope_theta'"),
    "scaling by text": (meta(use_scaled_rope=True, rope_scaling_factor="8"), r"needs a positive number 'factor'"),
    "an embedding of one dimension": (
        meta(lambda t: t.update({"tok_embeddings.weight": torch.ones(32)})),
        r"the .pth's embedding no matrix",
    ),
    "a weight of another shape": (
        meta(lambda t: t.update({"layers.1.attention.wq.weight": torch.ones(30, 32)})),
        r"layers.1.self_attn.q_proj.weight would have shape \(30, 32\)",
    ),
    "a weight of whole numbers": (
        meta(lambda t: t.update({"norm.weight": torch.ones(32, dtype=torch.int64)})),
        r"norm.weight is \[32\] of torch.int64",
    ),
    "a scalar for a weight": (
        meta(lambda t: t.update({"layers.0.attention.wk.weight": torch.ones(())})),
        r"wk.weight is \[\]",
    ),
    "no tensor": (meta(lambda t: t.pop("layers.0.attention.wk.weight")), r"no tensor layers.0.attention.wk.weight"),
}
CASES |= {
    f"Meta's .pth: {what}": (breaks, META, f"--source {{}}/meta {NEW}", rf"meta.*{message}")
    for what, (breaks, message) in METAS.items()
}


def lit(**changes: tuple[int, ...]) -> Callable[[Path], object]:
    """A checkpoint of the original Lit-LLaMA with other shapes."""
    layer = {"rms_1.scale": (8,), "attn.c_attn.weight": (24, 8), "attn.c_proj.weight": (8, 8), "rms_2.scale": (8,)}
    layer |= {"mlp.c_fc1.weight": (16, 8), "mlp.c_fc2.weight": (16, 8), "mlp.c_proj.weight": (8, 16)}
    shapes = {f"h.0.{name}": shape for name, shape in layer.items()} | {"wte.weight": (300, 8), "ln_f.scale": (8,)}
    shapes |= {name.replace("__", "."): shape for name, shape in changes.items()}
    tensors = {f"transformer.{name}": torch.ones(shape) for name, shape in shapes.items()}

    def breaks(place: Path) -> None:
        torch.save(tensors | {"lm_head.weight": torch.ones(300, 8)}, place / "lit.pth")
        shutil.copy(place / TOKENIZER, place)

    return breaks


LITS = {
    "an embedding of one dimension": (lit(wte__weight=(8,)), r"has no transformer.wte.weight with two dimensions"),
    "attention that is no three": (lit(h__0__attn__c_attn__weight=(25, 8)), r"c_attn.weight has shape \(25, 8\)"),
    "a weight of another shape": (
        lit(h__0__mlp__c_proj__weight=(8, 15)),
        r"down_proj.weight would have shape \(8, 15\)",
    ),
    "a head of another size": (lit(wte__weight=(299, 8)), r"lm_head.weight would have shape \(300, 8\)"),
    "another part": (lit(h__0__attn__bias=(8,)), r"attn.bias is missing or is no part"),
}
CASES |= {
    f"Lit-LLaMA's .pth: {what}": (
        breaks,
        LIT,
        f"--source {{}}/lit.pth --num_attention_heads 2 {NEW}",
        rf"lit.pth: .*{message}",
    )
    for what, (breaks, message) in LITS.items()
}


def nothing(metadata: dict, tensors: dict) -> None:
    pass


def gguf(
    change: Callable[[dict, dict], object] = nothing, cut: Callable[[bytes], bytes] = bytes, **options
) -> Callable:
    """A GGUF file with changed metadata and tensors, of which `cut` leaves some bytes."""

    def breaks(place: Path) -> None:
        (place / "of").mkdir()
        save_gguf(noisy(vocab_size=300), place / "a.gguf", byte_level_bpe(place / "of"))
        metadata, tensors = read_gguf(place / "a.gguf")
        change(metadata, tensors)
        (place / "a.gguf").write_bytes(cut(write_gguf(metadata, tensors, **options)))

    return breaks


def key(name: str, value: object) -> Callable[[Path], object]:
    return gguf(lambda metadata, tensors: metadata.update({name: value}))


def no_key(name: str) -> Callable[[Path], object]:
    return gguf(lambda metadata, tensors: metadata.pop(name))


def tensor(place: int, value: object, name: str = "blk.0.attn_q.weight") -> Callable[[Path], object]:
    return gguf(lambda metadata, tensors: tensors[name].__setitem__(place, value))


def huge(where: bytes, skip: int) -> Callable[[Path], object]:
    """The number of eight bytes that follows `where` is 2**60."""

    def cut(content: bytes) -> bytes:
        start = content.index(where) + len(where) + skip
        return content[:start] + (2**60).to_bytes(8, "little") + content[start + 8 :]

    return gguf(cut=cut)


DAMAGED, TOKENS = r"not a GGUF file, or cut off", "tokenizer.ggml."
GGUFS = {
    "another magic": (gguf(nothing, lambda content: b"GGML" + content[4:]), DAMAGED),
    "version 99": (gguf(nothing, version=99), DAMAGED),
    "2**60 tensors": (gguf(nothing, count=2**60), DAMAGED),
    "a key of 2**60 bytes": (
        gguf(nothing, lambda content: content[:24] + (2**60).to_bytes(8, "little") + content[32:]),
        DAMAGED,
    ),
    "a text of 2**60 bytes": (huge(b"general.architecture", 4), DAMAGED),
    "a list of 2**60": (huge(b"tokenizer.ggml.tokens", 8), DAMAGED),
    **{
        f"cut off at {at}": (gguf(nothing, lambda content, at=at: content[:at]), DAMAGED)
        for at in (0, 3, 10, 30, 900, 9000)
    },
    "cut off at its end": (gguf(nothing, lambda content: content[:-64]), DAMAGED),
    "a kind of number that nobody knows": (tensor(1, 999), DAMAGED),
    "a kind of number with a name only": (tensor(1, 9), rf"{DAMAGED}|is quantized as"),
    "a tensor behind the end": (gguf(nothing, shift=2**40), DAMAGED),
    "a tensor of another shape": (tensor(0, [16, 64]), r"q_proj.weight would have shape \(64, 16\)"),
    "a tensor of 2**63 rows": (tensor(0, [32, 2**63]), DAMAGED),
    "an embedding of one dimension": (tensor(0, [300 * 32], "token_embd.weight"), r"token_embd.weight is no matrix"),
    "no architecture": (no_key("general.architecture"), r"architecture None is not supported"),
    "architecture of a number": (key("general.architecture", 3), r"architecture 3 is not supported"),
    "no heads": (no_key("llama.attention.head_count"), r"its metadata lacks llama.attention.head_count"),
    "no context": (no_key("llama.context_length"), r"lacks llama.context_length"),
    "heads of text": (key("llama.attention.head_count", "4"), r"'num_attention_heads' should be int"),
    "a list of heads": (key("llama.attention.head_count_kv", [4, 4]), r"'num_key_value_heads' should be int"),
    "10**9 layers": (key("llama.block_count", 10**9), r"'num_hidden_layers' should be int"),
    "eps of text": (key("llama.attention.layer_norm_rms_epsilon", "x"), r"'rms_norm_eps' should be float"),
    "theta of 0": (key("llama.rope.freq_base", 0.0), r"'rope_theta' should be float"),
    "unknown scaling": (key("llama.rope.scaling.type", "yarn"), r"rope scaling 'yarn' is not supported"),
    "bos out of the vocabulary": (key(TOKENS + "bos_token_id", 300), r"bos_token_id 300 is none of the 300"),
    "no tokens": (no_key(TOKENS + "tokens"), r"tokenizer kind 'gpt2' is not supported"),
    "tokens of numbers": (key(TOKENS + "tokens", [1, 2]), r"ggml.tokens should be a list of str"),
    "more tokens than the embedding": (
        key(TOKENS + "tokens", [f"t{n}" for n in range(301)]),
        r"ggml.tokens has 301 elements",
    ),
    "fewer tokens than their kinds": (
        key(TOKENS + "tokens", ["a", "b"]),
        r"ggml.token_type has 300 elements for 2 tokens",
    ),
    "a token twice": (key(TOKENS + "tokens", ["a"] * 300), r"holds a token twice"),
    "a kind of token that there is not": (
        key(TOKENS + "token_type", [9] * 300),
        r"ggml.token_type should be from 1 to 6",
    ),
    "bos beyond the tokens": (
        gguf(
            lambda metadata, tensors: (metadata.update({TOKENS + "tokens": ["a"]}), metadata.pop(TOKENS + "token_type"))
        ),
        r"ggml.bos_token_id 1 is none of its 1 tokens",
    ),
    "a template of numbers": (key("tokenizer.chat_template", [1]), r"tokenizer.chat_template should be str"),
    "kinds of text": (key(TOKENS + "token_type", ["1"] * 300), r"ggml.token_type should be a list of int"),
    "merges of unknown tokens": (key(TOKENS + "merges", ["zz yy"]), r"tokenizer cannot be made"),
    "merges of one token": (key(TOKENS + "merges", ["a"]), r"tokenizer cannot be made"),
    "merges of numbers": (key(TOKENS + "merges", [1]), r"ggml.merges should be a list of str"),
    "words cut in an unknown way": (key(TOKENS + "pre", 7), r"how the tokenizer cuts words, 7, is not known"),
}
CASES |= {
    f"GGUF: {what}": (breaks, GGUF, f"--source {{}}/a.gguf {NEW}", rf"a.gguf: .*{message}")
    for what, (breaks, message) in GGUFS.items()
}
CASES |= {
    "GGUF: a folder": (
        lambda p: (p / "a.gguf").mkdir(),
        GGUF,
        f"--source {{}}/a.gguf {NEW}",
        r"a.gguf: cannot be read \(is no file\)",
    ),
    "GGUF: a pipe": (
        lambda p: os.mkfifo(p / "a.gguf"),
        GGUF,
        f"--source {{}}/a.gguf {NEW}",
        r"a.gguf: cannot be read \(is no file\)",
    ),
}


def sentencepiece(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A `tokenizer.model` in place of the `tokenizer.json`."""

    def breaks(place: Path) -> None:
        (place / TOKENIZER).unlink()
        file = place / "checkpoint/tokenizer.model"
        save_sentencepiece(file, ["the quick brown fox, and then the other one"] * 8, 280)
        file.with_suffix(".vocab").unlink()
        change(file)

    return breaks


def added(**tokens) -> Callable[[Path], object]:
    return sentencepiece(lambda file: file.with_name("added_tokens.json").write_text(json.dumps(tokens)))


def model_of(**changes) -> Callable[[Path], object]:
    """Changes to a tokenizer.json's model."""

    def breaks(place: Path) -> None:
        value = json.loads((place / TOKENIZER).read_text())
        edit_json(place / TOKENIZER, model=value["model"] | changes)

    return breaks


TOKENIZERS = {
    "tokenizer.model, empty": (sentencepiece(lambda file: file.write_bytes(b"")), r"tokenizer.model: not a tokenizer"),
    "tokenizer.model, cut off": (sentencepiece(truncate), r"tokenizer.model: not a tokenizer"),
    "tokenizer.model, random": (
        sentencepiece(lambda file: file.write_bytes(bytes(range(256)) * 9)),
        r"tokenizer.model: not a",
    ),
    "tokenizer.model, a pipe": (
        sentencepiece(lambda file: (file.unlink(), os.mkfifo(file))),
        r"tokenizer.model: cannot be read",
    ),
    "tokenizer.json, empty": (put(TOKENIZER, b""), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, UTF-16": (put(TOKENIZER, "{}".encode("utf-16")), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, nested": (put(TOKENIZER, b"[" * 10_000), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, a line of 50 MB": (
        put(TOKENIZER, lambda: b'{"a": "' + b"x" * LONG + b'"}'),
        r"tokenizer.json: not a tokenizer",
    ),
    "tokenizer.json, larger than any": (
        lambda p: os.truncate(p / TOKENIZER, 10**8 + 1),
        r"tokenizer.json: cannot be read \(has 100,000,001 bytes",
    ),
    "tokenizer.json, model of text": (edit(TOKENIZER, model="BPE"), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, vocabulary of a list": (model_of(vocab=["a"]), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, negative ids": (model_of(vocab={"a": -1}, merges=[]), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, ids with holes": (
        model_of(vocab={"a": 2**32 - 1}, merges=[]),
        r"tokenizer.json: has 4294967296 tokens",
    ),
    "tokenizer.json, merges of unknown tokens": (model_of(merges=[["zz", "yy"]]), r"tokenizer.json: not a tokenizer"),
    "tokenizer.json, added tokens of numbers": (edit(TOKENIZER, added_tokens=[1]), r"tokenizer.json: not a tokenizer"),
    "tokenizer_config.json, an array": (put(SETTINGS, b"[]"), r"tokenizer_config.json: should hold a JSON object"),
    "tokenizer_config.json, template of a number": (
        edit(SETTINGS, chat_template=3),
        r"tokenizer_config.json: chat_template should be",
    ),
    "tokenizer_config.json, a named template of a list": (
        edit(SETTINGS, chat_template=[{"name": "default", "template": []}]),
        r"tokenizer_config.json: template should be str",
    ),
    "tokenizer_config.json, BOS of a number": (
        edit(SETTINGS, bos_token=1),
        r"tokenizer_config.json: bos_token should be",
    ),
    "tokenizer_config.json, adding BOS of text": (edit(SETTINGS, add_bos_token="yes"), r"add_bos_token should be bool"),
    "chat_template.jinja, not UTF-8": (
        put("checkpoint/chat_template.jinja", b"\xff\xfe{\0"),
        r"chat_template.jinja: not UTF-8",
    ),
    "added_tokens.json, negative id": (added(a=-1), r"added_tokens.json: should hold tokens and their ids"),
    "added_tokens.json, huge id": (added(a=10**30), r"added_tokens.json: should hold tokens and their ids"),
    "added_tokens.json, id of text": (added(a="300"), r"added_tokens.json: should hold tokens and their ids"),
    "added_tokens.json, an id beyond the embedding": (added(a=384), r"tokenizer.model: has 385 tokens"),
}
CASES |= {what: (breaks, BASE, ASK, message) for what, (breaks, message) in TOKENIZERS.items()}


def of_lora(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda place: change_weights(place / LORA_WEIGHTS, change)


def some(kind: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Another tensor for each of a LoRA's A or B."""
    return of_lora(lambda t: t.update({name: make(tensor) for name, tensor in t.items() if f"lora_{kind}" in name}))


def pattern(**alphas: object) -> Callable[[Path], object]:
    return edit(LORA_CONFIG, alpha_pattern={name.replace("__", "("): alpha for name, alpha in alphas.items()})


LORAS = {
    **{
        f"r of {r!r}": (edit(LORA_CONFIG, r=r), r"adapter_config.json: r should be")
        for r in (0, -1, "8", 1.5, True, None)
    },
    "r of 10**9": (edit(LORA_CONFIG, r=10**9), r"has rank 8, r in adapter_config.json is 1000000000"),
    **{
        f"alpha of {alpha!r}": (
            edit(LORA_CONFIG, lora_alpha=alpha),
            r"adapter_config.json: lora_alpha .*positive numbers",
        )
        for alpha in (float("nan"), float("inf"), 0, "16", None, 10**40)
    },
    "dropout of 2": (edit(LORA_CONFIG, lora_dropout=2), r"adapter_config.json: lora_dropout should be"),
    "targets of a number": (edit(LORA_CONFIG, target_modules=3), r"adapter_config.json: target_modules should be"),
    "ranks of a list": (edit(LORA_CONFIG, rank_pattern=[8]), r"adapter_config.json: rank_pattern should be an object"),
    "alphas of a list": (
        edit(LORA_CONFIG, alpha_pattern=[8]),
        r"adapter_config.json: alpha_pattern should be an object",
    ),
    "alphas of text": (pattern(q_proj="8"), r"alpha_pattern should have positive numbers"),
    "a pattern that is none": (pattern(__q_proj=8), r"'\(q_proj' in alpha_pattern is no pattern"),
    "a pattern that takes years": (edit(LORA_CONFIG, alpha_pattern={"(.*a)+$": 8}), r"repeats too much"),
    "A of another shape": (some("A", lambda t: t[:, :-1].contiguous()), r"has shapes .* the model asks for"),
    "A of one dimension": (some("A", lambda t: t[0].clone()), r"has shapes .* the model asks for"),
    "rank 0": (some("A", lambda t: t[:0].clone()), r"has shapes .* the model asks for"),
    "whole numbers": (some("B", lambda t: t.to(torch.int8)), r"holds torch.int8, not floating-point numbers"),
    "no B": (of_lora(lambda t: [t.pop(name) for name in list(t) if "lora_B" in name]), r"the model has no such layer"),
    "no tensors": (of_lora(dict.clear), r"holds tensors that are no LoRA|no LoRA"),
    "another method's tensors": (
        of_lora(lambda t: t.update({"x.hada_w1": torch.ones(2)})),
        r"no LoRA of a linear layer: x.hada",
    ),
    "a layer beyond the model": (
        of_lora(lambda t: t.update({name.replace("layers.1", "layers.9"): x.clone() for name, x in list(t.items())})),
        r"layers.9.* the model has no such layer",
    ),
    "trained biases": (edit(LORA_CONFIG, bias="all"), r"adapter_config.json: bias is 'all', which is not supported"),
    "a base of a number": (edit(LORA_CONFIG, base_model_name_or_path=3), r"its base model 3 is no folder here"),
    "a base of 5,000 letters": (
        edit(LORA_CONFIG, base_model_name_or_path="a" * 5000),
        r"its base model 'aaa.*is no folder",
    ),
    "a base with a NUL": (edit(LORA_CONFIG, base_model_name_or_path="a\0"), r"is no folder here"),
    **{what: (put(LORA_CONFIG, content), message) for what, (content, message) in NO_OBJECTS.items()},
}
LORA_READERS = READERS[2:5]
CASES |= {
    f"LoRA: {what}": (breaks, *reader, rf"lora.*{message}")
    for (what, (breaks, message)), reader in zip(LORAS.items(), cycle(LORA_READERS), strict=False)
}


def of_adapter(**changes) -> Callable[[Path], object]:
    return lambda place: (adapter(place), edit_json(place / LORA_CONFIG, **changes))


ADAPTERS = {
    "10**12 prompts": (of_adapter(prompt_length=10**12), r"prompt has shape .* asks for"),
    "no prompts": (of_adapter(prompt_length=0), r"prompt has shape .* asks for"),
    "start before the first": (of_adapter(start_layer=-1), r"start_layer is -1 of 2"),
    "start behind the last": (of_adapter(start_layer=2), r"start_layer is 2 of 2"),
    "a method that is a list": (of_adapter(method=["llama_adapter"]), r"method is \['llama_adapter'\]"),
    "for another size": (of_adapter(hidden_size=64), r"hidden_size is 64, the model has 32. It is for another model"),
    "version 2 of version 1": (of_adapter(method="llama_adapter_v2"), r"has shape None, the model asks for"),
    "whole numbers": (
        lambda p: (
            adapter(p),
            change_weights(p / LORA_WEIGHTS, lambda t: t.update({n: x.long() for n, x in t.items()})),
        ),
        r"holds torch.int64, not floating-point numbers",
    ),
}
CASES |= {
    f"adapter: {what}": (breaks, ADAPTER, ASK_ADAPTER, rf"lora.*{message}")
    for what, (breaks, message) in ADAPTERS.items()
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_touched(place: Path, monkeypatch, capsys, case: tuple) -> None:
    assert_refused(place, case, monkeypatch, capsys)


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 250


def test_a_tokenizer_of_tiktoken_ranks_is_named(tmp_path: Path) -> None:
    find_tokenizer = load_script(META).find_tokenizer
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(cli.UserError, match=r"tiktoken.*tokenizer\.json"):
        find_tokenizer(tmp_path, None)
    save_tokenizer(tmp_path)
    assert find_tokenizer(tmp_path / "consolidated", None) == tmp_path


def test_what_is_unusual_but_right_is_read(place: Path) -> None:
    """A byte order mark, links as the hub's cache has them, `auto_map` that names code, NaN for weights."""
    folder = place / "checkpoint"
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    (place / "blobs").mkdir()
    for file in list(folder.iterdir()):
        shutil.move(file, place / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    change_weights(place / "blobs/model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    Tokenizer(folder)
    model = load_model(folder)
    assert model.norm.weight.isnan().all()
    (place / "saved").mkdir()
    model.config.save(place / "saved", torch.float32)
    assert "auto_map" not in json.loads((place / "saved/config.json").read_text())
    assert LLaMAConfig.from_checkpoint(place / "saved") == model.config


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path, kind: str) -> None:
    models = [make_hf_model(seed) for seed in (1, 2)]
    for model, size in zip(models, ("1GB", "40KB"), strict=True):
        model.save_pretrained(tmp_path, max_shard_size=size)
        if size == "1GB":
            shutil.move(tmp_path / "model.safetensors", tmp_path / "kept")
    shutil.move(tmp_path / "kept", tmp_path / "model.safetensors")
    if kind == "bin":  # transformers has both kinds here, and safetensors first
        torch.save(models[1].state_dict(), tmp_path / "pytorch_model.bin")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.norm.weight
    embedding = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.embed_tokens.weight
    assert torch.equal(embedding, models[0].model.embed_tokens.weight)
    ours = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(ours.embed_tokens.weight, embedding)
    assert torch.equal(ours.norm.weight, theirs)
