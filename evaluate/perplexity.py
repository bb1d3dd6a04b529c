"""How well a model predicts a text, records or a prepared set's validation samples. Guide: howto/evaluate.md"""

import math
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from lit_llama import LLaMAConfig, Tokenizer, UserError
from lit_llama.cli import run
from lit_llama.data import open_prepared
from lit_llama.distributed import inference_dtype
from lit_llama.files import read_text
from lit_llama.generation import default_device
from lit_llama.loading import chosen_folder, load_finetuned, model_folder
from lit_llama.prompts import Messages, get_template, stop_ids
from lit_llama.records import Columns, encode_answers, read_conversations
from lit_llama.scoring import Sample, log_likelihoods


def main(
    checkpoint_dir: Path | None = None,
    lora_path: Path | None = None,
    adapter_path: Path | None = None,
    source: Path | None = None,
    data_dir: Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    template: str | None = None,
    columns: Columns = Columns(),
    batch_tokens: int = 4096,
    precision: str = "bf16-true",
) -> None:
    """Print a model's loss, perplexity and bits per byte. Guide: howto/evaluate.md

    Example:
        python evaluate/perplexity.py --lora_path out/lora/alpaca --source book.txt
        python evaluate/perplexity.py --lora_path out/lora/alpaca --data_dir data/alpaca

    Args:
        checkpoint_dir: the model folder, finetuned or not; beside a LoRA or adapter: its base, if not the one it names.
        lora_path: the LoRA's folder, ours or PEFT's; an adapter that was trained with it is used too.
        adapter_path: the adapter's folder.
        source: a text file, or records as .json, .jsonl or .csv, whose answers are predicted.
        data_dir: a prepared set, whose validation samples are predicted.
        window: tokens of a text that are seen at a time; records are cut there; default: the context, at most 2048.
        stride: tokens by which the window moves over a text; default: half the window.
        template: of records' prompts: alpaca, chatml, llama3, chat or none; default: the training's, else alpaca for a
            LoRA or adapter and the model folder's own for a model.
        columns: what the records' columns are called.
        batch_tokens: tokens computed at a time; a memory knob.
        precision: bf16-true or 32-true.
    """
    if (source is None) == (data_dir is None):
        raise UserError("--source, --data_dir: give one of them")
    folder, dtype = chosen_folder(checkpoint_dir, lora_path, adapter_path), inference_dtype(precision)
    context = LLaMAConfig.from_checkpoint(model_folder(folder, checkpoint_dir)).max_position_embeddings
    window = min(context, 2048) if window is None else window
    stride = window // 2 if stride is None else stride
    if not 0 < stride < window <= context or batch_tokens < 1:
        wrong = f"--window {window}, --stride {stride}, --batch_tokens {batch_tokens}"
        raise UserError(f"{wrong}: should be from 1 on, --stride below --window, that up to the context of {context}")
    content = None if source is None else read_source(source, columns)
    model, tokenizer, trained_with = load_finetuned(folder, checkpoint_dir, default_device(), dtype)
    if content is None:
        samples = validation_samples(data_dir, tokenizer, model.config)
    elif isinstance(content, str):
        samples = windows(tokenizer.encode(content), window, stride)
    else:
        samples = answers(content, template or trained_with, tokenizer, model.config, window)
    samples = list(samples)
    tokens = sum(len(ids) - first for ids, first in samples)
    texts = [content] if isinstance(content, str) else [tokenizer.decode(ids[first:]) for ids, first in samples]
    size = sum(len(text.encode("utf-8")) for text in texts)
    if not tokens or not size:
        raise UserError(f"{source or data_dir}: nothing to predict there")
    nats = -sum(likelihood for likelihood, _ in log_likelihoods(model, samples, batch_tokens))
    print(f"{folder} on {source or data_dir}")
    print(f"tokens         {tokens:>12,}")
    print(f"loss           {nats / tokens:>12.4f} nats per token")
    print(f"perplexity     {math.exp(nats / tokens):>12.4f}")
    print(f"bits per byte  {nats / math.log(2) / size:>12.4f}")


def read_source(source: Path, columns: Columns) -> str | dict[str, Messages]:
    """A text, or the conversations of records, by their place in the file. Raises UserError for what is neither."""
    if source.suffix in (".json", ".jsonl", ".csv"):
        return read_conversations(source, columns)
    return read_text(source, hint=". Give a file with --source")


def windows(ids: list[int], window: int, stride: int) -> Iterator[Sample]:
    """A text's tokens in overlapping windows that together score each token once, except the first.

    As in the guide of `transformers` to models with a fixed context: a window starts `stride` tokens after the one
    before it, and what that one has scored is context.
    """
    scored = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        yield ids[begin:end], scored - begin
        if end == len(ids):
            return
        scored = end


def answers(
    conversations: dict[str, Messages], template: str, tokenizer: Tokenizer, config: LLaMAConfig, longest: int
) -> Iterator[Sample]:
    """A sample for each answer, as scripts/prepare_json.py makes them. Raises UserError as `encode_answers` does."""
    how = get_template(template, tokenizer)
    end_id = stop_ids(how, tokenizer, config.eos_token_id)[0]
    cut = 0
    for place, messages in conversations.items():
        for prompt, response in encode_answers(messages, how, tokenizer, end_id, place):
            cut += len(prompt) + len(response) > longest
            yield (prompt + response)[:longest], min(max(len(prompt), 1), longest)
    if cut:
        print(f"{cut} answers cut where they exceed --window {longest}")


def validation_samples(data_dir: Path, tokenizer: Tokenizer, config: LLaMAConfig) -> Iterator[Sample]:
    """A prepared set's validation samples; scored is what training learns. Raises UserError as `open_prepared` does."""
    _, samples, _ = open_prepared(data_dir, tokenizer, config)
    for end, length, count in zip(accumulate(samples.lengths), samples.lengths, samples.label_counts, strict=True):
        yield samples.tokens[end - length : end].tolist(), length - count


if __name__ == "__main__":
    run(main)
