"""Load a tokenized dataset from a folder that scripts/prepare_*.py wrote."""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.config import LLaMAConfig, read_json
from lit_llama.data import TokenizedDataset
from lit_llama.errors import UserError
from lit_llama.storage.files import read_tensors, verify_checksums
from lit_llama.storage.model_folder import untrained_tokens
from lit_llama.tokenizer import Tokenizer


@dataclass
class Dataset:
    """A tokenized dataset; `sha256` of its meta.json identifies the samples."""

    train: TokenizedDataset
    val: TokenizedDataset
    template: str
    sha256: str
    meta: dict[str, Any]


def load_dataset(
    data_dir: Path, checkpoint_dir: Path, tokenizer_dir: Path | None = None
) -> Dataset:
    """Load a dataset, memory-mapped, and check that the model in `checkpoint_dir` can use it.

    `tokenizer_dir` is the folder of the tokenizer if it is not the model's.
    """
    file = data_dir / "meta.json"
    if not file.is_file():
        hint = f"Make one: python scripts/prepare_alpaca.py --data_dir {data_dir}"
        raise UserError(f"{data_dir}: no tokenized dataset there. {hint}")
    if problem := verify_checksums(data_dir):
        raise UserError(f"{data_dir}/{problem}. Prepare it again")
    meta = read_json(file)
    tokenizer = Tokenizer(tokenizer_dir or checkpoint_dir)
    if meta["tokenizer_sha256"] != tokenizer.sha256:
        problem = f"was prepared with another tokenizer than {tokenizer.path}"
        raise UserError(f"{data_dir}: {problem}. Prepare it again with this --checkpoint_dir")
    files = (data_dir / "train.safetensors", data_dir / "val.safetensors")
    tensors = [read_tensors(path)[0] for path in files]
    if any("is_label" not in part for part in tensors):
        raise UserError(f"{data_dir}: was prepared by an earlier version. Prepare it again")
    train, val = map(TokenizedDataset, tensors)
    config = LLaMAConfig.from_checkpoint(checkpoint_dir)
    # tokens that a folder adds to tokenizer.model are not in its sha256
    if max(int(part.tokens.max()) for part in (train, val) if len(part)) >= config.vocab_size:
        raise UserError(f"{data_dir}: has token ids >= {config.vocab_size}. Prepare it again")
    longest, context = max(train.lengths + val.lengths), config.max_position_embeddings
    if longest > context:
        problem = f"has a sample of {longest} tokens, the model's context holds {context}"
        raise UserError(f"{data_dir}: {problem}. Prepare it again with --max_seq_length {context}")
    untrained = untrained_tokens(checkpoint_dir, meta["special_ids"])
    names = [name for name, index in tokenizer.added.items() if index in untrained]
    if names and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        problem = (
            f"the model was never trained on {', '.join(names)} of template {meta['template']}"
        )
        hint = "Use another --template, or finetune/full.py, which trains them"
        print(f"warning: {problem}. {hint}", file=sys.stderr)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Dataset(train, val, meta["template"], sha256, meta)
