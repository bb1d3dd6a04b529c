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
from lit_llama.lora import dora_scale
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


class MultiLoRALinear(nn.Module):
    """A base layer and its update by each of the loaded LoRAs."""

    def __init__(self, base: nn.Linear, rows: BatchRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.in_features, self.out_features = base.in_features, base.out_features
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


def enable_multi_lora(model: LLaMA, paths: Sequence[Path] = ()) -> None:
    """Wrap each linear layer but the head, in place, and load the LoRAs under their paths."""
    # To be called before `optimize_for_inference`.
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


def multi_lora_layers(model: LLaMA) -> dict[str, MultiLoRALinear]:
    """Return the wrapped layers by checkpoint name; empty without `enable_multi_lora`."""
    modules = model.named_modules()
    return {base_name(name): m for name, m in modules if isinstance(m, MultiLoRALinear)}


@torch.no_grad()
def load_adapter(model: LLaMA, name: str, path: str | Path) -> None:
    """Load a saved LoRA (ours or PEFT's) under a name, in the model's dtype."""
    from lit_llama.storage.peft import read_lora  # storage imports the book, not the other way

    layers, like = multi_lora_layers(model), model.embed_tokens.weight
    if (Path(path) / "adapter").is_dir():
        raise UserError(f"{path}: was trained with an adapter, which all rows would share")
    shapes = {key: (layer.out_features, layer.in_features) for key, layer in layers.items()}
    _, weights = read_lora(Path(path), shapes)
    delete_adapter(model, name)
    for key, (a, b, scaling, magnitude) in weights.items():
        if magnitude is not None:
            weight = layers[key].base.weight
            weight = weight.to_dense() if weight.is_mkldnn else weight  # prepacked for decoding
            a, b, magnitude = (tensor.to(like.device) for tensor in (a, b, magnitude))
            magnitude = dora_scale(weight, a, b, scaling, magnitude)
        layers[key].loaded[name] = LoRAWeights(a.to(like), b.to(like), scaling, magnitude)


def delete_adapter(model: LLaMA, name: str) -> None:
    """Forget a LoRA. Rows that use it keep it until the next `set_adapters`."""
    for layer in multi_lora_layers(model).values():
        layer.loaded.pop(name, None)


def set_adapters(model: LLaMA, names: Sequence[str | None]) -> None:
    """Choose the LoRA for each row of the next batches; None is the base alone."""
    layers = multi_lora_layers(model).values()
    known = {name for layer in layers for name in layer.loaded}
    if unknown := set(names) - known - {None}:
        unknown = ", ".join(sorted(unknown))
        raise ValueError(f"no LoRA called {unknown}. Known: {', '.join(sorted(known))}")
    device = model.embed_tokens.weight.device
    chosen = [name for name in dict.fromkeys(names) if name is not None]
    rows = {n: torch.tensor([name == n for name in names], device=device) for n in chosen}
    for layer in layers:
        layer.stack(rows, len(names))
        layer.rows.count = len(names)
