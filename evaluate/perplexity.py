"""How well a model predicts a text, records or a validation set. Guide: howto/evaluate.md"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt
from scoring import Sample, choose_folder, dataset_samples, log_likelihoods

from lit_llama import LLaMAConfig, Tokenizer, UserError
from lit_llama.prompts import Messages, get_template, stop_ids
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import default_device, inference_dtype
from lit_llama.storage.datasets import load_dataset
from lit_llama.storage.files import read_text
from lit_llama.storage.methods import load_finetuned, resolve_model_dir, tokenizer_dir
from lit_llama.storage.records import Columns, is_records_file, read_conversations
from lit_llama.storage.samples import encode_answers


def main(
    checkpoint_dir: Path | None = None,
    lora_path: Path | None = None,
    adapter_path: Path | None = None,
    source: Path | None = None,
    data_dir: Path | None = None,
    window: PositiveInt | None = None,
    stride: PositiveInt | None = None,
    template: str | None = None,
    columns: Columns = Columns(),
    batch_tokens: PositiveInt = 4096,
    precision: Literal["auto", "bf16-true", "32-true"] = "auto",
) -> None:
    """Print a model's loss, perplexity and bits per byte. Guide: howto/evaluate.md

    Example:
        python evaluate/perplexity.py --lora_path out/lora/alpaca --source book.txt
        python evaluate/perplexity.py --lora_path out/lora/alpaca --data_dir data/alpaca

    Args:
        checkpoint_dir: Model folder, finetuned or not; with a LoRA or adapter, the base model
            (default: the one that it names).
        lora_path: Folder of the LoRA, ours or PEFT's; an adapter trained with it is used too.
        adapter_path: Folder of the adapter.
        source: Text file, or records (JSON, JSONL, CSV, Parquet) whose answers are predicted.
        data_dir: Tokenized dataset whose validation samples are predicted.
        window: Tokens per forward pass of a text; records are truncated to it (default: the
            context, at most 2048).
        stride: Tokens from one window of a text to the next (default: half the window).
        template: Prompt template of records: alpaca, chatml, llama3, chat or none (default: that
            of the training, else chat if there is one, else alpaca, and none for a model).
        columns: Column names of the records.
        batch_tokens: Tokens per batch. Changes memory, not results.
        precision: Dtype of the model; auto: the faster one.
    """
    if (source is None) == (data_dir is None):
        raise UserError("--source, --data_dir: give one of them")
    folder = choose_folder(checkpoint_dir, lora_path, adapter_path)
    model_dir = resolve_model_dir(folder, checkpoint_dir)
    dtype = inference_dtype(precision, model_dir, tokens=256)
    context = LLaMAConfig.from_checkpoint(model_dir).max_position_embeddings
    window = min(context, 2048) if window is None else window
    stride = window // 2 if stride is None else stride
    if not 0 < stride < window <= context:
        flags = f"--window {window}, --stride {stride}"
        rule = f"--stride below --window, that up to the context of {context}"
        raise UserError(f"{flags}: should be from 1 on, {rule}")
    content = None if source is None else read_source(source, columns)
    if not isinstance(content, dict):
        template = "none"  # not used
    where = (folder, checkpoint_dir, default_device(), dtype)
    model, tokenizer, template = load_finetuned(*where, template)
    if content is None:
        own = tokenizer_dir(folder, model_dir)
        samples = dataset_samples(load_dataset(data_dir, model_dir, own).val)
    elif isinstance(content, str):
        samples = windows(tokenizer.encode(content), window, stride)
    else:
        samples = answers(content, template, tokenizer, model.config, window)
    samples = list(samples)
    tokens = sum(len(ids) - first for ids, first in samples)
    if isinstance(content, str):
        texts = [content]
    else:
        texts = [tokenizer.decode(ids[first:]) for ids, first in samples]
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
    """Read a text, or records as conversations by their position in the file."""
    if source.is_dir() or is_records_file(source.name):
        return read_conversations(source, columns)
    return read_text(source, hint=". Pass a file to --source")


def windows(ids: list[int], window: int, stride: int) -> Iterator[Sample]:
    """Split a text into overlapping windows that together score each token but the first once.

    As in the guide of `transformers` to the perplexity of fixed-length models: each window starts
    `stride` tokens after the previous one, and tokens scored there are context.
    """
    scored = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        yield ids[begin:end], scored - begin
        if end == len(ids):
            return
        scored = end


def answers(
    conversations: dict[str, Messages],
    template: str,
    tokenizer: Tokenizer,
    config: LLaMAConfig,
    max_length: int,
) -> Iterator[Sample]:
    """Yield a sample for each answer, as scripts/prepare_json.py makes them."""
    prompt_template = get_template(template, tokenizer)
    end_id = stop_ids(prompt_template, tokenizer, config.eos_token_id)[0]
    truncated, skipped = 0, []
    for position, messages in conversations.items():
        try:
            samples = encode_answers(messages, prompt_template, tokenizer, end_id, position)
        except UserError as error:
            skipped.append(error)
            continue
        for ids, ((start, _),) in samples:
            truncated += len(ids) > max_length
            yield ids[:max_length], min(max(start, 1), max_length)
    if truncated:
        print(f"{truncated} answers cut where they exceed --window {max_length}")
    if skipped:
        print(f"{len(skipped)} records not scored, the first: {skipped[0]}")


if __name__ == "__main__":
    run(main)
