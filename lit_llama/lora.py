"""LoRA: Hu et al. 2021, arXiv 2106.09685, with rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353) and LoRA+ (arXiv
2402.12354). Files are in the format of Hugging Face PEFT, both ways, and the settings have PEFT's names.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama import fast
from lit_llama.config import LLaMAConfig, is_positive
from lit_llama.dropout import token_dropout, token_mask
from lit_llama.errors import UserError
from lit_llama.files import read_tensors
from lit_llama.methods import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    base_linears,
    base_name,
    place_of,
    read_settings,
    replace_module,
    save_method,
)
from lit_llama.model import LLaMA, recompute

PEFT_PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"


@dataclass
class LoRAConfig:
    """Low-rank adaptation. Raises UserError for values out of range.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input feature of the update, in training.
        targets: the linear layers to adapt, by the end of their names, given once for each or as a list; all-linear:
            all but the head.
        use_rslora: scale by alpha / sqrt(r) instead, which suits high ranks (rsLoRA).
        use_dora: learn the length of each row of the weight apart from its direction (DoRA).
        loraplus_lr_ratio: B learns this many times as fast as A (LoRA+).
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.r <= 2**14:
            raise UserError(f"--lora.r {self.r}: should be at least 1, and at most {2**14}")
        for name in ("alpha", "loraplus_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--lora.{name} {getattr(self, name)}: should be more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--lora.dropout {self.dropout}: should be from 0 to less than 1")
        self.targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not self.targets:
            raise UserError("--lora.targets []: should name at least one linear layer")

    def learning_rate_ratio(self, name: str) -> float:
        """By how much the learning rate of the parameter called `name` is multiplied (LoRA+, section 4)."""
        return self.loraplus_lr_ratio if ".lora_B." in name else 1.0


