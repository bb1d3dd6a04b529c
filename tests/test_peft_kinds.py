"""What PEFT and the tools on top of it write, each kind alone, merged, and held among many."""

import json
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import load_script, make_hf_model, save_checkpoint_folder, save_tokenizer
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.fast.decoding import StaticLLaMA, optimize_for_inference
from lit_llama.generation import generate
from lit_llama.lora import load_lora, merge_lora
from lit_llama.multi_lora import enable_multi_lora, load_adapter, set_adapters
from lit_llama.prompts import encode_prompt, get_template
from lit_llama.storage.methods import (
    common_model_dir,
    load_finetuned,
    load_method,
    training_template,
)

CPU = torch.device("cpu")
INPUT_IDS = torch.randint(380, (2, 20), generator=torch.Generator().manual_seed(1))
TABLES = ["embed_tokens", "lm_head"]
# by name: settings of PEFT's LoraConfig, and size of a resized vocabulary
KINDS: dict[str, tuple[dict, int | None]] = {
    "linear layers": (dict(target_modules=["q_proj", "v_proj"]), None),
    "embedding": (dict(target_modules=["q_proj", "embed_tokens"]), None),
    "embedding, rsLoRA": (dict(target_modules=["embed_tokens"], use_rslora=True), None),
    "embedding, DoRA": (dict(target_modules=["q_proj", *TABLES], use_dora=True), None),
    "head": (dict(target_modules=["q_proj", "lm_head"]), None),
    "embedding and head": (dict(target_modules=["q_proj", *TABLES]), None),
    "tied LoRA": (dict(target_modules=["q_proj", TABLES[0]], ensure_weight_tying=True), None),
    "saved embedding": (dict(target_modules=["q_proj"], modules_to_save=TABLES[:1]), None),
    "saved head": (dict(target_modules=["q_proj"], modules_to_save=TABLES[1:]), None),
    "saved both": (dict(target_modules=["q_proj"], modules_to_save=TABLES), None),
    "saved and tied": (
        dict(target_modules=["q_proj"], modules_to_save=TABLES[:1], ensure_weight_tying=True),
        None,
    ),
    "saved head, LoRA of the embedding": (
        dict(target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
        None,
    ),
    "more tokens": (dict(target_modules=["q_proj"]), 390),
    "fewer tokens": (dict(target_modules=["q_proj"]), 381),
    "more tokens, saved": (dict(target_modules=["q_proj"], modules_to_save=TABLES), 390),
    "more tokens, saved embedding": (
        dict(target_modules=["q_proj"], modules_to_save=TABLES[:1]),
        390,
    ),
    "more tokens, LoRA of both": (dict(target_modules=["q_proj", *TABLES]), 390),
    "trained tokens": (dict(target_modules=["q_proj"], trainable_token_indices=[3, 370]), None),
    "trained tokens by layer": (
        dict(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [5]},
        ),
        None,
    ),
    "more tokens, trained": (dict(target_modules=["q_proj"], trainable_token_indices=[388]), 390),
}
CASES = [(name, tied) for name in KINDS for tied in (False, True)]
# PEFT ties such LoRAs in a way that depends on a tied model; rows by layer only make sense untied
CASES = [case for case in CASES if case not in [("trained tokens by layer", True)]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """An untied and a tied model folder."""
    folders = {}
    for tied in (False, True):
        folders[tied] = tmp_path_factory.mktemp("base") / "model"
        save_checkpoint_folder(folders[tied], tie_word_embeddings=tied, num_key_value_heads=2)
    return folders


def base_of_peft(folder: Path, size: int | None) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if size is not None:
        model.resize_token_embeddings(size)
    return model


def write(folder: Path, path: Path, settings: dict, size: int | None = None) -> None:
    """Write a LoRA, away from its start."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base_of_peft(folder, size), config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)


@torch.no_grad()
def logits_of_peft(folder: Path, path: Path, ids: Tensor, size: int | None = None) -> Tensor:
    model = PeftModel.from_pretrained(base_of_peft(folder, size), path).eval()
    return model(ids).logits


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_a_kind_alone_merged_and_among_many(
    bases: dict[bool, Path], tmp_path: Path, kind: str, tied: bool
) -> None:
    settings, size = KINDS[kind]
    base, path = bases[tied], tmp_path / "lora"
    write(base, path, settings, size)
    expected = logits_of_peft(base, path, INPUT_IDS, size)
    plain = load_model(base, dtype=torch.float32)(INPUT_IDS)
    if size in (None, plain.size(-1)):
        assert (expected - plain).abs().max() > 0.1

    model = load_model(base, dtype=torch.float32)
    load_lora(model, path)
    assert (model(INPUT_IDS) - expected).abs().max() < 1e-4
    merge_lora(model)
    assert (model(INPUT_IDS) - expected).abs().max() < 1e-4

    load_script("scripts/merge_lora.py").main(path, tmp_path / "merged", base, "32-true")
    config = json.loads((tmp_path / "merged/config.json").read_text("utf-8"))
    assert config["vocab_size"] == expected.size(-1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (theirs(INPUT_IDS).logits - expected).abs().max() < 1e-4
    if not config["tie_word_embeddings"]:
        assert theirs.lm_head.weight is not theirs.model.embed_tokens.weight

    other = tmp_path / "other"
    write(base, other, dict(target_modules="all-linear"))
    expected_other = logits_of_peft(base, other, INPUT_IDS)
    for optimized in (False, True):
        model = load_model(base, dtype=torch.float32)
        enable_multi_lora(model, [other])
        if optimized:
            optimize_for_inference(model, torch.device("cpu"))
        load_adapter(model, "this", path)
        set_adapters(model, ["this", None, str(other), "this"])
        ids = torch.stack([INPUT_IDS[0], INPUT_IDS[0], INPUT_IDS[1], INPUT_IDS[1]])
        logits = model(ids)
        both = expected.size(-1)
        assert (logits[0, :, :both] - expected[0]).abs().max() < 1e-4
        assert (logits[3, :, :both] - expected[1]).abs().max() < 1e-4
        assert (logits[1, :, : plain.size(-1)] - plain[0]).abs().max() < 1e-5
        assert (logits[2, :, : plain.size(-1)] - expected_other[1]).abs().max() < 1e-4
        # what a row's own vocabulary lacks is never sampled
        assert logits[0, :, both:].eq(-torch.inf).all()
        assert logits[1, :, plain.size(-1) :].eq(-torch.inf).all()
        assert logits.size(-1) == max(both, plain.size(-1))
        # only the labels of some tokens, as in the prefill of decoding
        positions = torch.tensor([4, 25, 45, 79])
        at = model(ids.flatten(), [20] * 4, label_positions=positions)
        torch.testing.assert_close(at, logits.flatten(0, 1)[positions], atol=1e-5, rtol=0)


@pytest.fixture
def plain_lora(bases: dict[bool, Path], tmp_path: Path) -> Path:
    write(bases[False], tmp_path / "lora", dict(target_modules=["q_proj", "v_proj"]))
    return tmp_path / "lora"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear layers", "embedding, DoRA", "saved both"])
def test_bin_and_names_with_the_adapter(bases: dict[bool, Path], tmp_path: Path, kind: str) -> None:
    """As `torch.save(model.state_dict())` names them, with other names than `default`, too."""
    base, path = bases[False], tmp_path / "lora"
    write(base, path, KINDS[kind][0])
    expected = logits_of_peft(base, path, INPUT_IDS)
    renamed = {}
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        layer, _, attribute = name.rpartition(".")
        if attribute.startswith("lora_"):
            name = f"{name}.mine.weight" if "magnitude" in attribute else f"{name}.mine"
        elif ".lora_" in name:
            name = f"{layer}.mine.{attribute}"
        elif kind == "saved both":
            name = f"{layer}.modules_to_save.mine.{attribute}"
            renamed[f"{layer}.original_module.{attribute}"] = load_file(base / "model.safetensors")[
                f"{layer.removeprefix('base_model.model.')}.{attribute}"
            ]
        renamed[name] = tensor
    (path / "adapter_model.safetensors").unlink()
    torch.save(renamed, path / "adapter_model.bin")
    model = load_model(base, dtype=torch.float32)
    load_method(model, path)
    assert (model(INPUT_IDS) - expected).abs().max() < 1e-4
    assert training_template(path) is None
    # safetensors come first
    save_file({key: t * 2 for key, t in renamed.items()}, path / "x.safetensors")
    (path / "x.safetensors").rename(path / "adapter_model.safetensors")
    model = load_model(base, dtype=torch.float32)
    load_lora(model, path)
    assert (model(INPUT_IDS) - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.model.", "base_model.model._orig_mod.model."),
        ("base_model.", "_orig_mod.base_model."),
        ("base_model.", "module.base_model."),
        (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        (".self_attn.", "._fsdp_wrapped_module.self_attn._fsdp_wrapped_module."),
    ],
)
def test_names_of_what_wrapped_the_model(
    bases: dict[bool, Path], plain_lora: Path, old: str, new: str
) -> None:
    """torch.compile, activation checkpointing, FSDP and DDP."""
    expected = logits_of_peft(bases[False], plain_lora, INPUT_IDS)
    file = plain_lora / "adapter_model.safetensors"
    renamed = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file)
    model = load_model(bases[False], dtype=torch.float32)
    load_lora(model, plain_lora)
    assert (model(INPUT_IDS) - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(tmp_path: Path, has_biases: bool, bias: str) -> None:
    """Of models that have some; those without leave none to train."""
    base, path = tmp_path / "base", tmp_path / "lora"
    save_checkpoint_folder(base, attention_bias=has_biases, mlp_bias=has_biases)
    model = get_peft_model(
        base_of_peft(base, None),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", bias=bias),
    )
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    expected = logits_of_peft(base, path, INPUT_IDS)
    model, many = (load_model(base, dtype=torch.float32) for _ in range(2))
    load_lora(model, path)
    assert (model(INPUT_IDS) - expected).abs().max() < 1e-4
    load_script("scripts/merge_lora.py").main(path, tmp_path / "merged", base, "32-true")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (theirs(INPUT_IDS).logits - expected).abs().max() < 1e-4
    enable_multi_lora(many)
    if has_biases:
        with pytest.raises(UserError, match=r"has a layers.0.*bias of its own, .*merge_lora.py"):
            load_adapter(many, "this", path)
    else:
        load_adapter(many, "this", path)
        set_adapters(many, [None, "this"])
        assert (many(INPUT_IDS)[1] - expected[1]).abs().max() < 1e-4


@torch.no_grad()
def test_saved_norms_and_projections(bases: dict[bool, Path], tmp_path: Path) -> None:
    """Alone and merged; the rows of a batch cannot have norms of their own."""
    base, path = bases[False], tmp_path / "lora"
    write(base, path, dict(target_modules=["q_proj"], modules_to_save=["norm", "o_proj"]))
    model = load_model(base, dtype=torch.float32)
    load_lora(model, path)
    assert (model(INPUT_IDS) - logits_of_peft(base, path, INPUT_IDS)).abs().max() < 1e-4
    many = load_model(base, dtype=torch.float32)
    enable_multi_lora(many)
    with pytest.raises(UserError, match=r"weight of its own, .*scripts/merge_lora.py"):
        load_adapter(many, "this", path)


@torch.no_grad()
def test_merging_does_not_round_the_base_twice(bases: dict[bool, Path], tmp_path: Path) -> None:
    """In bf16, a copy of the base that PEFT stores in fp32 is no change of it."""
    base, path = bases[True], tmp_path / "lora"
    write(base, path, dict(target_modules=["embed_tokens"]))
    model, untouched = load_model(base), load_model(base)
    load_lora(model, path)
    assert torch.equal(model.lm_head.weight, untouched.embed_tokens.weight)
    weights = load_file(path / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens"
    update = weights[f"{prefix}.lora_embedding_B"] @ weights[f"{prefix}.lora_embedding_A"]
    expected = untouched.embed_tokens.weight.float() + 6 / 4 * update.T
    assert torch.equal(model.embed_tokens.weight, expected.bfloat16())


@torch.no_grad()
def test_answers_of_rows_with_other_vocabularies(bases: dict[bool, Path], tmp_path: Path) -> None:
    """Greedy and sampled, also with the static cache of a GPU."""
    base, names = bases[True], ["more tokens, LoRA of both", "fewer tokens", "embedding"]
    prompts = [torch.arange(5, 12), torch.arange(7, 20), torch.arange(30, 35), torch.arange(5, 9)]
    alone = []
    for number, name in enumerate(names):
        write(base, tmp_path / str(number), *KINDS[name])
        model = load_model(base, dtype=torch.float32)
        load_lora(model, tmp_path / str(number))
        alone.append(generate(model, prompts[number], 12, temperature=0))
    alone.append(generate(load_model(base, dtype=torch.float32), prompts[3], 12, temperature=0))
    for static in (False, True):
        model = load_model(base, dtype=torch.float32)
        enable_multi_lora(model, [tmp_path / str(number) for number in range(3)])
        if static:
            model.__class__ = StaticLLaMA
        set_adapters(model, [*(str(tmp_path / str(number)) for number in range(3)), None])
        for tokens, expected in zip(
            generate(model, prompts, 12, temperature=0), alone, strict=True
        ):
            assert torch.equal(tokens, expected)
    sampled = generate(model, prompts, 300, temperature=100.0, seed=2)
    largest = [int(tokens.max()) for tokens in sampled]
    assert largest[0] >= 384 > max(largest[2:])
    assert largest[1] < 381


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_layers_for_decoding_keep_the_tables(
    bases: dict[bool, Path], tmp_path: Path, tied: bool, quantize: str | None
) -> None:
    """In bf16, with the LoRA loaded before the layers change their form, and after."""
    base, path = bases[tied], tmp_path / "lora"
    write(base, path, *KINDS["embedding and head"])
    single = load_model(base)
    load_lora(single, path)
    expected = [model(INPUT_IDS[:1])[0] for model in (single, load_model(base))]
    for first in (False, True):
        model = load_model(base)
        enable_multi_lora(model, [path] if first else [])
        optimize_for_inference(model, torch.device("cpu"), quantize)
        if not first:
            load_adapter(model, str(path), path)
        set_adapters(model, [str(path), None])
        with torch.inference_mode():
            logits = model(INPUT_IDS[[0, 0]])
        for row, reference in zip(logits, expected, strict=True):
            assert (row - reference).norm() < 0.05 * reference.norm()
    assert (expected[0] - expected[1]).norm() > 0.5 * expected[0].norm()


UNSUPPORTED = {
    "bias of B": (dict(lora_bias=True), "lora_bias is True"),
    "parameters": (dict(target_parameters=["o_proj.weight"]), "target_parameters is"),
}


@pytest.mark.parametrize(("settings", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_settings_have_a_name(
    bases: dict[bool, Path], tmp_path: Path, settings: dict, message: str
) -> None:
    write(bases[False], tmp_path / "lora", dict(target_modules=["q_proj"]) | settings)
    with pytest.raises(UserError, match=message):
        load_lora(load_model(bases[False]), tmp_path / "lora")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(use_qalora=True), "use_qalora is True, which is not supported"),
        (dict(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
        (dict(layer_replication=[[0, 2]]), "layer_replication is"),
        (
            dict(peft_type="VERA"),
            r"'VERA' is not supported. Known: LORA, llama_adapter, llama_adapter_v2$",
        ),
    ],
)
def test_settings_that_change_the_sum_are_refused(
    bases: dict[bool, Path], plain_lora: Path, values: dict, message: str
) -> None:
    file = plain_lora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_method(load_model(bases[False]), plain_lora)
    assert "another model" not in str(caught.value)


def test_other_methods_of_peft_have_a_name(bases: dict[bool, Path], tmp_path: Path) -> None:
    configs = {
        "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in configs.items():
        get_peft_model(base_of_peft(bases[False], None), config).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"'{name}' is not supported. Known: LORA"):
            load_method(load_model(bases[False]), tmp_path / name)


def test_what_a_file_lacks_or_has_too_much(bases: dict[bool, Path], tmp_path: Path) -> None:
    path = tmp_path / "lora"
    write(bases[False], path, *KINDS["more tokens, LoRA of both"])
    weights = load_file(path / "adapter_model.safetensors")

    def refused(tensors: dict[str, Tensor], message: str, base: Path = bases[False]) -> None:
        save_file(tensors, path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            load_lora(load_model(base), path)

    without = {key: t for key, t in weights.items() if "base_layer" not in key}
    refused(without, "its embed_tokens has 390 tokens, the model 384. .*save_embedding_layers")
    half = {key: t for key, t in weights.items() if "lm_head" not in key}
    refused(half, "embed_tokens would have 390 rows, lm_head 384")
    extra = weights | {"base_model.model.score.weight": torch.zeros(2, 32)}
    refused(extra, "score.weight is neither a LoRA's nor a weight of the model")
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    refused(weights | {name: torch.zeros(8, 1, dtype=torch.uint8)}, "quantized weights are not")
    empty = {key: torch.zeros(0) if "layers.0" in key else t for key, t in weights.items()}
    refused(empty, r"layers.0.* is empty, as DeepSpeed leaves it")
    name = "base_model.model.lm_head.lora_A"
    second = {f"{name}.b.weight": weights[f"{name}.weight"].clone()}
    refused(weights | second, "holds several LoRAs")
    make_hf_model(hidden_size=64).save_pretrained(tmp_path / "other")
    refused(weights, "It belongs to another model", tmp_path / "other")
    layer = {key.replace("layers.1", "layers.7"): tensor for key, tensor in weights.items()}
    refused(layer, r"the model has no layer layers.7.self_attn.q_proj. It belongs to another model")
    settings = json.loads((path / "adapter_config.json").read_text("utf-8"))
    settings["modules_to_save"] = ["classifier", "norm"]  # the former is not in the model
    (path / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    refused(weights, "norm of modules_to_save is missing in its weights")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def own_files(path: Path) -> None:
    """Write a tokenizer with a chat template and an end token of its own."""
    save_tokenizer(path)
    file = path / "tokenizer_config.json"
    options = json.loads(file.read_text("utf-8"))
    options |= dict(eos_token="<|im_end|>", chat_template=CHATML, add_bos_token=False)
    file.write_text(json.dumps(options), "utf-8")


def test_the_tokenizer_of_the_lora_comes_first(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path
) -> None:
    """In answering and in merging: as one set, with its template and its end token."""
    base = bases[False]
    own_files(plain_lora)
    model, tokenizer, template = load_finetuned(plain_lora, base, CPU, torch.float32)
    assert (tokenizer.path.parent, template) == (plain_lora, "chat")
    assert (tokenizer.eos_id, model.config.eos_token_id) == (4, [4, 2])
    assert not tokenizer.adds_bos
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/special_tokens_map.json").write_text('{"eos_token": "<pad>"}', "utf-8")
    settings = json.dumps({"eos_token_id": 2, "temperature": 0.5})
    (tmp_path / "base/generation_config.json").write_text(settings, "utf-8")
    merge = load_script("scripts/merge_lora.py").main
    merge(plain_lora, tmp_path / "merged", tmp_path / "base", "32-true")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.eos_token_id, merged.chat_template) == (4, tokenizer.chat_template)
    in_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert in_transformers.generation_config.eos_token_id == [4, 2]
    assert in_transformers.generation_config.temperature == 0.5
    assert load_finetuned(tmp_path / "merged", None, CPU, torch.float32)[2] == "chat"


def test_a_template_or_end_token_without_a_tokenizer(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path
) -> None:
    base = bases[False]
    assert load_finetuned(plain_lora, base, CPU, torch.float32)[2] == "alpaca"
    (plain_lora / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    (plain_lora / "generation_config.json").write_text('{"eos_token_id": [7]}', "utf-8")
    model, tokenizer, template = load_finetuned(plain_lora, base, CPU, torch.float32)
    assert (tokenizer.path.parent, template) == (base, "chat")
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert model.config.eos_token_id == [7, 2]
    load_script("scripts/merge_lora.py").main(plain_lora, tmp_path / "merged", base, "32-true")
    assert Tokenizer(tmp_path / "merged").chat_template == "{{ messages[0].content }}"
    settings = json.loads((tmp_path / "merged/generation_config.json").read_text("utf-8"))
    assert settings["eos_token_id"] == [7, 2]


def test_what_the_folder_of_the_lora_lacks_is_the_base_s(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path, capsys
) -> None:
    """A chat template, beside a tokenizer of the LoRA's own, and which token is BOS."""
    base = tmp_path / "base"
    shutil.copytree(bases[False], base)
    (base / "chat_template.jinja").write_text(CHATML, "utf-8")
    capsys.readouterr()  # what PEFT has printed
    _, tokenizer, template = load_finetuned(plain_lora, base, CPU, torch.float32)
    assert (template, tokenizer.chat_template) == ("chat", CHATML)
    assert capsys.readouterr().err == (
        f"{plain_lora}: the prompt template of its training is not recorded. "
        "Using chat; see --template\n"
    )
    save_tokenizer(plain_lora)
    _, tokenizer, template = load_finetuned(plain_lora, base, CPU, torch.float32)
    assert tokenizer.path.parent == plain_lora
    assert (template, tokenizer.chat_template) == ("chat", CHATML)
    capsys.readouterr()
    load_script("scripts/merge_lora.py").main(plain_lora, tmp_path / "merged", base, "32-true")
    assert "prompt template" not in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML

    # without tokenizer_config.json
    (plain_lora / "tokenizer_config.json").unlink()
    file = plain_lora / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(file))
    tokenizer = load_finetuned(plain_lora, base, CPU, torch.float32)[1]
    assert tokenizer.encode("the fox") == backend.encode("the fox").ids
    assert tokenizer.bos_id == 1

    # an end token without a tokenizer
    file.unlink()
    options = {"eos_token": "<pad>", "chat_template": "{{ messages[0].content }}{{ eos_token }}"}
    (plain_lora / "tokenizer_config.json").write_text(json.dumps(options), "utf-8")
    model, tokenizer, _ = load_finetuned(plain_lora, base, CPU, torch.float32)
    assert (tokenizer.path.parent, model.config.eos_token_id) == (base, [0, 2])
    messages = [{"role": "user", "content": "question"}]
    assert get_template("chat", tokenizer).render(messages) == "question<pad>"
    load_script("scripts/merge_lora.py").main(plain_lora, tmp_path / "named", base, "32-true")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "named")
    assert theirs.eos_token == "<pad>"
    assert theirs.apply_chat_template(messages, tokenize=False) == "question<pad>"


