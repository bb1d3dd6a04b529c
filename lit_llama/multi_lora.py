"""Many LoRAs on one base: each row of a batch uses its own, in one forward pass."""

#     enable_multi_lora(model)
#     load_adapter(model, "alice", "out/lora/alice")
#     load_adapter(model, "bob", "out/lora/bob")
#     set_adapters(model, ["bob", None, "alice"])  # one per row of the next batches; None: the base
# In each layer, the A of all LoRAs in use are stacked, and so are their B. A layer then costs two
# small matmuls, however many LoRAs there are: between the two, whatever belongs to the LoRA of
# another row is multiplied by zero.

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.adapter import AdapterAttention
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.wrapping import base_linears, base_name

FORWARD = inspect.signature(LLaMA.forward)  # slow to get, and needed for each token


class LoRAWeights(NamedTuple):
    """The weights of a LoRA in one layer: y += scaling * B A x."""

    a: Tensor  # (r, in_features)
    b: Tensor  # (out_features, r)
    scaling: float
    magnitude: Tensor | None  # (out_features,), of DoRA


class BatchRows:
    """The batch row of each token of a forward pass; shared by all layers."""

    def __init__(self) -> None:
        self.count = 0  # rows that `set_adapters` was called for
        self.of_token: Tensor | None = None  # (tokens,); None: token i is row i
        self.of_label: Tensor | None = None  # (labels,), of the hidden states that the head gets

    def update(self, model: LLaMA, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model. Raises ValueError for another number of rows."""
        call = FORWARD.bind(model, *args, **kwargs).arguments
        input_ids, lengths = call["input_ids"], call.get("lengths")
        if lengths is None:
            lengths = [input_ids.size(-1)] * (input_ids.numel() // input_ids.size(-1))
        if self.count and len(lengths) != self.count:
            batch = f"a batch of {len(lengths)} rows"
            raise ValueError(f"{batch}, but set_adapters got {self.count} names")
        self.of_token = None
        if max(lengths) > 1:
            rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            self.of_token = rows.to(input_ids.device, non_blocking=True)
        self.of_label = labels = call.get("label_positions")
        if self.of_token is not None:
            self.of_label = self.of_token if labels is None else self.of_token[labels]


class MultiLoRALinear(nn.Module):
    """A base layer and its update by each of the loaded LoRAs."""

    def __init__(self, base: nn.Linear, rows: BatchRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.out_features = base.out_features
        # By name. In the place of DoRA's magnitude, its `dora_scale` is kept.
        self.loaded: dict[str, LoRAWeights] = {}
        # Those in use, stacked; None if there are none.
        self.a: Tensor | None = None  # (ranks, in_features)
        self.b: Tensor | None = None  # (out_features, ranks)
        self.scaling: Tensor | None = None  # (rows, ranks), zero for another row's LoRA
        self.dora: Tensor | None = None  # (rows, out_features), fp32

    def stack(self, rows: Mapping[str, Tensor], count: int) -> None:
        """Stack the LoRAs in use. `rows` maps each name to its rows (count,), bool."""
        used = {name: self.loaded[name] for name in rows if name in self.loaded}
        self.a = self.b = self.scaling = self.dora = None
        if not used:
            return
        self.a = torch.cat([weights.a for weights in used.values()])
        self.b = torch.cat([weights.b for weights in used.values()], dim=1)
        self.scaling = self.a.new_zeros(count, len(self.a))
        if any(weights.magnitude is not None for weights in used.values()):
            self.dora = torch.ones(count, self.out_features, device=self.a.device)
        start = 0
        for name, weights in used.items():
            end = start + len(weights.a)
            self.scaling[rows[name], start:end] = weights.scaling
            start = end
            if weights.magnitude is not None:
                self.dora[rows[name]] = weights.magnitude

    def forward(self, x: Tensor) -> Tensor:  # (tokens, in_features) -> (tokens, out_features)
        y = self.base(x)
        if self.a is None:
            return y
        scaling, dora, of_token = self.scaling, self.dora, self.rows.of_token
        if of_token is not None:
            scaling = scaling[of_token]
            dora = None if dora is None else dora[of_token]
        update = F.linear(F.linear(x, self.a) * scaling, self.b)
        if dora is None:
            return y + update
        # As in `LoRALinear.forward`; rows without DoRA have a scale of one.
        without_bias = y if self.base.bias is None else y - self.base.bias
        return y + (dora - 1).to(y.dtype) * without_bias + dora.to(y.dtype) * update


class MultiLoRATable(nn.Module):
    """Embedding or head, beside those of LoRAs that have their own, e.g. with more tokens."""

    def __init__(self, base: nn.Module, rows: BatchRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.loaded: dict[str, Tensor] = {}  # (vocab_size, hidden), by name
        self.used: list[tuple[Tensor, Tensor]] = []  # their rows (count,), bool, and weights

    weight = property(lambda self: self.base.weight)

    def stack(self, rows: Mapping[str, Tensor], count: int) -> None:
        """Select the weights in use, as `MultiLoRALinear.stack`."""
        self.used = [(rows[name], self.loaded[name]) for name in rows if name in self.loaded]
        self.row_sizes = torch.full((count,), len(self.weight))  # vocab_size of each row
        for mask, weight in self.used:
            self.row_sizes[mask.cpu()] = len(weight)

    def forward(self, x: Tensor) -> Tensor:  # (tokens,) -> (tokens, hidden) -> (labels, vocab_size)
        if not self.used:
            return self.base(x)
        is_head = x.is_floating_point()
        index = self.rows.of_label if is_head else self.rows.of_token
        masks, weights = torch.stack([rows for rows, _ in self.used]), [w for _, w in self.used]
        masks = masks if index is None else masks[:, index]  # (LoRAs, tokens)
        # Each weight sees all tokens, so that shapes are static. It may lack those of other rows.
        own, *others = [x if is_head else x * mask for mask in (~masks.any(0), *masks)]
        outputs = [self.base(own), *map(F.linear if is_head else F.embedding, others, weights)]
        size = max(y.size(-1) for y in outputs)
        y, *others = (F.pad(y, (0, size - y.size(-1)), value=-torch.inf) for y in outputs)
        for mask, other in zip(masks, others, strict=True):
            y = other.where(mask[:, None], y)
        return y


def enable_multi_lora(model: LLaMA, paths: Sequence[Path] = ()) -> None:
    """Wrap each linear layer but the head, in place, and load LoRAs by their paths as names."""
    # Before `optimize_for_inference`, which fuses layers that nothing wraps.
    # What the projections make of an adapter's prompt belongs to no row of the batch.
    if any(isinstance(module, AdapterAttention) for module in model.modules()):
        raise UserError("several LoRAs cannot be used beside an adapter. Use one of them")
    rows = BatchRows()
    for name, linear in base_linears(model).items():
        if linear is not model.lm_head:
            model.set_submodule(name, MultiLoRALinear(linear, rows))
    model.register_forward_pre_hook(rows.update, with_kwargs=True)
    for path in paths:
        load_adapter(model, str(path), path)


def multi_lora_layers(model: LLaMA) -> dict[str, MultiLoRALinear | MultiLoRATable]:
    """Return the wrapped layers by checkpoint name; empty without `enable_multi_lora`."""
    wrappers = (MultiLoRALinear, MultiLoRATable)
    return {base_name(name): m for name, m in model.named_modules() if isinstance(m, wrappers)}


def load_adapter(model: LLaMA, name: str, path: str | Path) -> None:
    """Load a saved LoRA (ours or PEFT's) under a name, in the model's dtype."""
    from lit_llama.storage.loras import load_for_rows  # storage imports the book

    weights = load_for_rows(model, Path(path))  # before the old ones of that name are deleted
    delete_adapter(model, name)
    for layer, own in weights:
        layer.loaded[name] = own


def delete_adapter(model: LLaMA, name: str) -> None:
    """Forget a LoRA. Rows that use it keep it until the next `set_adapters`."""
    for layer in multi_lora_layers(model).values():
        layer.loaded.pop(name, None)


def set_adapters(model: LLaMA, names: Sequence[str | None]) -> None:
    """Choose the LoRA for each row of the next batches; None is the base alone."""
    layers = multi_lora_layers(model).values()
    known = {name for layer in layers for name in layer.loaded}
    if unknown := set(names) - known - {None}:
        raise ValueError(f"no LoRA called {', '.join(sorted(unknown))}. Known: {sorted(known)}")
    device = model.embed_tokens.weight.device
    chosen = dict.fromkeys(name for name in names if name is not None)
    rows = {n: torch.tensor([name == n for name in names], device=device) for n in chosen}
    for layer in layers:
        layer.stack(rows, len(names))
        layer.rows.count = len(names)
