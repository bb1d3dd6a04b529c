"""Compare models: loss, ROUGE-L, BLEU, speed, memory and answers. Guide: howto/evaluate.md

Each model is measured in a process of its own, so that the peak memory is its own.
"""

import json
import math
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice, takewhile
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from scoring import dataset_samples, log_likelihoods
from torchmetrics.functional.text import rouge_score, sacre_bleu_score
from tqdm import tqdm

from lit_llama import LLaMA, LLaMAConfig, Tokenizer, UserError
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.generation import Sampling, stream
from lit_llama.prompts import Messages, content, encode_prompt, get_template, stop_ids
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import (
    PRECISION_NAMES,
    default_device,
    inference_dtype,
    peak_memory_bytes,
)
from lit_llama.storage.datasets import load_dataset
from lit_llama.storage.files import atomic_write, read_prompts
from lit_llama.storage.methods import load_finetuned, resolve_model_dir, tokenizer_dir
from lit_llama.storage.records import Columns, read_conversations
from lit_llama.storage.samples import encode_answers, learned_turns

BATCH_TOKENS = 2048  # per batch, for the loss


class Sample(NamedTuple):
    """A prompt and its reference answer ("" if unknown): as text, and as one list of token ids."""

    prompt: str
    reference: str
    ids: list[int]  # end token included
    prompt_length: int  # of `ids`


def main(
    models: list[Path],
    source: Path | None = None,
    data_dir: Path | None = None,
    prompt_file: Path | None = None,
    out_dir: Path = Path("out/compare"),
    checkpoint_dir: Path | None = None,
    template: str | None = None,
    columns: Columns = Columns(),
    max_samples: PositiveInt = 50,
    max_new_tokens: PositiveInt = 200,
    temperature: NonNegativeFloat = 0.0,
    seed: int = 1234,
    batch_size: PositiveInt = 8,
    precision: Literal["auto", "bf16-true", "32-true"] = "auto",
) -> None:
    """Compare models on the same records, validation samples or prompts. Guide: howto/evaluate.md

    Example:
        python evaluate/compare.py checkpoints/Llama-2-7b out/lora/alpaca --source held_out.json

    Args:
        models: Folders of models, LoRAs and adapters.
        source: Held-out records with reference answers, as of scripts/prepare_json.py.
        data_dir: Tokenized dataset whose validation samples are used instead.
        prompt_file: Text file with one prompt per line instead: answers, speed and memory only.
        out_dir: Folder for compare.html, compare.md and compare.json; older ones are replaced.
        checkpoint_dir: Base model of LoRAs and adapters (default: the one that each names).
        template: Prompt template for all: alpaca, chatml, llama3, chat (the model folder's own) or
            none (default: each model's own).
        columns: Column names of the source.
        max_samples: Number of samples, counted from the first.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        seed: Sampling seed.
        batch_size: Number of prompts to answer at once.
        precision: Dtype of the models; auto: the faster one.
    """
    if not models or len(set(models)) < len(models):
        names = ",".join(map(str, models))
        raise UserError(f"--models [{names}]: should name at least one folder, and none twice")
    if [source, data_dir, prompt_file].count(None) != 2:
        raise UserError("--source, --data_dir, --prompt_file: give one of them")
    if data_dir is not None and template is not None:
        problem = "the prompts of a tokenized dataset have one already"
        raise UserError(f"--template: {problem}. Give records with --source")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir}: is a file")
    sampling = Sampling(max_new_tokens, temperature, seed=seed)
    # a mistake in the last one should not wait until the others are measured
    folders = [resolve_model_dir(path, checkpoint_dir) for path in models]
    dtype = inference_dtype(precision, folders[0])
    data: Path | dict[str, Messages]
    if source is not None:
        data = read_conversations(source, columns)
    elif prompt_file is not None:
        data = {  # conversations without an answer
            f"{prompt_file}, prompt {number}": [{"role": "user", "content": text}]
            for number, text in enumerate(read_prompts(prompt_file), start=1)
        }
    else:
        data = data_dir
    common = (checkpoint_dir, dtype, data, template, max_samples, sampling, batch_size)
    results = [in_own_process(path, *common) for path in models]
    sampled = f"temperature {temperature}, seed {seed}" if temperature else "greedy"
    device = torch.cuda.get_device_name() if default_device().type == "cuda" else "CPU"
    count = len(results[0]["samples"])
    name = PRECISION_NAMES[dtype]
    setting = (
        f"{count} samples of {source or data_dir or prompt_file}, {sampled}, at most "
        f"{max_new_tokens} new tokens, {batch_size} prompts at a time, {name}, {device}"
    )
    write(out_dir, setting, results)
    print(aligned(table(results)))
    print(f"\n{out_dir}: compare.html, compare.md and compare.json have the answers too")


