"""The part `--peers` of benchmarks/gpu.py: PEFT, transformers and LitGPT on the same weights.

All train and decode in one process, one after the other and then once more, on the random weights
and samples of benchmarks/gpu.py. Equal losses of the first step say that the weights are the same.
"""

import gc
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu import (
    WARMUP_STEPS,
    Bench,
    Figures,
    make_step,
    random_model,
    random_samples,
    samples_of,
)

from finetune import Batch, litgpt_step, padded, peft_step
from generate import Decode, litgpt_decode, transformers_decode
from lit_llama.args import LoRAConfig
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.generation import Sampling, stream
from lit_llama.runtime.hardware import peak_memory_bytes

DROPOUT = 0.05
Train = Callable[[int], float]  # takes the number of a step and returns its loss


def hf_model(bench: Bench) -> torch.nn.Module:
    """Make the same model as `random_model`, as one of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(bench.config.to_json(torch.bfloat16), "utf-8")
        config = AutoConfig.from_pretrained(folder)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(hf_weights(bench), strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


def hf_weights(bench: Bench) -> dict[str, torch.Tensor]:
    weights = random_model(bench.config, bench.device).state_dict()
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in weights}
    return {names[name]: weight for name, weight in weights.items()}


def litgpt_model(bench: Bench, **lora: object) -> torch.nn.Module:
    """Make the same model as one of LitGPT, with or without a LoRA."""
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    if lora:
        from litgpt.lora import GPT, Config
    else:
        from litgpt.model import GPT, Config

    ours = bench.config
    config = Config(
        name="same",
        block_size=ours.max_position_embeddings,
        padded_vocab_size=ours.vocab_size,
        vocab_size=ours.vocab_size,
        n_layer=ours.num_hidden_layers,
        n_head=ours.num_attention_heads,
        n_query_groups=ours.num_key_value_heads,
        n_embd=ours.hidden_size,
        head_size=ours.head_dim,
        intermediate_size=ours.intermediate_size,
        rope_base=int(ours.rope_theta),
        norm_eps=ours.rms_norm_eps,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        **lora,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            model = GPT(config)
    finally:
        torch.set_default_dtype(before)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, hf_weights(bench))
    model.load_state_dict(weights, strict=False, assign=True)  # all but those of a LoRA
    return model


def our_training(bench: Bench, recompute: str) -> Train:
    settings = LoRAConfig(dropout=DROPOUT)
    # The peers do not clip gradients either.
    step = make_step(bench, bench.config, "LORA", settings, max_grad_norm=0, recompute=recompute)
    return lambda number: step(number)[0]


def peer_training(bench: Bench, train: Callable[[Batch], torch.Tensor]) -> Train:
    data = random_samples(bench, bench.config)

    def step(number: int) -> float:
        return float(train(padded(data, samples_of(bench, number), bench.device)))

    return step


def peft_training(bench: Bench) -> Train:
    return peer_training(bench, peft_step(hf_model(bench), bench.device))


def litgpt_training(bench: Bench) -> Train:
    from litgpt.lora import mark_only_lora_as_trainable

    options = dict(lora_r=8, lora_alpha=16, lora_dropout=DROPOUT)
    model = litgpt_model(bench, **options, lora_query=True, lora_value=True)
    mark_only_lora_as_trainable(model)
    return peer_training(bench, litgpt_step(model))


def our_decoding(bench: Bench) -> Decode:
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the scripts do
    model = random_model(bench.config, bench.device).eval()
    optimize_for_inference(model, bench.device)

    def decode(prompts: torch.Tensor, new: int) -> list[float]:
        sampling = Sampling(new, temperature=0)
        return [time.perf_counter() for _ in stream(model, list(prompts), sampling)]

    return decode


def in_turn(
    bench: Bench,
    contenders: dict[str, tuple[str, Callable]],
    measure: Callable[[Callable], dict[str, float]],
) -> Figures:
    """Measure the contenders whose package is installed, twice, each with its memory freed."""
    installed = {"lit_llama", *(d.metadata["Name"] for d in importlib.metadata.distributions())}
    for number in range(2):
        for name, (package, make) in contenders.items():
            if package not in installed:
                continue
            gc.collect()
            if bench.on_gpu:
                torch.cuda.empty_cache()
            torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default; ours turns it off
            figures = dict(round=number + 1, contender=name)
            try:
                contender = make(bench)
                if bench.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                yield figures | measure(contender)
            except Exception as error:  # the others go on
                yield figures | dict(error=f"{type(error).__name__}: {error}"[:300])
            contender = None  # before the next one is made


def training_beside_peers(bench: Bench) -> Figures:
    """Time steps of a LoRA on query and value; tokens of padding do not count."""
    data = random_samples(bench, bench.config)

    def measure(step: Train) -> dict[str, float]:
        first_loss = step(0)
        for number in range(1, WARMUP_STEPS):
            step(number)
        numbers = range(WARMUP_STEPS, WARMUP_STEPS + bench.steps)
        seconds = [bench.seconds(partial(step, number)) for number in numbers]
        ids = [index for number in numbers for index in samples_of(bench, number)]
        tokens = sum(data.lengths[index] - 1 for index in ids)
        peak = peak_memory_bytes(bench.device) / 1e9
        return dict(tokens_per_s=tokens / sum(seconds), peak_gb=peak, first_loss=first_loss)

    yield from in_turn(bench, TRAINING, measure)


def decoding_beside_peers(bench: Bench, prompt_tokens: int = 100) -> Figures:
    """Time greedy decoding of one prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, bench.config.vocab_size, (1, prompt_tokens), generator=generator)
    new = 100 if bench.on_gpu else 8

    def measure(decode: Decode) -> dict[str, float]:
        decode(prompts, new)  # to warm up
        times = decode(prompts, new)
        rate = (len(times) - 1) / (times[-1] - times[0])
        return dict(tokens_per_s=rate, peak_gb=peak_memory_bytes(bench.device) / 1e9)

    yield from in_turn(bench, DECODING, measure)


# Name: the package that it needs, and a function that makes it.
TRAINING: dict[str, tuple[str, Callable[[Bench], Train]]] = {
    "lit-llama": ("lit_llama", partial(our_training, recompute="activations")),
    "lit-llama --train.recompute none": ("lit_llama", partial(our_training, recompute="none")),
    "peft": ("peft", peft_training),
    "litgpt": ("litgpt", litgpt_training),
}
DECODING: dict[str, tuple[str, Callable[[Bench], Decode]]] = {
    "lit-llama": ("lit_llama", our_decoding),
    "transformers": ("transformers", lambda bench: transformers_decode(hf_model(bench).eval())),
    "litgpt": ("litgpt", lambda bench: litgpt_decode(litgpt_model(bench).eval())),
}
PARTS: dict[str, tuple[int, Callable[[Bench], Figures]]] = {
    "train-beside-peers": (150, training_beside_peers),
    "decode-beside-peers": (90, decoding_beside_peers),
}
