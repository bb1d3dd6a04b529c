"""Every reader of a model's files under seeded mutations: it reads, or says in one line what is wrong, and never more.

A campaign of 11,000 tries, with figures:  FUZZ_TRIES=525 python -m pytest -q -s tests/test_fuzz.py
"""

# ruff: noqa: F811, pytest finds the fixture `place` by its name

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from bad_input import adapter, place  # noqa: F401
from conftest import load_script, make_hf_model, save_sentencepiece, save_tokenizer
from fuzzing import any_value, attack, json_bytes, mutate_bytes, mutate_json
from model_files import join_safetensors, read_gguf, read_zip, split_safetensors, write_gguf, write_zip
from test_convert import byte_level_bpe, meta_tensors, noisy, save_gguf

from lit_llama import LLaMA, LLaMAConfig, Tokenizer, UserError, load_model
from lit_llama.adapter import load_adapter
from lit_llama.checkpoint import WeightFiles
from lit_llama.data import open_prepared
from lit_llama.files import load_pickled
from lit_llama.lora import read_lora
from lit_llama.methods import base_linears, base_name
from lit_llama.run_folder import Progress, check_flags, load_state, save_state

Make = Callable[[Random], object]


def json_file(file: Path) -> Make:
    """Writes the JSON file that is there with changes."""
    value = json.loads(file.read_text())
    return lambda random: file.write_bytes(json_bytes(mutate_json(value, random), random))


def safetensors_file(file: Path) -> Make:
    """Writes the safetensors file that is there with changes to its header's entries, its length, or any bytes."""
    content = file.read_bytes()
    header, body = split_safetensors(content)

    def make(random: Random) -> None:
        kind = random.randrange(4)
        if kind == 0:
            file.write_bytes(mutate_bytes(content, random))
        elif kind == 1:
            file.write_bytes(join_safetensors(json_bytes(mutate_json(header, random), random), body))
        elif kind == 2:
            file.write_bytes(mutate_bytes(join_safetensors(header, body)[: 8 + len(json.dumps(header))], random) + body)
        else:
            file.write_bytes(join_safetensors(mutate_json(header, random, 1), body))

    return make


def zip_file(file: Path) -> Make:
    """Writes the `.bin` or `.pth` that is there with changes to its parts, its pickle most of all, or to any bytes."""
    content = file.read_bytes()
    parts = read_zip(content)
    pickled = next(name for name in parts if name.endswith("data.pkl"))

    def make(random: Random) -> None:
        if random.randrange(4) == 0:
            file.write_bytes(mutate_bytes(content, random))
            return
        name = pickled if random.random() < 0.8 else random.choice(list(parts))
        changed = parts | {name: mutate_bytes(parts[name], random, 1)}
        if random.random() < 0.1:
            del changed[random.choice(list(changed))]
        file.write_bytes(write_zip(changed))

    return make


def survives(name: str, make: Make, read: Callable[[], object]) -> None:
    """The whole file is read, and changed ones are attacks."""
    read()
    attack(name, make, read)


def test_config(place: Path) -> None:
    def read() -> None:
        config = LLaMAConfig.from_checkpoint(place / "checkpoint")
        if config.num_hidden_layers < 4:
            with torch.device("meta"):
                LLaMA(config)

    survives("config.json", json_file(place / "checkpoint/config.json"), read)


def test_safetensors(place: Path) -> None:
    def read() -> None:
        source = WeightFiles(place / "checkpoint")
        for name in source.places:
            source.read(name)

    survives("safetensors", safetensors_file(place / "checkpoint/model.safetensors"), read)


def test_weights(place: Path) -> None:
    """With everything from the header to the model."""
    make = safetensors_file(place / "checkpoint/model.safetensors")
    survives("weights", make, lambda: load_model(place / "checkpoint"))


def test_index(place: Path) -> None:
    folder = place / "checkpoint"
    (folder / "model.safetensors").unlink()
    make_hf_model(num_key_value_heads=2).save_pretrained(folder, max_shard_size="40KB")
    survives("index", json_file(folder / "model.safetensors.index.json"), lambda: load_model(folder))


