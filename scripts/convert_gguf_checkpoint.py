"""Convert a GGUF file into a model folder. Guide: howto/download_weights.md"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from convert_meta_checkpoint import half_split
from torch import Tensor
from tqdm import tqdm

from lit_llama import LLaMAConfig, UserError
from lit_llama.checkpoint import check_shapes, save_checkpoint, tokenizer_files
from lit_llama.cli import run
from lit_llama.config import LLAMA3_ROPE, is_positive
from lit_llama.distributed import inference_dtype
from lit_llama.files import check_file, check_new_folder
from lit_llama.model import rope_frequencies

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
CONTROL = 3  # `tokenizer.ggml.token_type` of special tokens; the numbers are SentencePiece's
MAX_VALUES = 4 * 10**6  # of the metadata; a vocabulary of 256,000 with its merges has about 2 million
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def main(source: Path, out_dir: Path, tokenizer_dir: Path | None = None, precision: str = "bf16-true") -> None:
    """Convert a GGUF file into a Hugging Face model folder, de-quantized. Guide: howto/download_weights.md

    Args:
        source: the .gguf file.
        out_dir: where the model folder goes; must not exist.
        tokenizer_dir: folder of the model's tokenizer files; default: make them from what the file holds.
        precision: bf16-true or 32-true, what the weights are saved in.
    """
    dtype = inference_dtype(precision)
    check_new_folder(out_dir)
    fields, tensors = read_gguf(source)
    config = make_config(fields, tensors, source)
    files = tokenizer_files(tokenizer_dir) if tokenizer_dir else make_tokenizer(fields, config, source)
    save_checkpoint(out_dir, config, convert(tensors, config, source, dtype), files)
    print(f"model folder in {out_dir}")


def read_gguf(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key and `gguf.ReaderTensor`s by name. Raises UserError where the file is no whole GGUF of a LLaMA."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("GGUF files need the gguf package: pip install -c constraints.txt -e '.[gguf]'") from None

    class Reader(GGUFReader):
        """Theirs counts on, for ever, where an array has more elements than the file."""

        calls = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> Any:
            found, self.calls = super()._get(offset, dtype, count, override_order), self.calls + 1
            if len(found) != int(count) or self.calls > MAX_VALUES:
                raise ValueError(f"nothing whole at byte {offset:,}")
            return found

    check_file(source)
    try:
        reader = Reader(source)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # whatever comes of reading bytes that are something else
        raise UserError(f"{source}: not a GGUF file, or cut off ({error}). Download it again") from None
    if fields.get("general.architecture") != "llama":
        raise UserError(f"{source}: architecture {fields.get('general.architecture')!r} is not supported, 'llama' is")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def make_config(fields: dict[str, Any], tensors: dict[str, Any], source: Path) -> LLaMAConfig:
    """The architecture that the metadata describes."""

    def field(key: str, *default: Any) -> Any:
        if f"llama.{key}" not in fields and not default:
            raise UserError(f"{source}: its metadata lacks llama.{key}")
        return fields.get(f"llama.{key}", *default)

    if "token_embd.weight" not in tensors:
        raise UserError(f"{source}: has no token_embd.weight. Download it again")
    if len(tensors["token_embd.weight"].shape) != 2:
        raise UserError(f"{source}: its token_embd.weight is no matrix. Download it again")
    hidden, vocab_size = (int(size) for size in tensors["token_embd.weight"].shape)
    heads = field("attention.head_count")
    head_dim = field("attention.key_length", field("rope.dimension_count", None))
    eps, theta = field("attention.layer_norm_rms_epsilon"), field("rope.freq_base", 10000.0)
    scaling = {"rope_type": field("rope.scaling.type", "none")}
    if scaling["rope_type"] == "none":
        scaling = None
    elif scaling["rope_type"] == "linear":
        scaling["factor"] = field("rope.scaling.factor")
    else:
        raise UserError(f"{source}: rope scaling {scaling['rope_type']!r} is not supported")
    config = LLaMAConfig.checked(
        source,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field("attention.head_count_kv", heads),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=_decimal(eps),
        rope_theta=_decimal(theta),
        rope_scaling=scaling,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        **({} if head_dim is None else {"head_dim": head_dim}),
    )
    if "rope_freqs.weight" in tensors:  # Llama 3.1's scaling, as the divisors of the frequencies
        divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
        if not divisors.numel() or not is_positive(float(divisors.max())):
            raise UserError(f"{source}: its rope_freqs are no positive numbers. Download it again")
        scaled = replace(config, rope_scaling=LLAMA3_ROPE | {"factor": float(divisors.max())})
        expected = rope_frequencies(config) / rope_frequencies(scaled)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise UserError(f"{source}: its rope_freqs are not those of Llama 3.1 and later, which are supported")
        config = scaled
    return config


def _decimal(value: Any) -> Any:
    """A number that was stored in fp32 as it was before that."""
    return float(f"{value:.6g}") if is_positive(value) else value


def convert(
    tensors: dict[str, Any], config: LLaMAConfig, source: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Our names and de-quantized tensors, one at a time."""
    from gguf.quants import dequantize

    places = {gguf: name for gguf, name in TOP.items() if not (config.tie_word_embeddings and gguf == "output.weight")}
    for index in range(config.num_hidden_layers):
        places |= {f"blk.{index}.{gguf}.weight": f"layers.{index}.{name}.weight" for gguf, name in LAYER.items()}
    wrong = places.keys() ^ (tensors.keys() - {"rope_freqs.weight"})
    if wrong:
        raise UserError(f"{source}: {min(wrong)} is missing, or is a part that LLaMA does not have")
    # GGUF counts dimensions from the innermost
    check_shapes(
        {name: tuple(int(size) for size in reversed(tensors[gguf].shape)) for gguf, name in places.items()},
        config,
        source,
    )
    for gguf, name in tqdm(places.items(), desc="converting", unit="tensors", disable=None):
        try:
            values = dequantize(tensors[gguf].data, tensors[gguf].tensor_type)
        except Exception:  # for kinds that it only knows the names of
            kind = tensors[gguf].tensor_type.name
            raise UserError(f"{source}: {gguf} is quantized as {kind}, which the gguf package cannot read") from None
        tensor = torch.from_numpy(values.copy())
        if gguf.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = half_split(tensor, config.num_attention_heads if "attn_q" in gguf else config.num_key_value_heads)
        yield name, tensor.to(dtype)


