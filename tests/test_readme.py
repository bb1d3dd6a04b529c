"""The README's table of methods, computed from the shapes of the 7B model."""

import re

import torch
from conftest import ROOT

from lit_llama import LLaMA, LLaMAConfig
from lit_llama.adapter import AdapterConfig, apply_adapter, apply_adapter_v2
from lit_llama.lora import LoRAConfig, apply_lora
from lit_llama.wrapping import unfreeze

ALL, ADAPTER = ("all-linear",), AdapterConfig()
METHODS = {
    "LoRA on query and value": lambda model: apply_lora(model, LoRAConfig()),
    "LoRA on all linear layers": lambda model: apply_lora(model, LoRAConfig(targets=ALL)),
    "DoRA on all linear layers": lambda model: apply_lora(
        model, LoRAConfig(targets=ALL, use_dora=True)
    ),
    "LLaMA-Adapter": lambda model: apply_adapter(model, ADAPTER),
    "LLaMA-Adapter v2": lambda model: apply_adapter_v2(model, ADAPTER),
    "full, bf16-mixed": lambda model: unfreeze(model, "bf16-mixed"),
    "full, bf16-true": lambda model: unfreeze(model, "bf16-true"),
}


def figures(name: str) -> tuple[str, str, str]:
    """Trained parameters and their share, file size, memory of weights, gradients and AdamW."""
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig.from_name("7B")).bfloat16().requires_grad_(False)
    base = sum(parameter.numel() for parameter in model.parameters())
    METHODS[name](model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    size = count * (2 if name.startswith("full") else 4)
    weights = sum(p.numel() * (p.element_size() if p.is_meta else 4) for p in model.parameters())
    memory = weights + sum(3 * p.numel() * p.element_size() for p in trained)
    file_size = f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB"
    return f"{count:,} ({count / base:.2%})", file_size, f"{memory / 1e9:.1f} GB"


def test_table_of_methods() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    row = r"^\| (.+?) \| `finetune/.+?` \| (.+?) \| (.+?) \| (.+?) \|$"
    rows = re.findall(row, text, re.MULTILINE)
    found = {re.split(r", r 8| \(", row[0])[0]: row[1:] for row in rows}
    assert found == {name: figures(name) for name in METHODS}