def test_bin(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    weights = {f"weight {number}": torch.randn(3, number) for number in range(1, 4)}
    torch.save(weights | {"half": torch.ones(2, dtype=torch.bfloat16), "view": torch.randn(4, 4).t()}, file)

    def read() -> None:
        for tensor in load_pickled(file).values():
            tensor.to(torch.float32).sum()

    survives(".bin", zip_file(file), read)


def test_meta_pth(tmp_path: Path) -> None:
    script, hf_model = load_script("scripts/convert_meta_checkpoint.py"), make_hf_model()
    params = dict(dim=32, n_layers=2, n_heads=4, norm_eps=1e-5, vocab_size=-1, rope_theta=1e4, multiple_of=256)
    torch.save(meta_tensors(hf_model), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    weights, settings = zip_file(tmp_path / "consolidated.00.pth"), json_file(tmp_path / "params.json")
    original = (tmp_path / "consolidated.00.pth").read_bytes()

    def make(random: Random) -> None:
        (tmp_path / "consolidated.00.pth").write_bytes(original)
        (tmp_path / "params.json").write_text(json.dumps(params))
        random.choice([weights, settings])(random)

    def read() -> None:
        shards, params = [load_pickled(tmp_path / "consolidated.00.pth")], script.read_json(tmp_path / "params.json")
        config = script.make_config(params, shards, tmp_path, None)
        list(script.convert(shards, config, tmp_path, torch.bfloat16))

    survives("meta", make, read)


def test_lit_pth(tmp_path: Path) -> None:
    script, file = load_script("scripts/convert_lit_checkpoint.py"), tmp_path / "lit.pth"
    save_tokenizer(tmp_path)
    layer = {"rms_1.scale": (8,), "attn.c_attn.weight": (24, 8), "attn.c_proj.weight": (8, 8), "rms_2.scale": (8,)}
    layer |= {"mlp.c_fc1.weight": (16, 8), "mlp.c_fc2.weight": (16, 8), "mlp.c_proj.weight": (8, 16)}
    top = {"transformer.wte.weight": (40, 8), "transformer.ln_f.scale": (8,), "lm_head.weight": (40, 8)}
    shapes = top | {f"transformer.h.0.{name}": shape for name, shape in layer.items()}
    torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, file)
    out = tmp_path / "out"

    def read() -> None:
        script.main(file, out, num_attention_heads=2)
        shutil.rmtree(out)

    survives("lit", zip_file(file), read)


@pytest.mark.parametrize("part", ["bytes", "metadata", "tensors"])
def test_gguf(tmp_path: Path, part: str) -> None:
    script, file = load_script("scripts/convert_gguf_checkpoint.py"), tmp_path / "model.gguf"
    save_gguf(noisy(vocab_size=300), file, byte_level_bpe(tmp_path))
    content, (metadata, tensors) = file.read_bytes(), read_gguf(file)
    head = len(content) - sum(len(data) for _, _, data in tensors.values())

    def make(random: Random) -> None:
        if part == "bytes":
            start = random.choice([0, 24, random.randrange(head)])
            file.write_bytes(content[:start] + mutate_bytes(content[start:head], random) + content[head:])
        elif part == "metadata":
            # at the top half of the time: hardly any of the many values are there
            changed = dict(metadata)
            if random.random() < 0.5:
                changed[random.choice(list(metadata))] = any_value(random)
            else:
                changed = mutate_json(metadata, random)
            file.write_bytes(write_gguf(changed if isinstance(changed, dict) else {}, tensors))
        else:
            changed = {name: list(tensor) for name, tensor in tensors.items()}
            name = random.choice(list(changed))
            kind = random.randrange(5)
            if kind == 0:
                changed[name][0] = [random.choice([0, 1, 2, 32, 2**31, 2**63]) for _ in range(random.randrange(5))]
            elif kind == 1:
                changed[name][1] = random.randrange(45)
            elif kind == 2:
                changed["blk.7.attn_q.weight" if random.random() < 0.5 else "\0"] = changed.pop(name)
            elif kind == 3:
                changed[name][2] = changed[name][2][: random.randrange(100)]
            shift = random.choice([32, 1, -32, 2**40, 2**63]) if kind == 4 else 0
            file.write_bytes(write_gguf(metadata, changed, shift=shift))

    def read() -> None:
        fields, tensors = script.read_gguf(file)
        config = script.make_config(fields, tensors, file)
        script.make_tokenizer(fields, config, file)
        list(script.convert(tensors, config, file, torch.bfloat16))

    survives(f"GGUF's {part}", make, read)


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("the dog</s> é 🦙", bos=False, special=True)
    tokenizer.decode([*ids, 0, 5])


def test_tokenizer_json(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    survives("tokenizer.json", json_file(tmp_path / "tokenizer.json"), lambda: use_tokenizer(tmp_path))


def test_tokenizer_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    save_sentencepiece(file, ["the quick brown fox jumps over the lazy dog, and then the other one"] * 8, 300)
    content = file.read_bytes()
    make = lambda random: file.write_bytes(mutate_bytes(content, random))  # noqa: E731
    survives("tokenizer.model", make, lambda: use_tokenizer(tmp_path))


def test_tokenizer_settings(tmp_path: Path) -> None:
    """tokenizer_config.json, and beside a tokenizer.model the tokens that are added to it."""
    save_sentencepiece(tmp_path / "tokenizer.model", ["the quick brown fox, and then the other one"] * 8, 280)
    contents = {
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>", "special": True},
            "eos_token": "</s>",
            "add_bos_token": True,
            "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        },
        "added_tokens.json": {"<pad>": 300, "<|im_end|>": 301},
        "config.json": {"vocab_size": 400, "bos_token_id": 1, "eos_token_id": [2, 3]},
    }

    def make(random: Random) -> None:
        for name, content in contents.items():
            (tmp_path / name).write_text(json.dumps(content))
        name = random.choice(list(contents))
        (tmp_path / name).write_bytes(json_bytes(mutate_json(contents[name], random), random))

    survives("tokenizer_config.json", make, lambda: use_tokenizer(tmp_path))


def layer_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    linears = base_linears(load_model(folder))
    return {base_name(name): (linear.out_features, linear.in_features) for name, linear in linears.items()}


def test_lora_settings(place: Path) -> None:
    sizes, file = layer_sizes(place / "checkpoint"), place / "lora/adapter_config.json"
    value = json.loads(file.read_text()) | {"alpha_pattern": {"q_proj": 4, r"layers\.1\..*v_proj": 8.0}}
    file.write_text(json.dumps(value | {"rank_pattern": {}}))
    survives("LoRA's settings", json_file(file), lambda: read_lora(place / "lora", sizes))


def test_lora_weights(place: Path) -> None:
    sizes = layer_sizes(place / "checkpoint")
    make = safetensors_file(place / "lora/adapter_model.safetensors")
    survives("LoRA's weights", make, lambda: read_lora(place / "lora", sizes))


@pytest.mark.parametrize("part", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter(place: Path, part: str) -> None:
    adapter(place)
    config = LLaMAConfig.from_checkpoint(place / "checkpoint")
    make = (json_file if part.endswith("json") else safetensors_file)(place / "lora" / part)

    def read() -> None:
        with torch.device("meta"):
            model = LLaMA(config)
        load_adapter(model, place / "lora")

    survives(f"adapter's {part}", make, read)


def test_step_folder(tmp_path: Path) -> None:
    fabric = SimpleNamespace(global_rank=0, world_size=1, device=torch.device("cpu"), is_global_zero=True)
    module = torch.nn.Linear(6, 4)
    trained, optimizer = dict(module.named_parameters()), torch.optim.AdamW(module.parameters())

    def read() -> None:
        load_state(tmp_path / "step", fabric, trained, torch.optim.AdamW(module.parameters()))

    module(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    (tmp_path / "step").mkdir()
    save_state(tmp_path / "step", fabric, trained, optimizer, Progress(step=3, samples=6, data_sha256="0"))
    shutil.copytree(tmp_path / "step", tmp_path / "whole")
    makes = [
        json_file(file) if file.suffix == ".json" else safetensors_file(file) for file in (tmp_path / "step").iterdir()
    ]

    def make(random: Random) -> None:
        shutil.rmtree(tmp_path / "step")
        shutil.copytree(tmp_path / "whole", tmp_path / "step")
        random.choice(makes)(random)

    state = torch.get_rng_state()
    try:
        survives("step folder", make, read)
    finally:
        torch.set_rng_state(state)


def test_prepared_set(place: Path) -> None:
    folder, tokenizer = place / "data", Tokenizer(place / "checkpoint")
    config = LLaMAConfig.from_checkpoint(place / "checkpoint")
    shutil.copytree(folder, place / "whole")
    makes = [json_file(folder / "meta.json"), *map(safetensors_file, folder.glob("*.safetensors"))]

    def make(random: Random) -> None:
        shutil.copytree(place / "whole", folder, dirs_exist_ok=True)
        random.choice(makes)(random)

    def read() -> None:
        for samples in open_prepared(folder, tokenizer, config)[:2]:
            samples.micro_batch(list(range(min(len(samples), 5))), torch.device("cpu"))

    survives("prepared set", make, read)


def test_config_yaml(tmp_path: Path) -> None:
    flags = "seed: 1\ntrain:\n  epochs: 3\n  batch_size: 8\nlora:\n  targets: [q_proj, v_proj]\n  alpha: 16.0\n"
    file = tmp_path / "config.yaml"
    file.write_text(flags)
    make = lambda random: file.write_bytes(mutate_bytes(flags.encode(), random))  # noqa: E731
    survives("config.yaml", make, lambda: check_flags(tmp_path, flags))


def test_a_fault_of_a_reader_is_found(tmp_path: Path) -> None:
    """What the attack is for: an exception of another kind, and a message of two lines, are no pass."""

    def crashes() -> None:
        raise IndexError("beyond")

    with pytest.raises(AssertionError, match="a reader, try 0: IndexError: beyond"):
        attack("a reader", lambda random: None, crashes, 1)

    def refuses() -> None:
        raise UserError("a\nb" + "c" * 5000)

    assert attack("a reader", lambda random: None, refuses, 3) == 0
    assert attack("a reader", lambda random: None, lambda: None, 3) == 3
