"""Convert a GGUF file to a model folder. Guide: howto/download_weights.md"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from conversion import check_tensors, half_split
from torch import Tensor

from lit_llama import LLaMAConfig, UserError
from lit_llama.config import LLAMA3_ROPE
from lit_llama.model import rope_frequencies
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import inference_dtype
from lit_llama.storage.files import require_empty_dir
from lit_llama.storage.model_folder import save_model_folder, tokenizer_files

TOP = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# `tokenizer.ggml.token_type` of special tokens; the numbers are SentencePiece's
CONTROL = 3
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_HINT = "Pass a folder with the original model's tokenizer files: --tokenizer_dir"


def main(
    source: Path,
    out_dir: Path,
    tokenizer_dir: Path | None = None,
    precision: Literal["bf16-true", "32-true"] = "bf16-true",
) -> None:
    """Convert a GGUF file to a Hugging Face model folder, dequantized.

    Guide: howto/download_weights.md

    Args:
        source: The .gguf file.
        out_dir: Output folder; must not exist.
        tokenizer_dir: Folder of tokenizer files; default: made from those in the GGUF file.
        precision: Dtype of the saved weights.
    """
    require_empty_dir(out_dir)
    fields, tensors = read_gguf(source)
    config = make_config(fields, tensors, source)
    if tokenizer_dir is None:
        files = make_tokenizer(fields, config, source)
    else:
        files = tokenizer_files(tokenizer_dir)
    converted = convert(tensors, config, source)
    converted = check_tensors(converted, config, source, inference_dtype(precision))
    save_model_folder(out_dir, config, converted, files)
    print(f"model folder in {out_dir}")


def read_gguf(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read metadata by key and `gguf.ReaderTensor`s by name."""
    try:
        from gguf import GGUFReader
    except ImportError:
        fix = "pip install -c constraints.txt -e '.[gguf]'"
        raise UserError(f"GGUF files need the gguf package: {fix}") from None
    try:
        reader = GGUFReader(source)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # depends on the bytes that follow a wrong offset
        problem = f"not a GGUF file, or truncated ({error})"
        raise UserError(f"{source}: {problem}. Download it again") from None
    if (found := fields.get("general.architecture")) != "llama":
        raise UserError(f"{source}: architecture {found!r} is not supported, only 'llama'")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def make_config(fields: dict[str, Any], tensors: dict[str, Any], source: Path) -> LLaMAConfig:
    """Return the architecture that the metadata describes."""

    def field(key: str, *default: Any) -> Any:
        if f"llama.{key}" not in fields and not default:
            raise UserError(f"{source}: its metadata lacks llama.{key}")
        return fields.get(f"llama.{key}", *default)

    if "token_embd.weight" not in tensors:
        raise UserError(f"{source}: has no token_embd.weight. Download it again")
    hidden, vocab_size = (int(size) for size in tensors["token_embd.weight"].shape)
    heads = field("attention.head_count")
    head_dim = field("attention.key_length", field("rope.dimension_count", None))
    rope_type = field("rope.scaling.type", "none")
    if rope_type not in ("none", "linear"):
        raise UserError(f"{source}: rope scaling {rope_type!r} is not supported")
    scaling = None
    if rope_type == "linear":
        scaling = {"rope_type": "linear", "factor": field("rope.scaling.factor")}
    config = LLaMAConfig.from_fields(
        source,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv", heads),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=_decimal(field("attention.layer_norm_rms_epsilon")),
        rope_theta=_decimal(field("rope.freq_base", 10000.0)),
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        **({} if head_dim is None else {"head_dim": head_dim}),
    )
    if "rope_freqs.weight" not in tensors:
        return config
    # Llama 3.1's scaling, as the divisors of the frequencies
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
    scaled = replace(config, rope_scaling=LLAMA3_ROPE | {"factor": float(divisors.max())})
    expected = rope_frequencies(config) / rope_frequencies(scaled)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        problem = "its rope_freqs are not those of Llama 3.1 and later, which are supported"
        raise UserError(f"{source}: {problem}")
    return scaled


def _decimal(value: float) -> float:
    """Return the short decimal number that was rounded to fp32."""
    return float(f"{value:.6g}")


