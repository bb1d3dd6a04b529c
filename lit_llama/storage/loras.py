"""Apply a saved LoRA to a model: to answer, for rows of a batch, or to continue its training."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llama.args import LoRAConfig
from lit_llama.errors import UserError
from lit_llama.lora import LoRALinear, apply_lora, dora_scale, merged_weight
from lit_llama.model import LLaMA
from lit_llama.multi_lora import LoRAWeights, MultiLoRATable, multi_lora_layers
from lit_llama.storage import model_folder
from lit_llama.storage.model_folder import EMBEDDING, HEAD
from lit_llama.storage.peft import SavedLoRA, has_adapter, read_lora
from lit_llama.storage.tokenizer_files import has_tokenizer, read_chat_template
from lit_llama.tokenizer import Tokenizer
from lit_llama.wrapping import base_linears, base_name, base_parameters


@torch.no_grad()
def load_lora(model: LLaMA, path: str | Path) -> LoRAConfig:
    """Apply a saved LoRA, ours or PEFT's, in place. Raises UserError as `read_lora` does.

    Changes of the embedding, and weights that were trained whole, are merged at once. If they add
    tokens or untie the head, `model.config` follows.
    """
    lora = read_lora(Path(path), model.config)
    lora.drop_copies({name: getattr(*at) for name, at in base_parameters(model).items()})
    whole, like = lora.base | lora.saved, model.embed_tokens.weight
    if lora.tables() or (model.lm_head is None and HEAD in lora.layers):
        embedding, head = _merge_tables(lora, like, model.lm_head and model.lm_head.weight)
        sizes = dict(vocab_size=len(embedding), tie_word_embeddings=head is None)
        model.config = replace(model.config, **sizes)
        with torch.device("meta"):
            model.embed_tokens = nn.Embedding(*embedding.shape)
            model.lm_head = None if head is None else nn.Linear(*head.T.shape, bias=False)
        whole |= {f"{EMBEDDING}.weight": embedding, f"{HEAD}.weight": head}
        for name in (EMBEDDING, HEAD):
            lora.layers.pop(name, None)
    parameters = base_parameters(model)
    for name in whole.keys() & parameters.keys():
        setattr(*parameters[name], nn.Parameter(whole[name].to(like), requires_grad=False))
    _wrap_layers(model, lora)
    return lora.config


def _wrap_layers(model: LLaMA, lora: SavedLoRA) -> None:
    linears = {base_name(name): (name, linear) for name, linear in base_linears(model).items()}
    for key, weights in lora.layers.items():
        name, linear = linears[key]
        settings = (lora.config.dropout, key, lora.config.use_dora)
        layer = LoRALinear(linear, len(weights.a), weights.scaling, *settings)
        layer.trained = True
        layer.lora_A.weight.copy_(weights.a)
        layer.lora_B.weight.copy_(weights.b)
        if lora.config.use_dora:
            layer.lora_magnitude_vector.copy_(weights.magnitude)
        model.set_submodule(name, layer.train(model.training))


def read_linear_lora(path: Path, checkpoint_dir: Path) -> SavedLoRA:
    """Read a LoRA that updates linear layers only. Raises UserError if it changes more."""
    model = model_folder.model_config(checkpoint_dir)
    lora = read_lora(path, model)
    if lora.base:
        stored = model_folder.stored_names(checkpoint_dir)
        names = {*lora.base, f"{EMBEDDING}.weight"} & stored.keys()
        lora.drop_copies({name: model_folder.read_tensor(*stored[name]) for name in names})
    no_linears = {EMBEDDING, HEAD} if model.tie_word_embeddings else {EMBEDDING}
    other = sorted({*lora.base, *lora.saved, *lora.tokens, *(no_linears & lora.layers.keys())})
    if other or has_adapter(path):
        problem = f"changes {other[0]}, too" if other else "was trained with an adapter"
        hint = "Merge it into its base first: scripts/merge_lora.py"
        raise UserError(f"{path}: {problem}, which is more than a LoRA of linear layers. {hint}")
    return lora


def starting_config(config: LoRAConfig, path: Path | None, checkpoint_dir: Path) -> LoRAConfig:
    """Return the settings to finetune with: those of the LoRA in `path`, if it starts from one.

    Dropout and the ratio of learning rates stay those of `config`, since no file depends on them.
    """
    if path is None:
        return config
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    start = read_linear_lora(path, checkpoint_dir).config
    start.dropout, start.loraplus_lr_ratio = config.dropout, config.loraplus_lr_ratio
    if HEAD in start.targets and start.dropout > 0:
        hint = "works without dropout only. Pass --lora.dropout 0"
        raise UserError(f"--init_from {path}: a LoRA of lm_head {hint}")
    flags = [field.name for field in fields(config)]
    ignored = [
        f for f in flags if getattr(config, f) not in (getattr(LoRAConfig(), f), getattr(start, f))
    ]
    note = f"; ignored: {', '.join(f'--lora.{f}' for f in ignored)}" if ignored else ""
    about = f"rank {start.r}, alpha {start.alpha:g}, targets {', '.join(start.targets)}"
    rank_zero_only(print)(f"starting from {path}: {about}{note}")
    rank_zero_only(warn_of_other_format)(path, checkpoint_dir)
    return start


def warn_of_other_format(path: Path, checkpoint_dir: Path) -> None:
    """Print a warning if a LoRA's folder has another tokenizer or chat template than the model."""
    others = []
    if has_tokenizer(path):
        own, base = Tokenizer(path), Tokenizer(checkpoint_dir)
        same = ("vocab_size", "added", "adds_bos") + ("eos_id",) * (own.eos_id is not None)
        if any(getattr(own, name) != getattr(base, name) for name in same):
            others.append("tokenizer")
    if read_chat_template(path) not in (None, read_chat_template(checkpoint_dir)):
        others.append("chat template")
    if others:
        problem = f"its {' and '.join(others)}, other than the model's, will not be used"
        hint = "To keep them, merge it first: scripts/merge_lora.py"
        print(f"warning: {path}: {problem}. {hint}", file=sys.stderr)


