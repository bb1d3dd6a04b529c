"""What the converters share: the order of rotary features, tokenizer files, checks of tensors."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lit_llama.config import LLaMAConfig
from lit_llama.errors import UserError
from lit_llama.model import LLaMA


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection from Meta's rotary order to Hugging Face's.

    Meta rotates rows 2i and 2i + 1 of a head together, Hugging Face i and i + head_dim / 2. The
    weight is (num_heads * head_dim, hidden).
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # (heads, head_dim / 2, 2, hidden)
    return pairs.transpose(1, 2).flatten(0, 2)


def check_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: LLaMAConfig, source: Path, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield converted tensors in `dtype`, with a progress bar.

    Raises UserError if one is not of the shape that the config requires, or not floating-point.
    """
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LLaMA(config).named_parameters()}
    name = "the first tensor"
    try:
        bar = dict(desc="converting", unit="tensors", total=len(shapes), disable=None)
        for name, tensor in tqdm(tensors, **bar):
            if tensor.shape != shapes[name] or not tensor.is_floating_point():
                found, wanted = tuple(tensor.shape), tuple(shapes[name])
                problem = (
                    f"{name} has shape {found} of {tensor.dtype}, its config requires {wanted}"
                )
                raise UserError(f"{source}: {problem}")
            yield name, tensor.to(dtype)
    except (RuntimeError, IndexError) as error:  # splitting or concatenating wrong shapes
        raise UserError(f"{source}: wrong shape behind {name} ({error})") from None


def find_tokenizer(source: Path, tokenizer_dir: Path | None) -> Path:
    """Return the folder of the tokenizer: the one passed, else `source` or its parent."""
    for folder in [tokenizer_dir] if tokenizer_dir else [source, source.parent]:
        if (folder / "tokenizer.json").is_file():
            return folder
        file = folder / "tokenizer.model"
        if file.is_file():
            # Llama 3's is a text file of tiktoken ranks: base64, a space, a number
            with file.open("rb") as content:
                if content.read(8) == b"IQ== 0\nI":
                    hint = "Put tokenizer.json and tokenizer_config.json of the model's hub page"
                    hint += " beside it, or pass their --tokenizer_dir"
                    raise UserError(f"{file}: is Llama 3's tiktoken file. {hint}")
            return folder
    problem = "no tokenizer.model and no tokenizer.json there"
    raise UserError(f"{tokenizer_dir or source}: {problem}. Pass --tokenizer_dir")