def test_no_line_about_a_template_that_is_given(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path, capsys
) -> None:
    """Nor where none is used."""
    (tmp_path / "a.txt").write_text("the fox and the dog", "utf-8")
    script = load_script("generate/lora.py")
    args = script.AnswerArgs(prompt="the fox", max_new_tokens=2)
    script.main(args, [plain_lora], bases[False], "none")
    perplexity = load_script("evaluate/perplexity.py").main
    perplexity(bases[False], plain_lora, source=tmp_path / "a.txt")
    assert "is not recorded" not in capsys.readouterr().err
    script.main(args, [plain_lora], bases[False])
    assert "is not recorded. Using alpaca" in capsys.readouterr().err


def test_a_token_without_a_row_is_one_line(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path
) -> None:
    """In scoring as in answering; the tokenizer of a LoRA that was saved without its new rows."""
    new_tokens(plain_lora)
    (tmp_path / "a.json").write_text('[{"instruction": "a", "output": "b"}]', "utf-8")
    with pytest.raises(UserError, match=r"token id 385, .* only 384 rows. .*save its new rows"):
        load_script("evaluate/perplexity.py").main(
            bases[False], plain_lora, source=tmp_path / "a.json"
        )


def test_loras_of_other_bases(bases: dict[bool, Path], plain_lora: Path, tmp_path: Path) -> None:
    """One folder may have several names; two models are not mixed in silence."""
    other = tmp_path / "other"
    shutil.copytree(plain_lora, other)

    def name_base(path: Path, base: str) -> None:
        file = path / "adapter_config.json"
        settings = json.loads(file.read_text("utf-8")) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(settings), "utf-8")

    base, paths = bases[False], [plain_lora, other]
    name_base(plain_lora, str(base))
    name_base(other, f"{base}/../{base.name}")
    assert common_model_dir(paths).resolve() == base.resolve()
    name_base(other, str(bases[True]))
    answer = load_script("generate/lora.py")
    for call in (
        lambda: answer.main(answer.AnswerArgs(prompt="a"), paths),
        lambda: load_script("generate/chat.py").main(None, paths),
        lambda: load_script("scripts/combine_loras.py").main(paths, tmp_path / "sum"),
    ):
        with pytest.raises(UserError, match=r"these are for different models .*--checkpoint_dir"):
            call()