class LoRALinear(nn.Module):
    """y = W x + scaling * B A dropout(x) + bias  (section 4.1), for DoRA with each output times m / |W + scaling B A|.

    `scaling` is alpha / r. A starts Kaiming-uniform with a = sqrt(5) and B at zero, DoRA's m at the lengths of W's
    rows, so that at first y is the base's. The base is frozen; A, B and m are fp32 and computed with in x's dtype.
    """

    def __init__(
        self, base: nn.Linear, r: int, scaling: float, dropout: float, name: str, use_dora: bool = False
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout, self.name = base, scaling, dropout, name
        place = dict(device=place_of(base.weight), dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, **place)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        # (out_features,): the paper's m
        self.lora_magnitude_vector = nn.Parameter(torch.ones(base.out_features, **place)) if use_dora else None

    @torch.no_grad()
    def init_from_base(self) -> None:
        """DoRA's m from the base's weight, once that is there."""
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(row_lengths(self.base.weight))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        drops = self.training and self.dropout > 0
        y = self.base(x)
        if fast.enabled and x.dim() == 2 and self.lora_magnitude_vector is None and torch.is_grad_enabled():
            x = x.to(y.dtype)
            mask = token_mask(self.dropout, self.name, x) if drops else None
            if mask is not None or not drops:
                a, b = self.lora_A.weight.to(y.dtype), self.lora_B.weight.to(y.dtype)
                scaling = self.scaling / (1 - self.dropout) if drops else self.scaling
                return fast.AddLowRank.apply(y, x, a, b, scaling, mask)
        update = recompute(self.update, x, preserve_rng_state=drops)
        if self.lora_magnitude_vector is None:
            return y + update
        scale = self.dora_scale()
        without_bias = y if self.base.bias is None else y - self.base.bias
        # scale * (W x + update) + bias, put so that a scale of one and no update leave y as it is, to the bit
        return y + (scale - 1).to(y.dtype) * without_bias + scale.to(y.dtype) * update

    def update(self, x: Tensor) -> Tensor:
        """The low-rank term alone."""
        x = token_dropout(x, self.dropout, self.name) if self.training else x
        low_rank = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling  # (..., r)
        return F.linear(low_rank, self.lora_B.weight.to(x.dtype))

    def dora_scale(self) -> Tensor:
        """`dora_scale` of what it holds now."""
        a, b = self.lora_A.weight, self.lora_B.weight
        return dora_scale(self.base.weight, a, b, self.scaling, self.lora_magnitude_vector)


def dora_scale(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor) -> Tensor:
    """m / |W + scaling B A|, one for each row, fp32; the length is taken as a constant (DoRA, section 4.3).

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b A A^T b^T for the rows w of W and b of B: no second weight is made.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        a, b = a.float(), b.float()
        cross = F.linear(weight, a.to(weight.dtype)).float()  # (out_features, r)
        added = (b * (2 * scaling * cross + scaling**2 * (b @ (a @ a.T)))).sum(dim=1)
        lengths = row_lengths(weight)
        # exactly the row's own length where b is zero
        lengths = torch.where(added == 0, lengths, (lengths**2 + added).clamp(min=0).sqrt())
    return magnitude / lengths


def row_lengths(weight: Tensor) -> Tensor:
    """(out, in) -> (out,) fp32: the rows' Euclidean lengths."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def apply_lora(model: LLaMA, config: LoRAConfig) -> None:
    """Put a `LoRALinear` around each target layer, in place. Raises UserError: unknown target."""
    linears = base_linears(model)
    named = {name: base_name(name) for name in linears}
    chosen = set()
    for target in config.targets:
        found = {
            name for name, own in named.items()
            if (own != "lm_head" if target == ALL_LINEAR else f".{own}".endswith(f".{target}"))
        }  # fmt: skip
        if not found:
            known = dict.fromkeys([ALL_LINEAR, *(own.rpartition(".")[2] for own in named.values())])
            raise UserError(f"--lora.targets: no linear layer is called {target!r}. There are: {', '.join(known)}")
        chosen |= found
    scaling = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    for name, linear in linears.items():
        if name in chosen:
            lora = LoRALinear(linear, config.r, scaling, config.dropout, named[name], config.use_dora)
            if not linear.weight.is_meta:
                lora.init_from_base()
            replace_module(model, name, lora.train(model.training))


def merge_lora(model: LLaMA) -> None:
    """Give each base layer W' = W + scaling B A (DoRA: with scaled rows), in fp32 and rounded once; drop the LoRAs."""
    loras = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, lora in loras.items():
        weight = lora.base.weight.float() + lora.scaling * (lora.lora_B.weight @ lora.lora_A.weight)
        if lora.lora_magnitude_vector is not None:
            weight = (lora.lora_magnitude_vector / row_lengths(weight))[:, None] * weight
        # a new tensor, never in place: the old one may be the mapped file itself
        lora.base.weight = nn.Parameter(weight.detach().to(lora.base.weight.dtype), requires_grad=False)
        replace_module(model, name, lora.base)


def save_lora(
    tensors: Mapping[str, Tensor], path: str | Path, config: LoRAConfig, base_model: str = "", template: str = ""
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` (fp32) into the folder `path`, as PEFT does.

    `tensors` are a model's parameters by name, of which the LoRA's are taken: `dict(model.named_parameters())`. Where a
    layer's rank is not `config.r`, its scaling is still alpha / r of `config`. `base_model` is the base's folder or hub
    name; `template`, that of the training, goes into the safetensors header.
    """
    stored = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            own = base_name(name)
            stored[PEFT_PREFIX + (own if own.startswith("lm_head.") else f"model.{own}")] = tensor
    if not stored:
        raise ValueError("the model has no LoRA; call apply_lora first")
    targets = ALL_LINEAR if ALL_LINEAR in config.targets else list(config.targets)
    kind = dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", fan_in_fan_out=False, inference_mode=True)
    sizes = dict(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    more = dict(use_rslora=config.use_rslora, use_dora=config.use_dora, base_model_name_or_path=base_model)
    ranks = {name.removesuffix(".lora_A.weight"): len(a) for name, a in tensors.items() if ".lora_A." in name}
    ranks = {base_name(name): r for name, r in ranks.items() if r != config.r}
    if ranks:
        more |= dict(rank_pattern=ranks, alpha_pattern={name: config.alpha * r / config.r for name, r in ranks.items()})
    save_method(path, kind | sizes | more, stored, template)


def combine_loras(
    paths: Sequence[Path], weights: Sequence[float], config: LLaMAConfig
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """The weighted sum of saved LoRAs of one model as one LoRA, exactly, for `save_lora`; ranks add up.

    A is theirs one below the other, B theirs side by side, each times weight and scaling. Raises UserError as
    `read_lora` does, and for DoRA, whose updates do not add up.
    """
    with torch.device("meta"):
        linears = base_linears(LLaMA(config))
    sizes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}  # layer -> A and weighted B of each LoRA that changes it
    for path, weight in zip(paths, weights, strict=True):
        settings, updates = read_lora(path, sizes)
        if settings.use_dora:
            raise UserError(f"{path}: is a DoRA, whose update is no sum. Merge it into its base: scripts/merge_lora.py")
        for name, update in updates.items():
            parts.setdefault(name, []).append((update.a.float(), weight * update.scaling * update.b.float()))
    tensors = {}
    for name, pairs in parts.items():
        a, b = zip(*pairs, strict=True)
        tensors |= {f"{name}.lora_A.weight": torch.cat(a), f"{name}.lora_B.weight": torch.cat(b, dim=1)}
    r = max(len(tensor) for name, tensor in tensors.items() if ".lora_A." in name)
    ends = dict.fromkeys(name.rpartition(".")[2] for name in parts)
    everywhere = len(parts) == len(ends) * config.num_hidden_layers
    return LoRAConfig(r=r, alpha=r, dropout=0, targets=tuple(ends if everywhere else parts)), tensors


class Update(NamedTuple):
    """What a LoRA adds to a layer: scaling B A, and for DoRA the lengths of the rows that come out."""

    a: Tensor  # (r, in_features)
    b: Tensor  # (out_features, r)
    scaling: float
    magnitude: Tensor | None  # (out_features,)


def load_lora(model: LLaMA, path: str | Path) -> LoRAConfig:
    """Put a saved LoRA (ours or PEFT's) around a model's layers, in place. Raises UserError as `read_lora` does."""
    linears = {base_name(name): (name, linear) for name, linear in base_linears(model).items()}
    sizes = {own: (linear.out_features, linear.in_features) for own, (_, linear) in linears.items()}
    config, updates = read_lora(Path(path), sizes)
    for own, update in updates.items():
        name, linear = linears[own]
        lora = LoRALinear(linear, len(update.a), update.scaling, config.dropout, own, config.use_dora)
        with torch.no_grad():
            lora.lora_A.weight.copy_(update.a)
            lora.lora_B.weight.copy_(update.b)
            if config.use_dora:
                lora.lora_magnitude_vector.copy_(update.magnitude)
        replace_module(model, name, lora.train(model.training))
    return config


def read_lora(path: Path, sizes: Mapping[str, tuple[int, int]]) -> tuple[LoRAConfig, dict[str, Update]]:
    """A saved LoRA, ours or PEFT's: its settings, and the update of each layer that it has one for.

    `sizes` are the model's layers by name: (out_features, in_features). Ranks and layers follow from the tensors in the
    file, so PEFT's `rank_pattern` and ways to name targets need no reading. Raises UserError where there is no LoRA, it
    is damaged, for another model or unsupported.
    """
    settings = read_lora_settings(path)
    tensors, _ = read_tensors(path / WEIGHTS_FILE)
    # PEFT puts a copy of the base weight beside a LoRA on lm_head
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}
    stored_names = sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
    use_rslora, use_dora = (bool(settings.get(key)) for key in ("use_rslora", "use_dora"))
    alphas = [(_layer_pattern(key, path), alpha) for key, alpha in (settings.get("alpha_pattern") or {}).items()]
    updates = {}
    for stored in stored_names:
        own = stored.removeprefix(PEFT_PREFIX).removeprefix("model.")
        parts = [tensors.pop(f"{stored}.lora_{side}.weight", None) for side in "AB"]
        if use_dora:
            parts.append(tensors.pop(f"{stored}.lora_magnitude_vector", None))
        if own not in sizes or any(part is None for part in parts):
            raise UserError(f"{path}: has a LoRA for {stored}, the model has no such layer. It is for another model")
        (out_features, in_features), r = sizes[own], max(parts[0].shape[0] if parts[0].dim() else 0, 1)
        found = [tuple(part.shape) for part in parts]
        wanted = [(r, in_features), (out_features, r), (out_features,)][: len(parts)]
        if found != wanted:
            raise UserError(f"{path}: {stored} has shapes {found}, the model asks for {wanted}")
        if r != settings["r"] and not settings.get("rank_pattern"):
            raise UserError(f"{path}: {stored} has rank {r}, r in {CONFIG_FILE} is {settings['r']}")
        for part in parts:
            if not part.is_floating_point():
                raise UserError(f"{path}: {stored} holds {part.dtype}, not floating-point numbers")
        matching = (value for pattern, value in alphas if pattern.match(stored.removeprefix(PEFT_PREFIX)))
        scaling = next(matching, settings["lora_alpha"]) / (math.sqrt(r) if use_rslora else r)
        updates[own] = Update(parts[0], parts[1], scaling, parts[2] if use_dora else None)
    if tensors or not updates:
        raise UserError(f"{path}: holds tensors that are no LoRA of a linear layer: {', '.join(sorted(tensors)[:3])}")
    targets = tuple(dict.fromkeys(stored.rpartition(".")[2] for stored in stored_names))
    options = (settings.get("lora_dropout") or 0.0, targets, use_rslora, use_dora)
    return LoRAConfig(settings["r"], settings["lora_alpha"], *options), updates


def _layer_pattern(key: str, path: Path) -> re.Pattern:
    """A layer's name in PEFT's `alpha_pattern`, which may be a regular expression. Raises UserError for a bad one.

    One with many repeats, or a group repeated, may take years to match, and is refused.
    """
    if len(re.findall(r"[*+{]", key)) > 3 or re.search(r"\)[*+{]", key):
        raise UserError(f"{path / CONFIG_FILE}: the pattern {key!r} in alpha_pattern repeats too much")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{path / CONFIG_FILE}: {key!r} in alpha_pattern is no pattern ({error})") from None


def read_lora_settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA folder. Raises UserError where it asks for something that is not supported."""
    file = path / CONFIG_FILE
    settings = read_settings(path, "peft_type", ("LORA",), "finetune/lora.py")
    unsupported = [
        *("lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices"),
        *("layer_replication", "alora_invocation_tokens", "bias"),
    ]
    if str(settings.get("init_lora_weights")).startswith(("pissa", "olora", "corda")):
        unsupported.append("init_lora_weights")  # these change the base too: it is not the one that we have
    for key in unsupported:
        if settings.get(key) and settings[key] != "none":
            raise UserError(f"{file}: {key} is {settings[key]!r}, which is not supported")
    for key in ("alpha_pattern", "rank_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise UserError(f"{file}: {key} should be an object of layers, is {settings[key]!r}")
    alphas, dropout = settings.get("alpha_pattern") or {}, settings.get("lora_dropout") or 0.0
    for value in (settings.get("lora_alpha"), *alphas.values()):
        if not is_positive(value):
            raise UserError(f"{file}: lora_alpha and alpha_pattern should have positive numbers, not {value!r}")
    if type(settings.get("r")) is not int or settings["r"] < 1:
        raise UserError(f"{file}: r should be a positive integer, is {settings.get('r')!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"{file}: lora_dropout should be a number from 0 to less than 1, is {dropout!r}")
    if not isinstance(settings.get("target_modules") or [], (str, list)):
        raise UserError(f"{file}: target_modules should be text or a list, is {settings['target_modules']!r}")
    return settings