def make_tokenizer(fields: dict[str, Any], config: LLaMAConfig, source: Path) -> dict[str, bytes]:
    """Tokenizer files by name.

    Raises:
        UserError: the kind of tokenizer, or how it cuts text into words, is not known.
    """
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    elsewhere = "Put the original model's tokenizer files into a folder and give it with --tokenizer_dir"
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise UserError(f"{source}: tokenizer kind {kind!r} is not supported. {elsewhere}")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    scores, merges = (fields.get(f"tokenizer.ggml.{key}") or [] for key in ("scores", "merges"))
    for what, values, element, counts in (
        ("tokens", tokens, str, range(config.vocab_size + 1)),
        ("token_type", types, int, [len(tokens)]),
        ("scores", scores, float, [len(tokens)] if kind == "llama" else [0, len(tokens)]),
        ("merges", merges, str, range(10**7)),
    ):
        if not isinstance(values, list) or not all(type(value) is element for value in values):
            raise UserError(f"{source}: tokenizer.ggml.{what} should be a list of {element.__name__}. {elsewhere}")
        if len(values) not in counts:
            raise UserError(f"{source}: tokenizer.ggml.{what} has {len(values)} elements for {len(tokens)} tokens")
    if not set(types) <= set(range(1, 7)):
        raise UserError(f"{source}: tokenizer.ggml.token_type should be from 1 to 6. {elsewhere}")
    for name in ("bos", "eos", "unknown"):
        index = fields.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(index) is not int or not 0 <= index < len(tokens):
            raise UserError(f"{source}: tokenizer.ggml.{name}_token_id {index!r} is none of its {len(tokens)} tokens")
    flags = {
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.ggml.add_space_prefix": bool,
        "tokenizer.chat_template": str,
    }
    for name, kind_of in flags.items():
        if not isinstance(fields.get(name, kind_of()), kind_of):
            raise UserError(f"{source}: {name} should be {kind_of.__name__}, not {fields[name]!r}")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{source}: tokenizer.ggml.tokens holds a token twice. {elsewhere}")
    if kind == "gpt2":
        words = fields.get("tokenizer.ggml.pre")
        if words not in ("smollm", "gpt-2", "llama-bpe"):
            raise UserError(f"{source}: how the tokenizer cuts words, {words!r}, is not known. {elsewhere}")
        tokenizer_file = {"tokenizer.json": _byte_level_bpe(tokens, types, merges, words, source)}
    else:
        tokenizer_file = {"tokenizer.model": _sentencepiece(fields, tokens, scores, types)}
    options = {
        f"{name}_token": tokens[index]
        for name, index in (("bos", config.bos_token_id), ("eos", config.eos_token_id))
        if index is not None
    }
    options["add_bos_token"] = fields.get("tokenizer.ggml.add_bos_token", kind == "llama" or words == "llama-bpe")
    if "tokenizer.chat_template" in fields:
        options["chat_template"] = fields["tokenizer.chat_template"]
    return tokenizer_file | {"tokenizer_config.json": json.dumps(options, indent=2).encode()}


def _byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], words: str, source: Path) -> bytes:
    """A `tokenizer.json`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:  # Llama 3's vocabulary has words that no merges lead to
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=words == "llama-bpe"))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"{source}: a tokenizer cannot be made of its tokens and merges ({error})") from None
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_words]),
        "gpt-2": gpt2_words,
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), bytes_only]),
    }[words]
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer.to_str(pretty=True).encode()


def _sentencepiece(fields: dict[str, Any], tokens: list[str], scores: list[float], types: list[int]) -> bytes:
    """A `tokenizer.model`, with byte fallback and LLaMA's settings."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = fields.get("tokenizer.ggml.unknown_token_id", 0)
    model.trainer_spec.bos_id = fields.get("tokenizer.ggml.bos_token_id", 1)
    model.trainer_spec.eos_id = fields.get("tokenizer.ggml.eos_token_id", 2)
    model.trainer_spec.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


if __name__ == "__main__":
    run(main)
