"""Other layouts of a tiny model convert to the same logits; GGUF also against `transformers`."""

import importlib.metadata
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import load_script, make_hf_model, save_sentencepiece, save_tokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lit_llama import LLaMAConfig, Tokenizer, load_model

INPUT_IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a projection in Meta's rotary order, feature by feature: 2i and 2i + 1 are a pair."""
    rows = weight.shape[0] // num_heads
    order = [
        head * rows + i % 2 * (rows // 2) + i // 2 for head in range(num_heads) for i in range(rows)
    ]
    return weight[order]


def meta_tensors(hf_model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    config, tensors = hf_model.config, {}
    for name, tensor in hf_model.state_dict().items():
        name = name.removeprefix("model.").removesuffix(".weight")
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            heads = {
                "self_attn.q_proj": config.num_attention_heads,
                "self_attn.k_proj": config.num_key_value_heads,
            }
            tensor = interleave(tensor, heads[part]) if part in heads else tensor
            name = f"layers.{layer}.{META[part]}"
        else:
            name = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}[name]
        tensors[f"{name}.weight"] = tensor.clone()
    return tensors


def cut(name: str, embedding_dim: int) -> int | None:
    """Along which dimension model-parallel training cut a tensor."""
    if name.startswith("tok_embeddings"):
        return embedding_dim
    if "norm" in name:
        return None
    return 1 if ".wo." in name or ".w2." in name else 0


def save_meta(
    hf_model: LlamaForCausalLM, folder: Path, shards: int, embedding_dim: int = 1, **params
) -> None:
    folder.mkdir()
    config = hf_model.config
    sizes = dict(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
    )
    sizes |= dict(
        norm_eps=config.rms_norm_eps, n_kv_heads=config.num_key_value_heads, vocab_size=-1
    )
    (folder / "params.json").write_text(json.dumps(sizes | params))
    for number in range(shards):
        part = {}
        for name, tensor in meta_tensors(hf_model).items():
            dim = cut(name, embedding_dim)
            part[name] = tensor if dim is None else tensor.chunk(shards, dim)[number].clone()
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{number:02}.pth")


@torch.no_grad()
def assert_same_logits(hf_model: LlamaForCausalLM, folder: Path) -> None:
    expected = hf_model(INPUT_IDS).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(
        load_model(folder, dtype=torch.float32)(INPUT_IDS), expected, atol=1e-4, rtol=0
    )  # fp32
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(theirs(INPUT_IDS).logits, expected, atol=1e-4, rtol=0)  # fp32


def noisy(**settings) -> LlamaForCausalLM:
    """Norms away from one, which would hide a forgotten one."""
    hf_model = make_hf_model(num_key_value_heads=2, **settings)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return hf_model


LLAMA3 = dict(
    rope_type="llama3",
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
META_CASES = {
    "one file": (dict(rms_norm_eps=1e-5), 1, 1, {}),
    "two shards": (dict(rms_norm_eps=1e-5), 2, 1, {}),
    "Llama 3's two shards": (
        dict(rms_norm_eps=1e-5, rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
        *(2, 0, dict(rope_theta=500000.0)),
    ),
    "Llama 3.1": (
        dict(rms_norm_eps=1e-5, rope_parameters=LLAMA3 | dict(rope_theta=500000.0, factor=8.0)),
        *(1, 0, dict(rope_theta=500000.0, use_scaled_rope=True)),
    ),
}


@pytest.mark.parametrize("case", META_CASES.values(), ids=META_CASES)
def test_meta_checkpoint_gives_the_same_logits(tmp_path: Path, case: tuple) -> None:
    settings, shards, embedding_dim, params = case
    hf_model = noisy(**settings)
    save_meta(hf_model, tmp_path / "meta", shards, embedding_dim, **params)
    save_tokenizer(tmp_path)  # beside the folder, where Meta's download of several sizes puts it
    load_script("scripts/convert_meta_checkpoint.py").main(
        tmp_path / "meta", tmp_path / "out", precision="32-true"
    )
    assert_same_logits(hf_model, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_tied_head_of_meta_is_saved_once(tmp_path: Path) -> None:
    hf_model = noisy(rms_norm_eps=1e-5, tie_word_embeddings=True)
    save_meta(hf_model, tmp_path / "meta", 1)
    save_tokenizer(tmp_path / "meta")
    load_script("scripts/convert_meta_checkpoint.py").main(
        tmp_path / "meta", tmp_path / "out", precision="32-true"
    )
    assert LLaMAConfig.from_checkpoint(tmp_path / "out").tie_word_embeddings
    assert_same_logits(hf_model, tmp_path / "out")


def test_context_of_llama_1_65b_is_that_of_llama_1() -> None:
    sizes = dict(dim=8192, n_layers=80, n_heads=64, norm_eps=1e-5)
    shards = [
        {
            "tok_embeddings.weight": torch.empty(32000, 1024),
            "layers.0.feed_forward.w1.weight": torch.empty(2752, 1),
        }
    ]
    make_config = load_script("scripts/convert_meta_checkpoint.py").make_config
    assert make_config(sizes, shards * 8, Path(), None).max_position_embeddings == 2048
    assert (
        make_config(sizes | dict(n_kv_heads=8), shards * 8, Path(), None).max_position_embeddings
        == 4096
    )


@pytest.mark.parametrize(("eps", "context"), [(1e-6, 2048), (1e-5, 4096)])
def test_contexts_of_llama_1_and_2_are_told_apart(tmp_path: Path, eps: float, context: int) -> None:
    save_meta(noisy(rms_norm_eps=eps), tmp_path / "meta", 1)
    save_tokenizer(tmp_path)
    load_script("scripts/convert_meta_checkpoint.py").main(tmp_path / "meta", tmp_path / "out")
    config = LLaMAConfig.from_checkpoint(tmp_path / "out")
    assert (config.max_position_embeddings, config.rms_norm_eps) == (context, eps)


def test_old_lit_llama_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    hf_model = make_hf_model(rms_norm_eps=1e-5)
    meta = meta_tensors(hf_model)
    lit = {
        "transformer.wte.weight": meta["tok_embeddings.weight"],
        "transformer.ln_f.scale": meta["norm.weight"],
        "lm_head.weight": meta["output.weight"],
    }
    for index in range(2):
        old, new = f"layers.{index}.", f"transformer.h.{index}."
        lit |= {
            f"{new}rms_1.scale": meta[f"{old}attention_norm.weight"],
            f"{new}attn.c_attn.weight": torch.cat(
                [meta[f"{old}attention.w{part}.weight"] for part in "qkv"]
            ),
            f"{new}attn.c_proj.weight": meta[f"{old}attention.wo.weight"],
            f"{new}rms_2.scale": meta[f"{old}ffn_norm.weight"],
            f"{new}mlp.c_fc1.weight": meta[f"{old}feed_forward.w1.weight"],
            f"{new}mlp.c_fc2.weight": meta[f"{old}feed_forward.w3.weight"],
            f"{new}mlp.c_proj.weight": meta[f"{old}feed_forward.w2.weight"],
            f"{new}attn.rope_cache": torch.ones(2),
        }
    torch.save(lit, tmp_path / "lit-llama.pth")
    save_tokenizer(tmp_path)
    convert = load_script("scripts/convert_lit_checkpoint.py").main
    convert(
        tmp_path / "lit-llama.pth", tmp_path / "out", num_attention_heads=4, precision="32-true"
    )
    assert_same_logits(hf_model, tmp_path / "out")


GGUF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_gguf(
    hf_model: LlamaForCausalLM, file: Path, tokenizer, quantize: bool = False, rope_freqs=None
) -> None:
    """As llama.cpp's converter writes a LLaMA; `tokenizer(writer)` adds the vocabulary."""
    config = hf_model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    tokenizer(writer)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in hf_model.state_dict().items():
        name = name.removesuffix(".weight")
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        if name in top:
            stored = top[name]
        else:
            _, _, layer, part = name.split(".", 3)
            heads = {
                "self_attn.q_proj": config.num_attention_heads,
                "self_attn.k_proj": config.num_key_value_heads,
            }
            tensor = interleave(tensor, heads[part]) if part in heads else tensor
            stored = f"blk.{layer}.{GGUF_LAYER[part]}"
        values = tensor.numpy()
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(
                f"{stored}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(f"{stored}.weight", np.ascontiguousarray(values))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_bpe(folder: Path):
    """Write the vocabulary of `save_tokenizer`, as llama.cpp does."""
    save_tokenizer(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]

    def add(writer: gguf.GGUFWriter) -> None:
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        kinds = [
            gguf.TokenType.CONTROL if index < 5 else gguf.TokenType.NORMAL
            for index in range(len(tokens))
        ]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)

    return add


CASES = {
    "fp32": (dict(), False),
    "tied": (dict(tie_word_embeddings=True), False),
    "linear rope": (
        dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
        False,
    ),
    "Q8_0": (dict(), True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gguf_gives_the_logits_of_transformers(tmp_path: Path, monkeypatch, case: tuple) -> None:
    # on Python 3.10 transformers finds no other version of it
    monkeypatch.setattr(gguf, "__version__", importlib.metadata.version("gguf"), raising=False)
    settings, quantize = case
    hf_model = noisy(vocab_size=300, **settings)
    save_gguf(hf_model, tmp_path / "model.gguf", byte_level_bpe(tmp_path), quantize)
    convert = load_script("scripts/convert_gguf_checkpoint.py").main
    convert(tmp_path / "model.gguf", tmp_path / "out", precision="32-true")
    if not quantize:
        assert_same_logits(hf_model, tmp_path / "out")
    if "rope_parameters" not in settings:  # which transformers does not read from GGUF
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        )
        with torch.no_grad():
            ours = load_model(tmp_path / "out", dtype=torch.float32)(INPUT_IDS)
            torch.testing.assert_close(ours, theirs(INPUT_IDS).logits, atol=1e-3, rtol=0)


def test_byte_level_bpe_of_a_gguf_gives_the_same_ids(tmp_path: Path) -> None:
    save_gguf(noisy(vocab_size=300), tmp_path / "model.gguf", byte_level_bpe(tmp_path))
    load_script("scripts/convert_gguf_checkpoint.py").main(
        tmp_path / "model.gguf", tmp_path / "out"
    )
    theirs, ours = Backend.from_file(str(tmp_path / "tokenizer.json")), Tokenizer(tmp_path / "out")
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)
    assert ours.specials == {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    for text in ("the lazy dog's  fox, 42 jumps\n", "é 🦙", "<s>the</s>"):
        assert ours.encode(text, bos=False, special=True) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_sentencepiece_of_a_gguf_gives_the_same_ids(tmp_path: Path) -> None:
    sentences = ["the quick brown fox jumps over the lazy dog, and then the other one " * 3] * 20
    save_sentencepiece(tmp_path / "original.model", sentences, vocab_size=300)
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "original.model"))
    size = theirs.vocab_size()

    def add(writer: gguf.GGUFWriter) -> None:
        kinds = [
            2
            if theirs.is_unknown(i)
            else 3
            if theirs.is_control(i)
            else 6
            if theirs.is_byte(i)
            else 1
            for i in range(size)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([theirs.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([theirs.get_score(i) for i in range(size)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    save_gguf(noisy(vocab_size=size), tmp_path / "model.gguf", add)
    load_script("scripts/convert_gguf_checkpoint.py").main(
        tmp_path / "model.gguf", tmp_path / "out"
    )
    ours = Tokenizer(tmp_path / "out")
    assert ours.path.name == "tokenizer.model"
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)
    for text in ("the lazy dog's  fox\n", "é 🦙", "<s>the</s>", "  two"):
        assert ours.encode(text, bos=False) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_llama_3_1s_rope_freqs_become_its_scaling(tmp_path: Path) -> None:
    rope = LLAMA3 | dict(factor=8.0, rope_theta=500000.0)
    sizes = dict(
        hidden_size=256, num_attention_heads=2, vocab_size=300
    )  # heads of 128, whose waves are long enough
    hf_model = make_hf_model(num_key_value_heads=1, rope_parameters=rope, **sizes)
    plain = make_hf_model(
        num_key_value_heads=1,
        rope_parameters=dict(rope_type="default", rope_theta=500000.0),
        **sizes,
    )
    divisors = (plain.model.rotary_emb.inv_freq / hf_model.model.rotary_emb.inv_freq).numpy()
    save_gguf(hf_model, tmp_path / "model.gguf", byte_level_bpe(tmp_path), rope_freqs=divisors)
    convert = load_script("scripts/convert_gguf_checkpoint.py").main
    convert(tmp_path / "model.gguf", tmp_path / "out", precision="32-true")
    assert LLaMAConfig.from_checkpoint(tmp_path / "out").rope_scaling == LLAMA3 | {"factor": 8.0}
    assert_same_logits(hf_model, tmp_path / "out")