def convert(
    tensors: dict[str, Any], config: LLaMAConfig, source: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and dequantized tensors."""
    from gguf.quants import dequantize

    names = dict(TOP)
    if config.tie_word_embeddings:
        del names["output.weight"]
    for index in range(config.num_hidden_layers):
        theirs, ours = f"blk.{index}.", f"layers.{index}."
        names |= {f"{theirs}{gguf}.weight": f"{ours}{name}.weight" for gguf, name in LAYER.items()}
    if wrong := names.keys() ^ (tensors.keys() - {"rope_freqs.weight"}):
        raise UserError(f"{source}: {min(wrong)} is missing, or not a part of a LLaMA")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for gguf, name in names.items():
        stored = tensors[gguf]
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except Exception:  # for types that it knows by name only
            problem = f"{gguf} is quantized as {stored.tensor_type.name}"
            raise UserError(f"{source}: {problem}, which the gguf package cannot read") from None
        tensor = torch.from_numpy(values.copy())
        part = gguf.removesuffix(".weight").rpartition(".")[2]
        if part in heads:
            tensor = half_split(tensor, heads[part])
        yield name, tensor


def make_tokenizer(fields: dict[str, Any], config: LLaMAConfig, source: Path) -> dict[str, bytes]:
    """Make tokenizer files, by name, from the metadata.

    Raises UserError if the type of the tokenizer, or its way to split words, is unknown.
    """
    prefix = "tokenizer.ggml."
    metadata = {key.removeprefix(prefix): value for key, value in fields.items()}
    kind, words = metadata.get("model"), metadata.get("pre")
    tokens = metadata.get("tokens") or []
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{source}: tokenizer type {kind!r} is not supported. {TOKENIZER_HINT}")
    if kind == "gpt2" and words not in ("smollm", "gpt-2", "llama-bpe"):
        problem = f"how the tokenizer splits words, {words!r}, is not known"
        raise UserError(f"{source}: {problem}. {TOKENIZER_HINT}")
    if len(set(tokens)) < len(tokens) or not 0 < len(tokens) <= config.vocab_size:
        problem = f"its {len(tokens)} tokens are not distinct, or do not fit the embedding"
        raise UserError(f"{source}: {problem} of {config.vocab_size}. {TOKENIZER_HINT}")
    special = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id}
    try:
        options = {name: tokens[index] for name, index in special.items() if index is not None}
        if kind == "gpt2":
            files = {"tokenizer.json": _byte_level_bpe(metadata, words)}
        else:
            files = {"tokenizer.model": _sentencepiece(metadata)}
    except Exception as error:  # the libraries raise nothing more precise
        problem = f"a tokenizer cannot be made of its metadata ({error!r})"
        raise UserError(f"{source}: {problem}. {TOKENIZER_HINT}") from None
    default = kind == "llama" or words == "llama-bpe"
    options["add_bos_token"] = metadata.get("add_bos_token", default)
    if template := fields.get("tokenizer.chat_template"):
        options["chat_template"] = template
    return files | {"tokenizer_config.json": json.dumps(options, indent=2).encode()}


def _byte_level_bpe(metadata: dict[str, Any], words: str) -> bytes:
    """Return a `tokenizer.json`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    tokens = metadata["tokens"]
    types = metadata.get("token_type") or [1] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata.get("merges") or []]
    # Llama 3's vocabulary has words that no merges lead to
    model = models.BPE(vocabulary, merges, ignore_merges=words == "llama-bpe")
    tokenizer = Tokenizer(model)
    gpt2_words = ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = {
        "smollm": Sequence([Digits(individual_digits=True), gpt2_words]),
        "gpt-2": gpt2_words,
        "llama-bpe": Sequence([Split(Regex(LLAMA3_SPLIT), "isolated"), bytes_only]),
    }[words]
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    added = [AddedToken(token, normalized=False, special=True) for token in special]
    tokenizer.add_special_tokens(added)
    return tokenizer.to_str(pretty=True).encode()


def _sentencepiece(metadata: dict[str, Any]) -> bytes:
    """Return a `tokenizer.model`, with byte fallback and LLaMA's settings."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model, tokens = ModelProto(), metadata["tokens"]
    types = metadata.get("token_type") or [1] * len(tokens)
    for token, score, kind in zip(tokens, metadata["scores"], types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
    trainer.unk_id = metadata.get("unknown_token_id", 0)
    trainer.bos_id = metadata.get("bos_token_id", 1)
    trainer.eos_id = metadata.get("eos_token_id", 2)
    trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


if __name__ == "__main__":
    run(main)
