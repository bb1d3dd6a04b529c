"""Convert a checkpoint of the original Lit-LLaMA to a model folder.

Guide: howto/download_weights.md
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from conversion import check_tensors, find_tokenizer, half_split
from jsonargparse.typing import PositiveInt
from torch import Tensor

from lit_llama import LLaMAConfig, UserError
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import inference_dtype
from lit_llama.storage.files import load_pickled, require_empty_dir
from lit_llama.storage.model_folder import save_model_folder, tokenizer_files

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
    num_attention_heads: PositiveInt | None = None,
    precision: Literal["bf16-true", "32-true"] = "bf16-true",
) -> None:
    """Convert a checkpoint of the original Lit-LLaMA to a Hugging Face model folder.

    Guide: howto/download_weights.md

    Args:
        source: The lit-llama.pth.
        out_dir: Output folder; must not exist.
        tokenizer_dir: Folder of tokenizer.model; default: source's, or its parent.
        num_attention_heads: Heads of the model; default: of 128 features, as in 7B to 65B.
        precision: Dtype of the saved weights.
    """
    require_empty_dir(out_dir)
    tensors = load_pickled(source)
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc1.weight"):
        if name not in tensors or tensors[name].dim() != 2:
            problem = f"has no {name} with two dimensions"
            raise UserError(f"{source}: {problem}, so it is not a Lit-LLaMA model")
    vocab, hidden = tensors["transformer.wte.weight"].shape
    heads = num_attention_heads or hidden // 128
    if heads < 1 or hidden % heads:
        problem = f"{hidden} features are not a multiple of {heads} heads"
        raise UserError(f"{source}: {problem}. Pass --num_attention_heads")
    config = LLaMAConfig.from_fields(
        source,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=tensors["transformer.h.0.mlp.c_fc1.weight"].size(0),
        num_hidden_layers=sum(name.endswith("rms_1.scale") for name in tensors),
        num_attention_heads=heads,
        rms_norm_eps=1e-5,  # what Lit-LLaMA computed with
    )
    files = tokenizer_files(find_tokenizer(source.parent, tokenizer_dir))
    converted = convert(tensors, config, source)
    converted = check_tensors(converted, config, source, inference_dtype(precision))
    save_model_folder(out_dir, config, converted, files)
    print(f"model folder in {out_dir}, with {heads} heads")


def convert(
    tensors: dict[str, Tensor], config: LLaMAConfig, source: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield our names and tensors."""
    names = dict(TOP)
    for index in range(config.num_hidden_layers):
        theirs, ours = f"transformer.h.{index}.", f"layers.{index}."
        names |= {theirs + lit: ours + name for lit, name in LAYER.items()}
    buffers = ("rope_cache", "mask_cache")
    stored = {name for name in tensors if not name.endswith(buffers)}
    if wrong := names.keys() ^ stored:
        raise UserError(f"{source}: {min(wrong)} is missing, or not a part of a Lit-LLaMA model")
    for lit, name in names.items():
        if "{}" not in name:
            yield name, tensors[lit]
            continue
        query, key, value = tensors[lit].tensor_split(3)
        yield name.format("q"), half_split(query, config.num_attention_heads)
        yield name.format("k"), half_split(key, config.num_attention_heads)
        yield name.format("v"), value


if __name__ == "__main__":
    run(main)