def test_combining_says_that_it_does_not_keep_a_tokenizer(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path, capsys
) -> None:
    own_files(plain_lora)
    load_script("scripts/combine_loras.py").main(
        [plain_lora], tmp_path / "sum", checkpoint_dir=bases[False]
    )
    expected = f"warning: {plain_lora}: its tokenizer and chat template, other than the model's"
    assert expected in capsys.readouterr().err


def test_folders_that_are_not_complete(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path
) -> None:
    """The line says what is missing, or where it is."""
    base, run = bases[False], tmp_path / "run"
    shutil.copytree(plain_lora, run / "checkpoint-500")
    with pytest.raises(UserError, match=f"There is one in {run}/checkpoint-500"):
        load_finetuned(run, base, CPU, torch.float32)
    (run / "checkpoint-500/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors.*missing"):
        load_finetuned(run / "checkpoint-500", base, CPU, torch.float32)
    file = plain_lora / "adapter_config.json"
    settings = json.loads(file.read_text("utf-8"))
    for name, value in {
        "lora_alpha": "16",
        "r": None,
        "alpha_pattern": {"q_proj": "8"},
    }.items():
        file.write_text(json.dumps(settings | {name: value}), "utf-8")
        with pytest.raises(UserError, match=r"adapter_config.json: r is .*, expected numbers"):
            load_finetuned(plain_lora, base, CPU, torch.float32)
    file.write_text(json.dumps(settings | {"use_dora": True}), "utf-8")
    with pytest.raises(UserError, match=r"Is use_dora in adapter_config.json right"):
        load_finetuned(plain_lora, base, CPU, torch.float32)
    file.write_text(json.dumps(settings), "utf-8")
    weights = load_file(plain_lora / "adapter_model.safetensors")
    for shape in ((-1,), ()):
        parts = {k: t.flatten()[:1].reshape(shape) for k, t in weights.items()}
        save_file(parts, plain_lora / "adapter_model.safetensors")
        with pytest.raises(UserError, match="or was saved in part"):
            load_finetuned(plain_lora, base, CPU, torch.float32)


