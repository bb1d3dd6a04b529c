"""What a LLaMA is made of: the fields of Hugging Face's `config.json`, under their own names."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError
from lit_llama.files import MAX_JSON_BYTES, read_text, replacing

LLAMA3_ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
MOST = {"num_hidden_layers": 1000, "head_dim": 10**4, "max_position_embeddings": 10**9}
"""Bounds of sizes, others' is 10 million: damaged ones must not ask for a model that takes hours to lay out."""


@dataclass
class LLaMAConfig:
    """The architecture of one model. Field names are those of `config.json`; defaults are LLaMA 7B's.

    `rope_scaling` is None or a dictionary with `rope_type` "linear" (`factor`) or "llama3" (`factor`,
    `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`).
    """

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
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Fields of `config.json` that do not change the forward pass; written back by `save`."""

    @classmethod
    def from_name(cls, name: str) -> "LLaMAConfig":
        """The published architecture called `name`, e.g. "7B" or "Llama-3.2-1B". Raises UserError for unknown ones."""
        if name not in _TABLE:
            raise UserError(f"unknown model name {name!r}. Known: {', '.join(_TABLE)}")
        *sizes, context, eps, theta, tied, bos, eos = _TABLE[name]
        rope_scaling = LLAMA3_ROPE | {"factor": 32.0} if name.startswith("Llama-3.2") else None
        return cls(*sizes, sizes[1] // sizes[4], context, eps, theta, rope_scaling, tied, False, False, bos, eos)

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path) -> "LLaMAConfig":
        """Read `config.json` of a Hugging Face model folder.

        Raises UserError where there is none, for a model type, activation, rope kind or sliding window that this code
        does not compute, and for a field that is missing, of the wrong type or out of bounds.
        """
        path = Path(checkpoint_dir) / "config.json"
        if not path.exists():
            hint = "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
            raise UserError(f"{path.parent}: no config.json there. Download a model first: {hint}")
        raw = read_json(path)
        supported = {"model_type": ("llama", "mistral"), "hidden_act": ("silu", None), "sliding_window": (None,)}
        for key, values in supported.items():
            if raw.get(key) not in values:
                known = " or ".join(value or "none" for value in values)
                raise UserError(f"{path}: {key} {raw.get(key)!r} is not supported, only {known}")
        # transformers 5 writes `rope_parameters`, which holds rope_theta too; earlier ones `rope_scaling`
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        values = {f.name: raw[f.name] for f in dataclasses.fields(cls) if raw.get(f.name) is not None}
        values |= {"rope_theta": rope_theta} if rope_theta is not None else {}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if name not in values:
                raise UserError(f"{path}: the field {name!r} is missing. Download this file of the model again")
        values |= dict(bos_token_id=raw.get("bos_token_id"), eos_token_id=raw.get("eos_token_id"), rope_scaling=rope)
        # `auto_map` names code in the folder; what is computed here is plain LLaMA, which needs none
        known = {f.name for f in dataclasses.fields(cls)} | {"rope_parameters", "dtype", "torch_dtype", "auto_map"}
        return cls.checked(path, **values, extra={key: value for key, value in raw.items() if key not in known})

    @classmethod
    def checked(cls, source: Path, **fields: Any) -> "LLaMAConfig":
        """The config of fields that come from the file `source`, which a UserError names: one is no possible value.

        Without `num_key_value_heads` and `head_dim`, these follow from the other fields.
        """
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        for name, value in fields.items():
            kind, most = kinds[name], MOST.get(name, 10**7)
            if kind is bool and type(value) is not bool:
                raise UserError(f"{source}: the field {name!r} should be bool, not {value!r}")
            if kind is int and (type(value) is not int or not 1 <= value <= most):
                raise UserError(
                    f"{source}: the field {name!r} should be int of at least 1 and at most {most:,}, not {value!r}"
                )
            if kind is float and not is_positive(value):
                raise UserError(f"{source}: the field {name!r} should be float of more than 0, not {value!r}")
            fields[name] = float(value) if kind is float else value
        hidden, heads, vocab = (fields[name] for name in ("hidden_size", "num_attention_heads", "vocab_size"))
        kv_heads = fields.setdefault("num_key_value_heads", heads)
        head_dim = fields.setdefault("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2 or head_dim < 1:
            what = f"{heads} heads are no multiple of {kv_heads} key/value heads, or head_dim {head_dim} is odd"
            raise UserError(f"{source}: {what} or 0")
        bos, eos = fields.get("bos_token_id"), fields.get("eos_token_id")
        for name, ids in (("bos", [bos]), ("eos", eos if isinstance(eos, list) else [eos])):
            for index in ids:
                if index is not None and (type(index) is not int or not 0 <= index < vocab):
                    raise UserError(
                        f"{source}: {name}_token_id {index!r} is none of the {vocab:,} ids of the vocabulary"
                    )
        fields["rope_scaling"] = _checked_rope_scaling(fields.get("rope_scaling") or {}, source)
        return cls(**fields)

    def save(self, checkpoint_dir: str | Path, dtype: object) -> None:
        """Write the `config.json` that `transformers` and `from_checkpoint` read into a folder of `dtype` weights."""
        own = dataclasses.asdict(self)
        base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        values = base | own.pop("extra") | own | {"torch_dtype": str(dtype).removeprefix("torch.")}
        with replacing(Path(checkpoint_dir) / "config.json") as file:
            file.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError as `read_text` does, and where it is something else than that."""
    text = read_text(path, MAX_JSON_BYTES, ". Download or write this file again")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Download or write this file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, holds {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's dictionary. Raises ValueError for a key with two values: which one is meant?"""
    found = dict(pairs)
    for key, value in pairs:
        if found[key] is not value and found[key] != value:
            raise ValueError(f"the key {key!r} is there twice")
    return found


def is_positive(value: Any) -> bool:
    """Whether it is a number of more than 0 that is not beyond reason."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def _checked_rope_scaling(rope: Any, path: Path) -> dict[str, Any] | None:
    """`rope` without rope_theta, or None where positions are not scaled. Raises UserError for other kinds."""
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else repr(rope)
    required = {"default": [], "linear": ["factor"], "llama3": ["factor", *list(LLAMA3_ROPE)[1:]]}
    if kind not in list(required):  # which may be no text
        raise UserError(f"{path}: rope type {kind!r} is not supported. Supported: {', '.join(required)}")
    for key in required[kind]:
        if not is_positive(rope.get(key)):
            raise UserError(f"{path}: rope type {kind!r} needs a positive number {key!r}, found {rope.get(key)!r}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{path}: rope type 'llama3' needs a low_freq_factor below its high_freq_factor")
    return None if kind == "default" else {"rope_type": kind} | {key: rope[key] for key in required[kind]}


# fmt: off
# name: vocab, hidden, intermediate, layers, heads, key/value heads, context, eps, theta, tied, bos, eos
_TABLE = {
    "7B":             (32000, 4096, 11008, 32, 32, 32, 2048, 1e-6, 1e4, False, 1, 2),
    "13B":            (32000, 5120, 13824, 40, 40, 40, 2048, 1e-6, 1e4, False, 1, 2),
    "30B":            (32000, 6656, 17920, 60, 52, 52, 2048, 1e-6, 1e4, False, 1, 2),
    "65B":            (32000, 8192, 22016, 80, 64, 64, 2048, 1e-5, 1e4, False, 1, 2),
    "Llama-2-7B":     (32000, 4096, 11008, 32, 32, 32, 4096, 1e-5, 1e4, False, 1, 2),
    "Llama-2-13B":    (32000, 5120, 13824, 40, 40, 40, 4096, 1e-5, 1e4, False, 1, 2),
    "Llama-2-70B":    (32000, 8192, 28672, 80, 64, 8, 4096, 1e-5, 1e4, False, 1, 2),
    "Llama-3-8B":     (128256, 4096, 14336, 32, 32, 8, 8192, 1e-5, 5e5, False, 128000, 128001),
    "Llama-3.2-1B":   (128256, 2048, 8192, 16, 32, 8, 131072, 1e-5, 5e5, True, 128000, 128001),
    "Llama-3.2-3B":   (128256, 3072, 8192, 28, 24, 8, 131072, 1e-5, 5e5, True, 128000, 128001),
    "TinyLlama-1.1B": (32000, 2048, 5632, 22, 32, 4, 2048, 1e-5, 1e4, False, 1, 2),
    "SmolLM2-135M":   (49152, 576, 1536, 30, 9, 3, 8192, 1e-5, 1e5, True, 1, 2),
    "SmolLM2-360M":   (49152, 960, 2560, 32, 15, 5, 8192, 1e-5, 1e5, True, 1, 2),
    "SmolLM2-1.7B":   (49152, 2048, 8192, 24, 32, 32, 8192, 1e-5, 1.3e5, True, 1, 2),
}
# fmt: on