@torch.no_grad()
def init_lora(model: LLaMA, config: LoRAConfig, path: Path | None) -> None:
    """Apply a new LoRA, or one that continues the LoRA in `path`, in place."""
    if path is None:
        apply_lora(model, config)
    else:
        _wrap_layers(model, replace(read_lora(path, model.config), config=config))


@torch.no_grad()
def load_for_rows(model: LLaMA, path: Path) -> list[tuple[nn.Module, LoRAWeights | Tensor]]:
    """Read a LoRA for `multi_lora.load_adapter`: the wrapped layers and their weights."""
    if has_adapter(path):
        raise UserError(f"{path}: was trained with an adapter, which all rows would share")
    layers, like = multi_lora_layers(model), model.embed_tokens.weight
    lora, loaded = read_lora(path, model.config), []
    head = None if model.config.tie_word_embeddings else _dense(model.lm_head.weight)
    tables = {f"{EMBEDDING}.weight": like, f"{HEAD}.weight": like if head is None else head}
    lora.drop_copies(tables)
    if others := {*lora.base, *lora.saved} - tables.keys():
        problem = f"has a {sorted(others)[0]} of its own, which all rows would share"
        raise UserError(f"{path}: {problem}. Merge it: scripts/merge_lora.py")
    if lora.tables() or HEAD in lora.layers:
        embedding, own_head = _merge_tables(lora, like, head)
        own_head = embedding if own_head is None else own_head
        for name, weight in ((EMBEDDING, embedding), (HEAD, own_head)):
            if weight is not tables[f"{name}.weight"]:  # else it is the base's
                loaded.append((_table(model, name), weight))
    for key in lora.layers.keys() - {EMBEDDING, HEAD}:
        a, b, scaling, magnitude = lora.layers[key]
        if magnitude is not None:
            a, b, magnitude = (tensor.to(like.device) for tensor in (a, b, magnitude))
            magnitude = dora_scale(_dense(layers[key].base.weight), a, b, scaling, magnitude)
        loaded.append((layers[key], LoRAWeights(a.to(like), b.to(like), scaling, magnitude)))
    return loaded


def _dense(weight: Tensor) -> Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight  # prepacked for decoding


def _table(model: LLaMA, name: str) -> MultiLoRATable:
    """Return the wrapper of embedding or head, which the first LoRA that changes it brings."""
    module = getattr(model, name)
    if not isinstance(module, MultiLoRATable):
        if module is None:  # a tied head
            with torch.device("meta"):
                module = nn.Linear(*model.embed_tokens.weight.T.shape, bias=False)
            module.weight = nn.Parameter(model.embed_tokens.weight, requires_grad=False)
        rows = next(iter(multi_lora_layers(model).values())).rows
        setattr(model, name, MultiLoRATable(module, rows))
    return getattr(model, name)


def _merge_tables(
    lora: SavedLoRA, embedding: Tensor, head: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return embedding and head with a LoRA's changes. A head of None is tied to the embedding."""
    tied, merged = head is None, {}
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        # PEFT wraps one of two tied layers. What it stores of the base belongs to both of them,
        # and so do the rows of trained tokens.
        others = (
            (lora.base.get(f"{other}.weight"), lora.tokens.get(other)) if tied else (None, None)
        )
        weight = lora.base.get(f"{name}.weight", others[0])
        weight = lora.saved.get(f"{name}.weight", weight)
        if weight is None:
            weight = head if name == HEAD and not tied else embedding
        weight = weight.to(embedding)
        if rows := lora.tokens.get(name, others[1]):
            ids, values = (tensor.to(weight.device) for tensor in rows)
            if int(ids.max()) >= len(weight):
                problem = f"trained_token_indices has {int(ids.max())}, {name} {len(weight)} rows"
                raise UserError(f"{lora.path}: {problem}")
            weight = weight.index_copy(0, ids, values.to(weight.dtype))
        if name in lora.layers:
            update = [
                t.to(weight.device) if isinstance(t, Tensor) else t for t in lora.layers[name]
            ]
            if name == HEAD:
                weight = merged_weight(weight, *update)
            else:
                weight = merged_weight(weight.T, *update).T.contiguous()
        merged[name] = weight
    if len(merged[EMBEDDING]) != len(merged[HEAD]):
        sizes = f"{EMBEDDING} would have {len(merged[EMBEDDING])} rows, {HEAD} {len(merged[HEAD])}"
        raise UserError(f"{lora.path}: {sizes}. Save it again with save_embedding_layers=True")
    return merged[EMBEDDING], None if tied and torch.equal(*merged.values()) else merged[HEAD]