@torch.no_grad()
def test_a_second_lora_that_is_called_adapter(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path
) -> None:
    """PEFT writes it into a folder of that name, where ours is a LLaMA-Adapter."""
    base = bases[False]
    write(base, plain_lora / "adapter", dict(target_modules=["o_proj"]))
    model = load_finetuned(plain_lora, base, CPU, torch.float32)[0]
    expected = logits_of_peft(base, plain_lora, INPUT_IDS)
    assert (model(INPUT_IDS) - expected).abs().max() < 1e-4


def new_tokens(path: Path) -> None:
    """Write a tokenizer that fills the rows of the base, and has chat tokens behind them."""
    save_tokenizer(path)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_tokens([f"<unused {i}>" for i in range(backend.get_vocab_size(), 384)])
    backend.add_special_tokens(["<user>", "<model>"])
    backend.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}"
    template += "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
    (path / "chat_template.jinja").write_text(template, "utf-8")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_in_prompts(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path, tied: bool, capsys, monkeypatch
) -> None:
    """They are in each prompt of a LoRA with a larger vocabulary; rows of the base lack them."""
    base, path = bases[tied], tmp_path / "new"
    write(base, path, *KINDS["more tokens, LoRA of both"])
    new_tokens(path)
    script = load_script("generate/lora.py")

    def answers(*paths: Path) -> dict:
        (tmp_path / "prompts.txt").write_text("the fox\n", "utf-8")
        args = script.AnswerArgs(
            prompt_file=tmp_path / "prompts.txt", max_new_tokens=12, temperature=0
        )
        script.main(args, list(paths), base, precision="32-true")
        return json.loads(capsys.readouterr().out)

    alone = [answers(folder)["answer"] for folder in (path, plain_lora)]
    together = answers(path, plain_lora)["answers"]
    assert list(together.values()) == alone
    monkeypatch.setattr("sys.stdin", StringIO(f"the fox\n/lora {plain_lora}\nthe fox\n"))
    script = load_script("generate/chat.py")
    script.main(base, [path], precision="32-true", max_new_tokens=12, temperature=0)
    assert capsys.readouterr().out.startswith(f"{alone[0]}\n\n{path}, base, [{plain_lora}]\n")

    model = load_model(base, dtype=torch.float32)
    enable_multi_lora(model, [path])
    prompts = [torch.tensor([384, 5, 385]), torch.tensor([5, 6])]
    set_adapters(model, [str(path), None])
    assert len(generate(model, prompts, 3, temperature=0)) == 2
    set_adapters(model, [None, str(path)])
    with pytest.raises(UserError, match="token id 385, the model's embedding only 384 rows"):
        generate(model, prompts, 3, temperature=0)