def in_own_process(path: Path, *common: Any) -> dict[str, Any]:
    """Call `measure` in a new process. Raises UserError if that is killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, path, *common).result()
        except BrokenProcessPool:
            problem = "its process was killed, memory is probably used up"
            raise UserError(f"{path}: {problem}. Lower --batch_size") from None


def measure(
    path: Path,
    checkpoint_dir: Path | None,
    dtype: torch.dtype,
    data: Path | dict[str, Messages],
    template: str | None,
    max_samples: int,
    sampling: Sampling,
    batch_size: int,
) -> dict[str, Any]:
    """Measure a model on `data`: the folder of a dataset, or conversations by their origin.

    Returns:
        `name`, `template`, `samples` (`prompt`, `reference`, `answer`), `tokens_per_second`, and
        `peak_memory_bytes` of loading and decoding; with references also `loss` and `perplexity`
        of their tokens, end tokens included, and the result of `score`.
    """
    device = default_device()
    if isinstance(data, Path):
        template = "none"  # that of the dataset
    where = (path, checkpoint_dir, device, dtype)
    model, tokenizer, template = load_finetuned(*where, template)
    if isinstance(data, Path):
        model_dir = resolve_model_dir(path, checkpoint_dir)
        own = tokenizer_dir(path, model_dir)
        template, found = validation_samples(data, tokenizer, model_dir, own)
    else:
        found = samples_from_records(data, template, tokenizer, model.config)
    samples = list(islice(found, max_samples))
    context, new = model.config.max_position_embeddings, sampling.max_new_tokens
    longest = max(max(len(sample.ids), sample.prompt_length + new) for sample in samples)
    if longest > context:
        size = f"a prompt with its answer has {longest} tokens, the context holds {context}"
        raise UserError(f"{path}: {size}. Leave long ones out, or lower --max_new_tokens")
    optimize_for_inference(model, device)
    stops = stop_ids(get_template(template, tokenizer), tokenizer, model.config.eos_token_id)
    answers, speed = run_inference(
        model, tokenizer, samples, stops, sampling, batch_size, f"{path}"
    )
    result = dict(name=str(path), template=template, tokens_per_second=speed)
    # before the loss, which an answer does not need
    result["peak_memory_bytes"] = peak_memory_bytes(device)
    references = [sample.reference for sample in samples]
    if any(references):
        scored = [(sample.ids, sample.prompt_length) for sample in samples]
        likelihoods = log_likelihoods(model, scored, BATCH_TOKENS)
        nats = -sum(likelihood for likelihood, _ in likelihoods)
        loss = nats / sum(len(ids) - first for ids, first in scored)
        result |= dict(loss=loss, perplexity=math.exp(loss), **score(answers, references))
    result["samples"] = [
        dict(prompt=sample.prompt, reference=sample.reference, answer=text)
        for sample, text in zip(samples, answers, strict=True)
    ]
    return result


def samples_from_records(
    conversations: dict[str, Messages], template: str, tokenizer: Tokenizer, config: LLaMAConfig
) -> Iterator[Sample]:
    """Yield a sample for each answer of the conversations, as in training."""
    prompt_template = get_template(template, tokenizer)
    end_id = stop_ids(prompt_template, tokenizer, config.eos_token_id)[0]
    problems = []
    for origin, messages in conversations.items():
        if len(messages) == 1 and messages[0]["role"] == "user":  # without a reference
            ids = encode_prompt(prompt_template, tokenizer, messages)
            yield Sample(prompt_text(messages), "", ids, len(ids))
            continue
        try:
            turns = learned_turns(messages)  # a plain text has none
            encoded = encode_answers(messages, prompt_template, tokenizer, end_id, origin)
        except UserError as error:
            print(f"not compared: {error}", file=sys.stderr)
            problems.append(error)
            continue
        for turn, (ids, ((start, _),)) in zip(turns, encoded, strict=True):
            yield Sample(prompt_text(messages[:turn]), messages[turn]["content"], ids, start)
    if len(problems) == len(conversations):
        raise problems[0]


def prompt_text(messages: Messages) -> str:
    """Return the turns before an answer as a text to show."""
    if len(messages) == 1:
        return content(messages[0])
    return "\n\n".join(f"{turn['role']}: {content(turn)}" for turn in messages)


def validation_samples(
    data_dir: Path, tokenizer: Tokenizer, model_dir: Path, tokenizer_dir: Path
) -> tuple[str, Iterator[Sample]]:
    """Return the template and the validation samples of a tokenized dataset."""
    dataset = load_dataset(data_dir, model_dir, tokenizer_dir)
    problem = None
    if not len(dataset.val):
        problem = "has no validation samples"
    elif not dataset.meta["mask_prompt"]:
        problem = "was prepared with --mask_prompt false"
    if problem is not None:
        raise UserError(f"{data_dir}: {problem}. Give records with --source")

    def decoded() -> Iterator[Sample]:
        for ids, start in dataset_samples(dataset.val):
            texts = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
            yield Sample(*texts, ids, start)

    return dataset.template, decoded()


def run_inference(
    model: LLaMA,
    tokenizer: Tokenizer,
    samples: list[Sample],
    stops: list[int],
    sampling: Sampling,
    batch_size: int,
    name: str,
) -> tuple[list[str], float | None]:
    """Return the answers, and the tokens/s of all rows after their first token, None without any.

    Rows that have stopped count until their batch has: the speed does not depend on the answers'
    lengths.
    """
    answers, count, seconds = [], 0, 0.0
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, name, unit="batches", delay=2, disable=None):
        batch = samples[start : start + batch_size]
        prompts = [torch.tensor(sample.ids[: sample.prompt_length]) for sample in batch]
        tokens, times = [], []
        for token in stream(model, prompts, sampling, stops):
            tokens.append(token)
            times.append(time.perf_counter())
        count += len(prompts) * (len(times) - 1)
        seconds += times[-1] - times[0]
        for ids in torch.stack(tokens, dim=1).tolist():
            ids = list(takewhile(lambda token: token not in stops, ids))
            answers.append(tokenizer.decode(ids).strip())
    return answers, count / seconds if count else None


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """Compute `rouge_l` and `bleu` of answers against references, from 0 to 100.

    ROUGE-L (Lin 2004): F-measure over words of a-z and 0-9, not stemmed, the mean over samples.
    BLEU (Papineni et al. 2002): over the corpus, sacreBLEU's 13a tokens, not smoothed, so 0 if no
    four words in a row match.
    """
    rouge = rouge_score(answers, references, rouge_keys="rougeL")["rougeL_fmeasure"]
    bleu = sacre_bleu_score(answers, [[reference] for reference in references])
    return {"rouge_l": 100 * rouge.item(), "bleu": 100 * bleu.item()}


FIGURES = {
    "loss": ("loss", "{:.4f}", 1),
    "perplexity": ("perplexity", "{:.2f}", 1),
    "rouge_l": ("ROUGE-L", "{:.1f}", 1),
    "bleu": ("BLEU", "{:.1f}", 1),
    "tokens_per_second": ("tokens/s", "{:.1f}", 1),
    "peak_memory_bytes": ("memory", "{:.2f} GB", 1e9),
}
"""Key in a result: its heading, format and unit in a table."""


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Return a row of headings, then one per model, with the figures that any of them has."""
    keys = [key for key in FIGURES if any(result.get(key) is not None for result in results)]
    rows = [["model", "template", *(FIGURES[key][0] for key in keys)]]
    for result in results:
        row = [result["name"], result["template"]]
        for key in keys:
            _, number_format, unit = FIGURES[key]
            value = result[key]
            row.append("" if value is None else number_format.format(value / unit))
        rows.append(row)
    return rows


