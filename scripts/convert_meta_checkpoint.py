"""Convert Meta's own checkpoint files to a model folder. Guide: howto/download_weights.md"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from conversion import check_tensors, find_tokenizer, half_split
from jsonargparse.typing import PositiveInt
from torch import Tensor

from lit_llama import LLaMAConfig, UserError
from lit_llama.config import LLAMA3_ROPE, read_json
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import inference_dtype
from lit_llama.storage.files import load_pickled, require_empty_dir
from lit_llama.storage.model_folder import save_model_folder, tokenizer_files

# Meta's name -> ours, and the dimension that its model-parallel training splits (None: no split)
TOP = {
    "tok_embeddings.weight": ("embed_tokens.weight", 1),
    "norm.weight": ("norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}


def main(
    source: Path,
    out_dir: Path,
    tokenizer_dir: Path | None = None,
    precision: Literal["bf16-true", "32-true"] = "bf16-true",
    max_position_embeddings: PositiveInt | None = None,
) -> None:
    """Convert Meta's own checkpoint files to a Hugging Face model folder.

    Guide: howto/download_weights.md

    Args:
        source: Folder of consolidated.*.pth and params.json.
        out_dir: Output folder; must not exist.
        tokenizer_dir: Folder of tokenizer.model or tokenizer.json; default: source or its parent.
        precision: Dtype of the saved weights.
        max_position_embeddings: Context in tokens; default: by params.json, printed.
    """
    require_empty_dir(out_dir)
    params = read_json(source / "params.json")
    files = sorted(source.glob("consolidated.*.pth"))
    if not files:
        hint = "Pass the folder that holds them with --source"
        raise UserError(f"{source}: no consolidated.*.pth there. {hint}")
    shards = [load_pickled(file) for file in files]
    if any(shard.keys() != shards[0].keys() for shard in shards):
        problem = "the .pth files do not hold the same tensors. Are they of one model?"
        raise UserError(f"{source}: {problem}")
    config = make_config(params, shards, source, max_position_embeddings)
    extra_files = tokenizer_files(find_tokenizer(source, tokenizer_dir))
    converted = convert(shards, config, source)
    converted = check_tensors(converted, config, source, inference_dtype(precision))
    save_model_folder(out_dir, config, converted, extra_files)
    context = f"for a context of {config.max_position_embeddings} tokens"
    print(f"model folder in {out_dir}, {context}")


def make_config(
    params: dict, shards: list[dict[str, Tensor]], source: Path, context: int | None
) -> LLaMAConfig:
    """Derive the config from params.json and the tensors themselves."""
    try:
        hidden, heads, eps = (params[key] for key in ("dim", "n_heads", "norm_eps"))
        layers = params["n_layers"]
        embedding = shards[0]["tok_embeddings.weight"]
        gate = shards[0]["layers.0.feed_forward.w1.weight"]
    except KeyError as error:
        problem = f"{error.args[0]!r} is missing in params.json or the first .pth"
        raise UserError(f"{source}: {problem}") from None
    theta = params.get("rope_theta") or 10000.0
    llama3 = theta == 500_000.0
    # params.json holds no context and no rope factor; these tell the published models apart
    scaled = bool(params.get("use_scaled_rope"))
    factor = params.get("rope_scaling_factor", 32.0 if hidden in (2048, 3072) else 8.0)
    # Llama 1 has another eps than Llama 2, except the 65B: Llama 2's largest has grouped queries
    llama1 = eps == 1e-6 or (hidden == 8192 and not params.get("n_kv_heads"))
    default_context = 131072 if scaled else 8192 if llama3 else 2048 if llama1 else 4096
    head = shards[0].get("output.weight")
    tied = head is None or (head.shape == embedding.shape and torch.equal(head, embedding))
    # Llama 1 and 2 split the embedding along the hidden dimension, Llama 3 along the vocabulary
    vocab = embedding.size(0) * (1 if embedding.size(1) < hidden else len(shards))
    bos, eos = (128000, 128001) if llama3 else (1, 2)
    return LLaMAConfig.from_fields(
        source / "params.json",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=gate.size(0) * len(shards),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        max_position_embeddings=context or default_context,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=LLAMA3_ROPE | {"factor": factor} if scaled else None,
        tie_word_embeddings=tied,
        bos_token_id=bos if bos < vocab else None,
        eos_token_id=eos if eos < vocab else None,
    )


def convert(
    shards: list[dict[str, Tensor]], config: LLaMAConfig, source: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and tensors, concatenated and reordered."""
    names = dict(TOP)
    if config.tie_word_embeddings:
        del names["output.weight"]
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        names |= {prefix + meta: (prefix + name, dim) for meta, (name, dim) in LAYER.items()}
    stored = shards[0].keys()
    surplus = stored - names.keys() - {"rope.freqs", "output.weight"}
    if surplus or names.keys() - stored:
        found = f"unknown tensors, such as {min(surplus)}" if surplus else ""
        found = found or f"no tensor {min(names.keys() - stored)}"
        raise UserError(f"{source}: {found}. Only LLaMA's text models are supported")
    if shards[0]["tok_embeddings.weight"].size(1) == config.hidden_size:
        names["tok_embeddings.weight"] = ("embed_tokens.weight", 0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for meta, (name, dim) in names.items():
        parts = [shard[meta] for shard in shards]
        tensor = parts[0] if dim is None else torch.cat(parts, dim)
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if projection in heads:
            tensor = half_split(tensor, heads[projection])
        yield name, tensor


if __name__ == "__main__":
    run(main)
