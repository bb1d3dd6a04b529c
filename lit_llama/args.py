"""Settings of the methods. Each field is a flag, such as `--lora.r`."""

# Types define the valid values, docstrings are what --help prints. Importing does not load torch.

from dataclasses import dataclass

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from jsonargparse.typing import restricted_number_type as restrict

# a dropout of 1 would divide by zero, and so would AdamW's bias correction with a beta of 1
BelowOne = restrict("BelowOne", float, [(">=", 0), ("<", 1)])


@dataclass
class LoRAConfig:
    """Low-rank adaptation.

    Args:
        r: Rank of the update.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout probability of the update's input.
        targets: Linear layers to adapt, or all-linear.
        use_rslora: Scale by alpha / sqrt(r), for high ranks (rsLoRA).
        use_dora: Learn each weight row's norm separately (DoRA).
        loraplus_lr_ratio: Learning rate of B, as a multiple of A's (LoRA+).
    """

    r: PositiveInt = 8
    alpha: PositiveFloat = 16
    dropout: BelowOne = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        # one name is enough for Python users; JSON and YAML have lists only
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        self.targets = tuple(targets)


@dataclass
class AdapterConfig:
    """LLaMA-Adapter.

    Args:
        prompt_length: Number of learned prompt vectors per layer.
        start_layer: First layer with a prompt, counted from 0.
    """

    prompt_length: PositiveInt = 10
    start_layer: NonNegativeInt = 2