@pytest.mark.parametrize("script", ["generate/lora.py", "generate/chat.py"])
def test_a_model_folder_with_an_adapter_config(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path, script: str, capsys, monkeypatch
) -> None:
    """Named as the base of two LoRAs, it is the model, as some tools leave it."""
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(bases[False], base)
    shutil.copy(plain_lora / "adapter_config.json", base)
    shutil.copytree(plain_lora, other)
    for path in (plain_lora, other):
        file = path / "adapter_config.json"
        settings = json.loads(file.read_text("utf-8")) | {"base_model_name_or_path": str(base)}
        file.write_text(json.dumps(settings), "utf-8")
    module = load_script(script)
    monkeypatch.setattr("sys.stdin", StringIO("the fox\n"))
    if script == "generate/lora.py":
        module.main(module.AnswerArgs(prompt="the fox", max_new_tokens=4), [plain_lora, other])
    else:
        module.main(None, [plain_lora, other], max_new_tokens=4)
    assert capsys.readouterr().out


def test_a_lora_in_the_place_of_the_model(plain_lora: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "a", "output": "b"}]', "utf-8")
    main = load_script("scripts/prepare_json.py").main
    for _ in range(2):  # without a tokenizer, and with one
        with pytest.raises(UserError, match=r"lora: .*a LoRA or adapter: pass its base"):
            main(tmp_path / "a.json", plain_lora, tmp_path / "data")
        save_tokenizer(plain_lora)