def aligned(rows: list[list[str]]) -> str:
    """Format a table for the terminal, figures right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(setting: str, rows: list[list[str]], samples: list[dict[str, Any]]) -> str:
    """Format the table, and prompts and answers as code blocks, which need no escaping."""
    rule = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], rule, *rows[1:])]
    lines = ["# Models side by side", "", f"{setting}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    for number, sample in enumerate(samples, start=1):
        lines += ["", f"## Sample {number}", "", fenced(sample["prompt"])]
        reference = {"reference": sample["reference"]} if sample["reference"] else {}
        for name, text in (reference | sample["answers"]).items():
            lines += ["", f"### {name}", "", fenced(text)]
    return "\n".join(lines) + "\n"


def fenced(text: str) -> str:
    """Return a Markdown code block with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def write(out_dir: Path, setting: str, results: list[dict[str, Any]]) -> None:
    """Write compare.html, compare.md and compare.json: `setting`, `models`, `samples`."""
    models = [{key: result[key] for key in result if key != "samples"} for result in results]
    samples = []
    for texts in zip(*(result["samples"] for result in results), strict=True):
        answers = {r["name"]: text["answer"] for r, text in zip(results, texts, strict=True)}
        prompt, reference = texts[0]["prompt"], texts[0]["reference"]
        samples.append(dict(prompt=prompt, reference=reference, answers=answers))
    rows = table(results)
    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True).get_template("page.html")
    figures = dict(setting=setting, models=models, samples=samples)
    texts = {
        "html": page.render(setting=setting, rows=rows, samples=samples),
        "md": markdown(setting, rows, samples),
        "json": json.dumps(figures, indent=2, ensure_ascii=False),
    }
    with ExitStack() as files:  # all are written before the first one is renamed
        for suffix, text in texts.items():
            file = files.enter_context(atomic_write(out_dir / f"compare.{suffix}"))
            file.write_text(text.rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    run(main, positional="models")
