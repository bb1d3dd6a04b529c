"""What users get wrong: one clear line on stderr, a non-zero status, and nothing on disk is touched."""

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
    CHECKPOINT,
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
    adapter,
    assert_refused,
    change_weights,
    conversation,
    edit_json,
    no_space,
    other_model,
    other_tokenizer,
    pickled_code,
    place,
    shrink_embedding,
    truncate,
    write,
)
from conftest import load_script, save_tokenizer

from lit_llama import cli

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
    "index of a missing file": (
        write("checkpoint/model.safetensors.index.json", '{"weight_map": {"a": "model-00001.safetensors"}}'),
        *(BASE, ASK, r"index.json: names model-00001.safetensors, which is not in this folder"),
    ),
    "index that leaves the folder": (
        write("checkpoint/model.safetensors.index.json", '{"weight_map": {"a": "../lora/adapter_model.safetensors"}}'),
        *(BASE, ASK, r"index.json: names \.\./lora"),
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_touched(place: Path, monkeypatch, capsys, case: tuple) -> None:
    assert_refused(place, case, monkeypatch, capsys)


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 25


def test_a_tokenizer_of_tiktoken_ranks_is_named(tmp_path: Path) -> None:
    find_tokenizer = load_script(META).find_tokenizer
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(cli.UserError, match=r"tiktoken.*tokenizer\.json"):
        find_tokenizer(tmp_path, None)
    save_tokenizer(tmp_path)
    assert find_tokenizer(tmp_path / "consolidated", None) == tmp_path