def test_each_row_has_its_own_tokenizer_and_end(
    bases: dict[bool, Path], plain_lora: Path, tmp_path: Path, capsys
) -> None:
    """Two LoRAs with other templates and end tokens answer as each of them alone."""
    base, other = bases[False], tmp_path / "other"
    write(base, other, dict(target_modules=["v_proj", "embed_tokens"]))
    own_files(plain_lora)
    script = load_script("generate/lora.py")

    def answer(*paths: Path) -> dict[str, str]:
        file = tmp_path / "prompts.txt"
        file.write_text("the fox\u2028and\x0ca\nthe dog\r\n\n", "utf-8", newline="")
        args = script.AnswerArgs(prompt_file=file, max_new_tokens=30, temperature=0)
        script.main(args, list(paths), base, precision="32-true")
        lines = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
        assert [line["prompt"] for line in lines] == ["the fox\u2028and\x0ca", "the dog"]
        return lines

    before = answer(plain_lora)[1]["answer"]
    # a token of its answer becomes an end token of this LoRA alone
    model, tokenizer, _ = load_finetuned(plain_lora, base, CPU, torch.float32)
    messages = [{"role": "user", "content": "the dog"}]
    prompt = torch.tensor(encode_prompt(get_template("chat", tokenizer), tokenizer, messages))
    ends = {"eos_token_id": [int(generate(model, prompt, 6, temperature=0)[-1])]}
    (plain_lora / "generation_config.json").write_text(json.dumps(ends), "utf-8")
    alone = [answer(path) for path in (plain_lora, other)]
    assert len(alone[0][1]["answer"]) < len(before)
    for row, together in enumerate(answer(plain_lora, other)):
        expected = {
            str(p): a[row]["answer"] for p, a in zip((plain_lora, other), alone, strict=True)
        }
        assert together["answers"] == expected
