"""Convert Meta's own checkpoint files into a model folder. Guide: howto/download_weights.md"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama import LLaMAConfig, UserError
from lit_llama.checkpoint import check_shapes, save_checkpoint, tokenizer_files
from lit_llama.cli import run
from lit_llama.config import LLAMA3_ROPE, read_json
from lit_llama.distributed import inference_dtype
from lit_llama.files import check_new_folder, load_pickled

# Meta's name -> ours, and the dimension along which model-parallel shards are cut (None: every shard has all of it)
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


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection (num_heads * head_dim, hidden) from Meta's rotary order to ours.

    Meta rotates neighbouring rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + head_dim / 2.
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # (heads, head_dim / 2, 2, hidden)
    return pairs.transpose(1, 2).flatten(0, 2)


def main(
    source: Path,
    out_dir: Path,
    tokenizer_dir: Path | None = None,
    precision: str = "bf16-true",
    max_position_embeddings: int | None = None,
) -> None:
    """Convert Meta's own checkpoint files into a Hugging Face model folder. Guide: howto/download_weights.md

    Args:
        source: folder of consolidated.*.pth and params.json.
        out_dir: where the model folder goes; must not exist.
        tokenizer_dir: folder of tokenizer.model or tokenizer.json; default: source or the folder that it is in.
        precision: bf16-true or 32-true, what the weights are saved in.
        max_position_embeddings: the model's context in tokens; default: what params.json suggests, printed.
    """
    dtype = inference_dtype(precision)
    check_new_folder(out_dir)
    params = read_json(source / "params.json")
    files = sorted(source.glob("consolidated.*.pth"))
    if not files:
        raise UserError(f"{source}: no consolidated.*.pth there. Give the folder that holds them with --source")
    shards = [load_pickled(file) for file in files]
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise UserError(f"{source}: the .pth files do not hold the same tensors. Are they of one model?")
    config = make_config(params, shards, source, max_position_embeddings)
    files = tokenizer_files(find_tokenizer(source, tokenizer_dir))
    save_checkpoint(out_dir, config, convert(shards, config, source, dtype), files)
    print(f"model folder in {out_dir}, for a context of {config.max_position_embeddings} tokens")


def make_config(params: dict, shards: list[dict[str, Tensor]], source: Path, context: int | None) -> LLaMAConfig:
    """Sizes from params.json and the tensors themselves."""
    try:
        hidden, layers, heads, eps = (params[key] for key in ("dim", "n_layers", "n_heads", "norm_eps"))
        embedding, gate = (shards[0][name] for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"))
    except KeyError as error:
        raise UserError(f"{source}: {error.args[0]!r} is missing in params.json or the first .pth") from None
    if type(hidden) is not int or embedding.dim() != 2 or gate.dim() != 2:
        raise UserError(f"{source}: dim in params.json ({hidden!r}) is no size, or the .pth's embedding no matrix")
    theta = params.get("rope_theta") or 10000.0
    llama3 = theta == 500_000.0
    # params.json holds no context and no rope factor; these tell the published models apart
    scaled = bool(params.get("use_scaled_rope"))
    factor = params.get("rope_scaling_factor", 32.0 if hidden in (2048, 3072) else 8.0)
    # but for the 65B, Llama 1 has another eps than Llama 2, whose largest has grouped queries
    llama1 = eps == 1e-6 or (hidden == 8192 and not params.get("n_kv_heads"))
    head = shards[0].get("output.weight")
    # Llama 1 and 2 cut the embedding along the hidden dimension, Llama 3 along the vocabulary
    vocab = embedding.size(0) * (1 if embedding.size(1) < hidden else len(shards))
    bos, eos = (128000, 128001) if llama3 else (1, 2)
    return LLaMAConfig.checked(
        source / "params.json",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=gate.size(0) * len(shards),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        max_position_embeddings=context or (131072 if scaled else 8192 if llama3 else 2048 if llama1 else 4096),
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=LLAMA3_ROPE | {"factor": factor} if scaled else None,
        tie_word_embeddings=head is None or (head.shape == embedding.shape and torch.equal(head, embedding)),
        bos_token_id=bos if bos < vocab else None,
        eos_token_id=eos if eos < vocab else None,
    )


def convert(
    shards: list[dict[str, Tensor]], config: LLaMAConfig, source: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors, merged and reordered, one at a time."""
    places = {meta: name for meta, name in TOP.items() if not (config.tie_word_embeddings and meta == "output.weight")}
    for index in range(config.num_hidden_layers):
        places |= {f"layers.{index}.{meta}": (f"layers.{index}.{name}", dim) for meta, (name, dim) in LAYER.items()}
    surplus = shards[0].keys() - places.keys() - {"rope.freqs", "output.weight"}
    missing = places.keys() - shards[0].keys()
    if surplus or missing:
        what = f"unknown tensors, such as {min(surplus)}" if surplus else f"no tensor {min(missing)}"
        raise UserError(f"{source}: {what}. Only LLaMA's text models are supported")
    if shards[0]["tok_embeddings.weight"].size(1) == config.hidden_size:
        places["tok_embeddings.weight"] = ("embed_tokens.weight", 0)
    shapes = {}
    for meta, (name, dim) in places.items():
        parts = [shard[meta] for shard in shards]
        shape = list(parts[0].shape)
        if any(list(part.shape) != shape or not part.is_floating_point() for part in parts) or len(shape) <= (dim or 0):
            raise UserError(f"{source}: {meta} is {shape} of {parts[0].dtype} in one .pth, which is no part of a LLaMA")
        shapes[name] = tuple(size * (len(parts) if at == dim else 1) for at, size in enumerate(shape))
    check_shapes(shapes, config, source)
    for meta, (name, dim) in tqdm(places.items(), desc="converting", unit="tensors", disable=None):
        parts = [shard[meta] for shard in shards]
        tensor = parts[0] if dim is None else torch.cat(parts, dim)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = half_split(tensor, heads)
        yield name, tensor.to(dtype)


def find_tokenizer(source: Path, tokenizer_dir: Path | None) -> Path:
    """The folder that has the tokenizer: the one given, else `source` or its parent."""
    for folder in [tokenizer_dir] if tokenizer_dir else [source, source.parent]:
        if (folder / "tokenizer.json").is_file():
            return folder
        if (folder / "tokenizer.model").is_file():
            # Llama 3's tokenizer.model is a text file of tiktoken ranks: base64, a space, a number
            with (folder / "tokenizer.model").open("rb") as file:
                if file.read(8) == b"IQ== 0\nI":
                    raise UserError(
                        f"{folder / 'tokenizer.model'}: is Llama 3's tiktoken file. Put tokenizer.json and "
                        "tokenizer_config.json of the model's hub page beside it, or give their --tokenizer_dir"
                    )
            return folder
    raise UserError(f"{tokenizer_dir or source}: no tokenizer.model and no tokenizer.json there. Give --tokenizer_dir")


if __name__ == "__main__":
    run(main)
