"""Many LoRAs on one base: all are in memory beside it, and each row of a batch uses its own, in one forward pass.

    hold_loras(model)
    add_lora(model, "alice", "out/lora/alice")
    add_lora(model, "bob", "out/lora/bob")
    choose_loras(model, ["bob", None, "alice"])   # for the rows of the batches from here on; None: the base

The A of all chosen LoRAs lie one below the other, their B side by side, so that a layer costs two small matmuls however
many they are; between the two, what belongs to another row's LoRA is multiplied by zero.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.adapter import AdapterAttention
from lit_llama.errors import UserError
from lit_llama.lora import LoRAConfig, Update, dora_scale, read_lora
from lit_llama.methods import base_linears, base_name, replace_module
from lit_llama.model import LLaMA


class Rows:
    """Which row of the batch each token belongs to; one for all layers of a model."""

    def __init__(self) -> None:
        self.count = 0  # rows that a choice was made for
        self.of_token: Tensor | None = None  # (tokens,); None: token i is row i

    def begin(self, model: LLaMA, args: tuple, kwargs: dict) -> None:
        """Before each forward pass: look at how its tokens are cut into rows. Raises ValueError for another number."""
        input_ids = args[0] if args else kwargs["input_ids"]
        lengths = args[1] if len(args) > 1 else kwargs.get("lengths")
        rows, seq = input_ids.shape if input_ids.dim() == 2 else (1, input_ids.numel())
        rows = rows if lengths is None else len(lengths)
        if self.count and rows != self.count:
            raise ValueError(f"a batch of {rows} rows, but choose_loras was called for {self.count}")
        numbers, self.of_token = torch.arange(rows, device=input_ids.device), None
        if lengths is not None:
            repeats = torch.tensor(lengths, device=input_ids.device)
            self.of_token = numbers.repeat_interleave(repeats, output_size=input_ids.numel())
        elif seq > 1:
            self.of_token = numbers.repeat_interleave(seq, output_size=rows * seq)


class LoRASlots(nn.Module):
    """A base layer and the updates that LoRAs by name have for it, of which each row uses one or none."""

    def __init__(self, base: nn.Linear, rows: Rows) -> None:
        super().__init__()
        # of an update's `magnitude`, what is kept here is `dora_scale`
        self.base, self.rows, self.updates = base, rows, dict[str, Update]()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.a = self.b = self.scaling = self.dora = None

    def choose(self, rows: Mapping[str, Tensor], count: int) -> None:
        """Lay out what `forward` reads for `count` rows. `rows` are those of each LoRA (count,), bool."""
        chosen = {name: self.updates[name] for name in rows if name in self.updates}
        self.a = self.b = self.scaling = self.dora = None
        if not chosen:
            return
        self.a = torch.cat([update.a for update in chosen.values()])  # (ranks, in_features)
        self.b = torch.cat([update.b for update in chosen.values()], dim=1)  # (out_features, ranks)
        ends = accumulate(len(update.a) for update in chosen.values())
        self.scaling = self.a.new_zeros(count, len(self.a))  # (rows, ranks), zero where it is another row's LoRA
        if any(update.magnitude is not None for update in chosen.values()):
            self.dora = torch.ones(count, self.out_features, device=self.a.device)  # fp32
        for (name, update), end in zip(chosen.items(), ends, strict=True):
            self.scaling[rows[name], end - len(update.a) : end] = update.scaling
            if update.magnitude is not None:
                self.dora[rows[name]] = update.magnitude

    def forward(self, x: Tensor) -> Tensor:  # (tokens, in_features) -> (tokens, out_features)
        y = self.base(x)
        if self.a is None:
            return y
        of_token = self.rows.of_token
        scaling, dora = (t if t is None or of_token is None else t[of_token] for t in (self.scaling, self.dora))
        update = F.linear(F.linear(x, self.a) * scaling, self.b)
        if dora is None:
            return y + update
        without_bias = y if self.base.bias is None else y - self.base.bias
        return y + (dora - 1).to(y.dtype) * without_bias + dora.to(y.dtype) * update


def hold_loras(model: LLaMA, paths: Sequence[Path] = ()) -> None:
    """Make room for LoRAs around each linear layer but the head, in place, and add those of `paths` under their paths.

    Call it before `decoding.prepare`. Raises UserError as `add_lora` does, and for a model with an adapter: what its
    projections make of the adapter's prompt belongs to no row.
    """
    if any(isinstance(module, AdapterAttention) for module in model.modules()):
        raise UserError("LoRAs cannot be held beside an adapter. Use one of them")
    rows = Rows()
    for name, linear in base_linears(model).items():
        if linear is not model.lm_head:
            replace_module(model, name, LoRASlots(linear, rows))
    model.register_forward_pre_hook(rows.begin, with_kwargs=True)
    for path in paths:
        add_lora(model, str(path), path)


def holds_loras(model: LLaMA) -> bool:
    """Whether `hold_loras` has made room."""
    return any(isinstance(module, LoRASlots) for module in model.modules())


def slots(model: LLaMA) -> dict[str, LoRASlots]:
    """Layer name -> its slots. Raises ValueError where `hold_loras` has not made any."""
    found = {base_name(name): module for name, module in model.named_modules() if isinstance(module, LoRASlots)}
    if not found:
        raise ValueError("the model holds no LoRAs: call hold_loras first")
    return found


@torch.no_grad()
def add_lora(model: LLaMA, name: str, path: str | Path) -> LoRAConfig:
    """Add a saved LoRA (ours or PEFT's) under a name, in the model's dtype. Rows in decoding go on as they are.

    Raises UserError as `read_lora` does, for a LoRA of the head, and for one that came with an adapter.
    """
    path, places = Path(path), slots(model)
    if (path / "adapter").is_dir():
        raise UserError(f"{path}: was trained with an adapter, which all rows would share. Use it alone")
    config, updates = read_lora(path, {own: (slot.out_features, slot.in_features) for own, slot in places.items()})
    drop_lora(model, name)
    like = model.embed_tokens.weight
    for own, (a, b, scaling, magnitude) in updates.items():
        scale = None
        if magnitude is not None:
            weight = places[own].base.weight
            weight = weight.to_dense() if weight.is_mkldnn else weight  # packed for decoding
            scale = dora_scale(weight, *(t.to(like.device) for t in (a, b)), scaling, magnitude.to(like.device))
        places[own].updates[name] = Update(a.to(like), b.to(like), scaling, scale)
    return config


def drop_lora(model: LLaMA, name: str) -> None:
    """Forget a LoRA. Rows that have it chosen keep it until the next `choose_loras`."""
    for slot in slots(model).values():
        slot.updates.pop(name, None)


def choose_loras(model: LLaMA, names: Sequence[str | None]) -> None:
    """Which LoRA each row of the following batches uses; None: the base alone. Raises ValueError for unknown names."""
    places = slots(model).values()
    known = {name for slot in places for name in slot.updates}
    if unknown := {name for name in names if name is not None} - known:
        raise ValueError(f"no LoRA called {', '.join(sorted(unknown))}. There are: {', '.join(sorted(known))}")
    device = model.embed_tokens.weight.device
    rows = {name: torch.tensor([row == name for row in names], device=device) for name in names if name is not None}
    for slot in places:
        slot.choose(rows, len(names))
        slot.rows.count = len(names)
