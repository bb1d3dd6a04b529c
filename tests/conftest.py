"""Tiny random models in Hugging Face's format, and the project's scripts as importable modules."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# with --numprocesses; otherwise the processes fight for the cores
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest
import torch
import warm
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from lit_llama.runtime import hardware

ROOT = Path(__file__).resolve().parent.parent
# as Python does for `python scripts/...`
sys.path[:0] = [str(ROOT / name) for name in ("scripts", "generate", "evaluate", "benchmarks")]


# Timings would choose now this precision and now that. Tests of a choice fake others; those of
# timing take these two.
measure_linears, measure_short_attention = hardware.time_linears, hardware.short_attention_pays
hardware.time_linears = lambda *args, **kwargs: {
    (torch.bfloat16, False): 1,
    (torch.float32, False): 2,
}
hardware.short_attention_pays = lambda *args: True


def load_script(name: str) -> ModuleType:
    """A script as a module: `load_script("finetune/lora.py").main`."""
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_hf_model(seed: int = 0, **settings) -> LlamaForCausalLM:
    """A random two-layer LLaMA of `transformers`, fp32; `settings` go to its LlamaConfig."""
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(LlamaConfig(**(defaults | settings))).eval()


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE `tokenizer.json` with the special tokens of ChatML, <pad>, <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentence = "the quick brown fox jumps over the lazy dog, and then the other one"
    tokenizer.train_from_iterator([sentence] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    # else transformers 5.0 makes another one of tokenizer.json
    options["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def save_sentencepiece(file: Path, sentences: Iterable[str], vocab_size: int) -> None:
    """A tokenizer.model like LLaMA's: BPE, byte fallback, no normalization, a leading space."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(file.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def save_checkpoint_folder(folder: Path, **settings) -> LlamaForCausalLM:
    """A model folder with weights, config and tokenizer, as `transformers` writes it."""
    model = make_hf_model(**settings)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python for scripts that need a process of their own, which starts at once: see warm.py."""
    launcher, server = warm.start(tmp_path_factory.mktemp("python"))
    yield launcher
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that tests only read."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_checkpoint_folder(folder, num_key_value_heads=2)
    return folder


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty Alpaca records of different lengths."""
    records = [
        {
            "instruction": f"Count to {n}.",
            "input": "from one" if n % 3 else "",
            "output": " ".join("one two"[: n % 8] or "x"),
        }
        for n in range(60)
    ]
    file = tmp_path_factory.mktemp("source") / "records.json"
    file.write_text(json.dumps(records), "utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_data(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, records_file: Path
) -> Path:
    """A tokenized dataset for `tiny_checkpoint`: 50 records to train, 10 to validate."""
    prepare_json = load_script("scripts/prepare_json.py")
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare_json.main(records_file, tiny_checkpoint, folder, val_size=10, max_seq_length=400)
    return folder
