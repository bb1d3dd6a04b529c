"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al. 2021, arXiv 2106.09685."""

# With rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353) and LoRA+ (arXiv 2402.12354, a learning
# rate, so it is in the table of methods). Settings are named as in Hugging Face PEFT, and saved in
# its format: see `lit_llama/storage/peft.py`.

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.args import LoRAConfig
from lit_llama.dropout import token_dropout
from lit_llama.errors import UserError
from lit_llama.model import LLaMA
from lit_llama.wrapping import base_linears, base_name, init_device

ALL_LINEAR = "all-linear"


class LoRALinear(nn.Module):
    """y = base(x) + scaling * B A dropout(x), with scaling = alpha / r (section 4.1)."""

    # rsLoRA scales by alpha / sqrt(r). DoRA multiplies each output by m / |W + scaling B A|, with a
    # learned magnitude m (section 4.1 there). `name` is the layer's checkpoint name, for dropout.
    # `trained`: the weights are those of a saved LoRA.
    def __init__(
        self,
        base: nn.Linear,
        r: int,
        scaling: float,
        dropout: float,
        name: str,
        dora: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.dropout, self.name, self.trained = dropout, name, False
        # What is trained is fp32, whatever the dtype of the frozen weight.
        factory_kwargs = dict(device=init_device(base.weight), dtype=torch.float32)
        self.lora_A = nn.Linear(base.in_features, r, bias=False, **factory_kwargs)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, **factory_kwargs)
        # B starts at zero, so that the first forward pass is that of the base.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        magnitude = torch.ones(base.out_features, **factory_kwargs) if dora else None
        self.lora_magnitude_vector = None if magnitude is None else nn.Parameter(magnitude)

    @torch.no_grad()
    def init_from_base(self) -> None:
        """Initialize DoRA's magnitude from the base weight. Call after loading weights."""
        if self.lora_magnitude_vector is not None and not self.trained:
            self.lora_magnitude_vector.copy_(row_norms(self.base.weight))

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        y = self.base(x)
        update = self.update(x)
        if self.lora_magnitude_vector is None:
            return y + update
        # The bias is not scaled. Written so that a scale of one and an update of zero return y
        # unchanged to the bit, which is where training starts.
        a, b, m = self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector
        scale = dora_scale(self.base.weight, a, b, self.scaling, m)
        without_bias = y if self.base.bias is None else y - self.base.bias
        return y + (scale - 1).to(y.dtype) * without_bias + scale.to(y.dtype) * update

    def update(self, x: Tensor) -> Tensor:
        """Compute scaling * B A dropout(x)."""
        if self.training:
            x = token_dropout(x, self.dropout, self.name)
        # A and B are fp32 for the optimizer; the matmuls run in the dtype of x.
        low_rank = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling  # (..., r)
        return F.linear(low_rank, self.lora_B.weight.to(x.dtype))


def dora_scale(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    magnitude: Tensor,
) -> Tensor:
    """Compute m / |W + scaling B A| per row, (out_features,) in fp32 (DoRA, eq. 5)."""
    # No gradient flows through the norm (section 4.3 there). W + scaling B A itself is not made:
    # |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b A A^T b^T, for the rows w of W and b of B.
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        a, b = a.float(), b.float()
        cross = F.linear(weight, a.to(weight.dtype)).float()  # (out_features, r)
        added = (b * (2 * scaling * cross + scaling**2 * (b @ (a @ a.T)))).sum(dim=1)
        norms = row_norms(weight)
        # Exactly |w| if b is zero: squaring and rooting would round.
        norms = torch.where(added == 0, norms, (norms**2 + added).clamp(min=0).sqrt())
    return magnitude / norms


def row_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, (out_features,) in fp32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def apply_lora(model: LLaMA, config: LoRAConfig) -> None:
    """Wrap each target layer in a `LoRALinear`, in place."""
    linears = base_linears(model)
    chosen = [name for target in config.targets for name in _find_targets(linears, target)]
    if not chosen:
        raise UserError("--lora.targets: name at least one linear layer, or all-linear")
    scaling = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    if "lm_head" in map(base_name, chosen) and config.dropout > 0:
        # Dropout masks are per token of the micro-batch, but the head sees labelled tokens only.
        raise UserError("--lora.targets lm_head: works without dropout only. Pass --lora.dropout 0")
    settings = dict(scaling=scaling, dropout=config.dropout, dora=config.use_dora)
    # In the order of the layers, so that one seed gives one start whatever the order of targets.
    for name, linear in linears.items():
        if name in chosen:
            lora = LoRALinear(linear, config.r, name=base_name(name), **settings)
            if not linear.weight.is_meta:
                lora.init_from_base()
            model.set_submodule(name, lora.train(model.training))


def _find_targets(linears: dict[str, nn.Linear], target: str) -> list[str]:
    """Return the layers whose name ends in `target`; all but the head for "all-linear"."""
    if target == ALL_LINEAR:
        found = [name for name in linears if base_name(name) != "lm_head"]
    else:
        found = [name for name in linears if f".{base_name(name)}".endswith(f".{target}")]
    if not found:
        known = dict.fromkeys(base_name(name).rpartition(".")[2] for name in linears)
        known = ", ".join([ALL_LINEAR, *known])
        raise UserError(f"--lora.targets: no linear layer is called {target!r}. Known: {known}")
    return found


@torch.no_grad()
def merge_lora(model: LLaMA) -> None:
    """Replace each LoRA layer by a plain one with the merged weight, in place."""
    for name, lora in list(model.named_modules()):
        if isinstance(lora, LoRALinear):
            a, b, weight = lora.lora_A.weight, lora.lora_B.weight, lora.base.weight
            # The old weight is not changed: it may be memory-mapped from the checkpoint.
            weight = merged_weight(weight, a, b, lora.scaling, lora.lora_magnitude_vector)
            lora.base.weight = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, lora.base)


def merged_weight(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None
) -> Tensor:
    """Compute W' = W + scaling B A (section 4.1), and with DoRA scale its rows to the norm m."""
    # In fp32, rounded once.
    merged = weight.float() + scaling * (b.float() @ a.float())
    if magnitude is not None:
        merged = (magnitude / row_norms(merged))[:, None] * merged
    return merged.to(weight.dtype)


def __getattr__(name: str) -> object:
    # Files are not the paper's subject: these two are in `storage`, which imports this module.
    if name in ("load_lora", "save_lora"):
        from lit_llama.storage import loras, peft

        return {"load_lora": loras.load_lora, "save_lora": peft.save_lora}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
