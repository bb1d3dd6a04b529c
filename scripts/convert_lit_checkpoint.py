"""Convert a checkpoint of the original Lit-LLaMA into a model folder. Guide: howto/download_weights.md"""

from collections.abc import Iterator
from pathlib import Path

import torch
from convert_meta_checkpoint import find_tokenizer, half_split
from torch import Tensor
from tqdm import tqdm

from lit_llama import LLaMAConfig, UserError
from lit_llama.checkpoint import check_shapes, save_checkpoint, tokenizer_files
from lit_llama.cli import run
from lit_llama.distributed import inference_dtype
from lit_llama.files import check_new_folder, load_pickled

# its name -> ours; `c_attn` holds query, key and value
TOP = {
    "transformer.wte.weight": "embed_tokens.weight",
    "transformer.ln_f.scale": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER = {
    "rms_1.scale": "input_layernorm.weight",
    "attn.c_attn.weight": "self_attn.{}_proj.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "rms_2.scale": "post_attention_layernorm.weight",
    "mlp.c_fc1.weight": "mlp.gate_proj.weight",
    "mlp.c_fc2.weight": "mlp.up_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}


def main(
    source: Path,
    out_dir: Path,
    tokenizer_dir: Path | None = None,
    num_attention_heads: int | None = None,
    precision: str = "bf16-true",
) -> None:
    """Convert a checkpoint of the original Lit-LLaMA into a Hugging Face model folder.

    Guide: howto/download_weights.md

    Args:
        source: the lit-llama.pth.
        out_dir: where the model folder goes; must not exist.
        tokenizer_dir: folder of tokenizer.model; default: source's or the one that this is in.
        num_attention_heads: of the model; default: heads of 128 features, as in LLaMA 7B to 65B.
        precision: bf16-true or 32-true, what the weights are saved in.
    """
    dtype = inference_dtype(precision)
    check_new_folder(out_dir)
    tensors = load_pickled(source)
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc1.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            raise UserError(f"{source}: has no {name} with two dimensions, so it is no Lit-LLaMA model")
    vocab, hidden = tensors["transformer.wte.weight"].shape
    heads = num_attention_heads or hidden // 128
    if heads < 1 or hidden % heads:
        raise UserError(f"{source}: {hidden} features are no multiple of {heads} heads. Give --num_attention_heads")
    config = LLaMAConfig.checked(
        source,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=tensors["transformer.h.0.mlp.c_fc1.weight"].size(0),
        num_hidden_layers=sum(name.endswith("rms_1.scale") for name in tensors),
        num_attention_heads=heads,
        rms_norm_eps=1e-5,  # what Lit-LLaMA computed with
    )
    files = tokenizer_files(find_tokenizer(source.parent, tokenizer_dir))
    save_checkpoint(out_dir, config, convert(tensors, config, source, dtype), files)
    print(f"model folder in {out_dir}, with {heads} heads")


def convert(
    tensors: dict[str, Tensor], config: LLaMAConfig, source: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors, one at a time."""
    places = dict(TOP)
    for index in range(config.num_hidden_layers):
        places |= {f"transformer.h.{index}.{lit}": f"layers.{index}.{name}" for lit, name in LAYER.items()}
    buffers = {name for name in tensors if name.rpartition(".")[2] in ("rope_cache", "mask_cache")}
    wrong = places.keys() ^ (tensors.keys() - buffers)
    if wrong:
        raise UserError(f"{source}: {min(wrong)} is missing or is no part of a Lit-LLaMA model")
    shapes = {}
    for lit, name in places.items():
        shape, is_qkv = tuple(tensors[lit].shape), "{}" in name
        if not tensors[lit].is_floating_point() or (is_qkv and (not shape or shape[0] % 3)):
            raise UserError(f"{source}: {lit} has shape {shape} of {tensors[lit].dtype}, which is no weight of a LLaMA")
        if is_qkv:
            shapes |= {name.format(part): (shape[0] // 3, *shape[1:]) for part in "qkv"}
        else:
            shapes[name] = shape
    check_shapes(shapes, config, source)
    for lit, name in tqdm(places.items(), desc="converting", unit="tensors", disable=None):
        if "{}" not in name:
            yield name, tensors[lit].to(dtype)
            continue
        query, key, value = tensors[lit].to(dtype).chunk(3)
        yield name.format("q"), half_split(query, config.num_attention_heads)
        yield name.format("k"), half_split(key, config.num_attention_heads)
        yield name.format("v"), value


if __name__ == "__main__":
    run(main)
