"""LLaMAConfig: the architecture of a model, in the field names of Hugging Face's `config.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError

# Llama 3.1 and later stretch RoPE for a longer context; each model adds its own `factor`
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE["original_max_position_embeddings"] = 8192
ROPE_FIELDS = {"default": [], "linear": ["factor"], "llama3": ["factor", *list(LLAMA3_ROPE)[1:]]}
# models with other values would load, and silently compute something else than they should
SUPPORTED = dict(model_type=["llama", "mistral"], hidden_act=["silu", None], sliding_window=[None])
# beginnings of fields about code in the folder, or how its weights were stored
NOT_KEPT = ("auto_map", "dtype", "torch_dtype", "quant", "compress", "load_in_", "rope_parameters")


@dataclass
class LLaMAConfig:
    """Architecture of a LLaMA. Field names are those of `config.json`, defaults are LLaMA 7B's."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # `rope_type` and its ROPE_FIELDS
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    # fields that do not change the forward pass; `to_json` writes them back
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_name(cls, name: str) -> "LLaMAConfig":
        """Return the published architecture `name`, e.g. "7B" or "Llama-3.2-1B"."""
        names = {key.lower(): key for key in _PUBLISHED}
        if (known := names.get(name.lower().removesuffix("-hf"))) is None:
            raise UserError(f"unknown model name {name!r}. Known: {', '.join(_PUBLISHED)}")
        bos, eos = {"Llama-3": (128000, 128001), "SmolLM2": (0, 0)}.get(known[:7], (1, 2))
        return cls(*_PUBLISHED[known], bos_token_id=bos, eos_token_id=eos)

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path) -> "LLaMAConfig":
        """Load `config.json` of a model folder. Raises UserError if it is not a plain LLaMA's."""
        path = Path(checkpoint_dir) / "config.json"
        if not path.exists():
            hint = "no config.json there. Run scripts/download.py first"
            if path.with_name("adapter_config.json").exists():
                hint = "a LoRA or adapter: pass its base here, and it as --lora_path or --init_from"
            raise UserError(f"{path.parent}: {hint}")
        raw = read_json(path)
        for key, values in SUPPORTED.items():
            if raw.get(key) not in values:
                raise UserError(f"{path}: {key} {raw.get(key)!r} is not supported, only {values}")
        # transformers 5 writes `rope_parameters`, with rope_theta in it, but `rope_scaling` wins
        raw["rope_scaling"] = rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        raw["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta")
        fields = {name: raw[name] for name in cls.__annotations__ if raw.get(name) is not None}
        # a chat model may name its end tokens in generation_config.json only
        other = path.with_name("generation_config.json")
        found = [f.get("eos_token_id") for f in (raw, read_json(other) if other.exists() else raw)]
        found = [end for ids in found for end in (ids if isinstance(ids, list) else [ids])]
        ends = [end for end in dict.fromkeys(found) if end is not None] or [None]
        fields["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        fields["bos_token_id"] = raw.get("bos_token_id")
        fields["extra"] = {key: raw[key] for key in raw if not key.startswith(NOT_KEPT)}
        return cls.from_fields(path, **fields)

    @classmethod
    def from_fields(cls, source: Path, **fields: Any) -> "LLaMAConfig":
        """Build a config from fields of the file `source`. Derives the head sizes if absent."""
        # the first five are sizes, for which no default could be right
        for name in list(cls.__annotations__)[:5]:
            if name not in fields:
                raise UserError(f"{source}: the field {name!r} is missing. Download it again")
        texts = [name for name in cls.__annotations__ if isinstance(fields.get(name), str)]
        if texts:  # YAML reads 1e-5 as a text, and some tools write it as such
            raise UserError(f"{source}: {texts[0]} is the text {fields[texts[0]]!r}, not a number")
        heads = fields["num_attention_heads"]
        kv_heads = fields.setdefault("num_key_value_heads", heads)
        head_dim = fields.setdefault("head_dim", fields["hidden_size"] // heads)
        # each key/value head serves equally many queries, and RoPE rotates pairs of features
        if heads % kv_heads or head_dim % 2:
            sizes = f"{heads} heads, {kv_heads} key/value heads, head_dim {head_dim}"
            raise UserError(f"{source}: {sizes}: not divisible")
        rope = fields.get("rope_scaling") or {}
        # files of transformers before 4.43 call it `type`
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if not rope.keys() >= set(ROPE_FIELDS.get(rope_type, ["?"])):
            raise UserError(f"{source}: rope_scaling {rope} is not supported, only {ROPE_FIELDS}")
        scaling = {"rope_type": rope_type} | {name: rope[name] for name in ROPE_FIELDS[rope_type]}
        return cls(**fields | {"rope_scaling": None if rope_type == "default" else scaling})

    def to_json(self, dtype: object) -> str:
        """Return a `config.json` that `transformers` reads, too, for weights of `dtype`."""
        fields = asdict(self) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        # `extra` comes second: it may hold another model_type, such as mistral
        kind = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")
        return json.dumps(kind | fields.pop("extra") | fields, indent=2) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Load a JSON object from a file. Raises UserError if it is missing or malformed."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: not UTF-8 or not JSON
        raise UserError(f"{path}: cannot be read ({error}). Download or write it again") from None


_LLAMA31, _LLAMA32 = (LLAMA3_ROPE | {"factor": factor} for factor in (8.0, 32.0))
# the columns are LLaMAConfig's first fields, in order
_PUBLISHED = {
    "7B": (32000, 4096, 11008, 32, 32, 32, 128, 2048, 1e-6, 1e4, None, False),
    "13B": (32000, 5120, 13824, 40, 40, 40, 128, 2048, 1e-6, 1e4, None, False),
    "30B": (32000, 6656, 17920, 60, 52, 52, 128, 2048, 1e-6, 1e4, None, False),
    "65B": (32000, 8192, 22016, 80, 64, 64, 128, 2048, 1e-5, 1e4, None, False),
    "Llama-2-7B": (32000, 4096, 11008, 32, 32, 32, 128, 4096, 1e-5, 1e4, None, False),
    "Llama-2-13B": (32000, 5120, 13824, 40, 40, 40, 128, 4096, 1e-5, 1e4, None, False),
    "Llama-2-70B": (32000, 8192, 28672, 80, 64, 8, 128, 4096, 1e-5, 1e4, None, False),
    "Llama-3-8B": (128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False),
    "Llama-3.1-8B": (128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5, 5e5, _LLAMA31, False),
    "Llama-3.1-70B": (128256, 8192, 28672, 80, 64, 8, 128, 131072, 1e-5, 5e5, _LLAMA31, False),
    "Llama-3.3-70B": (128256, 8192, 28672, 80, 64, 8, 128, 131072, 1e-5, 5e5, _LLAMA31, False),
    "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 5e5, _LLAMA32, True),
    "Llama-3.2-3B": (128256, 3072, 8192, 28, 24, 8, 128, 131072, 1e-5, 5e5, _LLAMA32, True),
    "Mistral-7B": (32768, 4096, 14336, 32, 32, 8, 128, 32768, 1e-5, 1e6, None, False),  # v0.3
    "TinyLlama-1.1B": (32000, 2048, 5632, 22, 32, 4, 64, 2048, 1e-5, 1e4, None, False),
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, 1e5, None, True),
    "SmolLM2-360M": (49152, 960, 2560, 32, 15, 5, 64, 8192, 1e-5, 1e5, None, True),
    "SmolLM2-1.7B": (49152, 2048, 8192, 24, 32, 32, 64, 8192, 1e-5, 1.3e5, None, True),
}
