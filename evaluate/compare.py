"""Put models side by side: loss, ROUGE-L, BLEU, speed, memory and answers. Guide: howto/evaluate.md

Each model is measured in a process of its own, so that the peak memory is its own.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader
from torchmetrics.functional.text import rouge_score, sacre_bleu_score
from tqdm import tqdm

from lit_llama import LLaMA, LLaMAConfig, Tokenizer, UserError
from lit_llama.cli import run
from lit_llama.data import open_prepared
from lit_llama.decoding import prepare
from lit_llama.distributed import inference_dtype, peak_memory_bytes
from lit_llama.files import replacing
from lit_llama.generation import Sampling, default_device, read_prompts, stream, until_end
from lit_llama.loading import load_finetuned, model_folder
from lit_llama.prompts import Messages, content, get_template, stop_ids
from lit_llama.records import Columns, encode_answers, read_conversations
from lit_llama.scoring import log_likelihoods

BATCH_TOKENS = 2048  # computed at a time for the loss


class Sample(NamedTuple):
    """A prompt and the answer wanted, "" where none is known: as text, and as token ids of both with the end token."""

    prompt: str
    reference: str
    ids: list[int]
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
    max_samples: int = 50,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 1234,
    batch_size: int = 8,
    precision: str = "bf16-true",
) -> None:
    """Put models side by side on the same records, validation samples or prompts. Guide: howto/evaluate.md

    Example:
        python evaluate/compare.py checkpoints/Llama-2-7b out/lora/alpaca out/adapter/alpaca --source held_out.json

    Args:
        models: folders of models, LoRAs and adapters.
        source: held-out records with the answers wanted: .json, .jsonl or .csv, as for scripts/prepare_json.py.
        data_dir: instead, a prepared set, whose validation samples are taken.
        prompt_file: instead, a text file with a prompt in each line: answers, speed and memory only.
        out_dir: where compare.html, compare.md and compare.json go; those that are there already are replaced.
        checkpoint_dir: the base of LoRAs and adapters; default: the one that each names.
        template: alpaca, chatml, llama3, chat (the model folder's own) or none, for all; default: each model's own.
        columns: what the columns of the source are called.
        max_samples: how many are taken, from the first on.
        max_new_tokens: longest answer in tokens.
        temperature: randomness of the answers; 0 takes the most likely token each time.
        seed: of the sampling.
        batch_size: how many prompts are answered at a time.
        precision: bf16-true or 32-true.
    """
    if not models or len(set(models)) < len(models):
        raise UserError(f"--models [{','.join(map(str, models))}]: should name at least one folder, and none twice")
    if [source, data_dir, prompt_file].count(None) != 2:
        raise UserError("--source, --data_dir, --prompt_file: give one of them")
    if data_dir is not None and template is not None:
        raise UserError("--template: the prompts of a prepared set have one already. Give records with --source")
    if min(max_samples, max_new_tokens, batch_size) < 1:
        raise UserError("--max_samples, --max_new_tokens, --batch_size: should be at least 1")
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir}: is a file")
    sampling, dtype = Sampling(max_new_tokens, temperature, seed=seed), inference_dtype(precision)
    for path in models:  # a mistake in the last should not wait until the others have been measured
        model_folder(path, checkpoint_dir)
    data: Path | dict[str, Messages]
    if source is not None:
        data = read_conversations(source, columns)
    elif prompt_file is not None:
        lines = enumerate(read_prompts(prompt_file), start=1)
        data = {
            f"{prompt_file}, prompt {number}": [turn("user", text), turn("assistant", "")] for number, text in lines
        }
    else:
        data = data_dir
    common = (checkpoint_dir, dtype, data, template, max_samples, sampling, batch_size)
    results = [in_own_process(path, *common) for path in models]
    drawn = f"temperature {temperature}, seed {seed}" if temperature else "greedy"
    device = torch.cuda.get_device_name() if default_device().type == "cuda" else "CPU"
    setting = (
        f"{len(results[0]['samples'])} samples of {source or data_dir or prompt_file}, {drawn}, at most "
        f"{max_new_tokens} new tokens, {batch_size} prompts at a time, {precision}, {device}"
    )
    write(out_dir, setting, results)
    print(aligned(table(results)))
    print(f"\n{out_dir}: compare.html, compare.md and compare.json have the answers too")


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def in_own_process(path: Path, *common: Any) -> dict[str, Any]:
    """`measure` in a fresh process. Raises UserError where that was killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, path, *common).result()
        except BrokenProcessPool:
            raise UserError(f"{path}: its process was killed, memory is probably used up. Lower --batch_size") from None


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
    """A model's figures and answers, `data` being a prepared set's folder, or conversations by where they come from.

    Returns:
        `name`, `template`, `samples` (of `prompt`, `reference`, `answer` each), `tokens_per_second`,
        `peak_memory_bytes` of loading and decoding; where there are references also `loss` and `perplexity` of their
        tokens, end tokens included, and what `score` returns.

    Raises:
        UserError: no model there, or the data do not fit it.
    """
    device = default_device()
    model, tokenizer, trained_with = load_finetuned(path, checkpoint_dir, device, dtype)
    if isinstance(data, Path):
        template, found = validation_samples(data, tokenizer, model.config)
    else:
        template = template or trained_with
        found = answered(data, template, tokenizer, model.config)
    samples = list(islice(found, max_samples))
    context, new = model.config.max_position_embeddings, sampling.max_new_tokens
    longest = max(max(len(sample.ids), sample.prompt_length + new) for sample in samples)
    if longest > context:
        hint = "Leave long ones out, or lower --max_new_tokens"
        raise UserError(f"{path}: a prompt with its answer has {longest} tokens, the context holds {context}. {hint}")
    prepare(model, device)
    ends = stop_ids(get_template(template, tokenizer), tokenizer, model.config.eos_token_id)
    answers, speed = answer(model, tokenizer, samples, ends, sampling, batch_size, f"{path}")
    result = dict(name=str(path), template=template, tokens_per_second=speed)
    result["peak_memory_bytes"] = peak_memory_bytes(device)  # before the loss, which nobody needs for an answer
    references = [sample.reference for sample in samples]
    if any(references):
        scored = [(sample.ids, sample.prompt_length) for sample in samples]
        nats = -sum(likelihood for likelihood, _ in log_likelihoods(model, scored, BATCH_TOKENS))
        loss = nats / sum(len(ids) - first for ids, first in scored)
        result |= dict(loss=loss, perplexity=math.exp(loss), **score(answers, references))
    texts = zip(samples, answers, strict=True)
    return result | {"samples": [dict(prompt=s.prompt, reference=s.reference, answer=text) for s, text in texts]}


def answered(
    conversations: dict[str, Messages], template: str, tokenizer: Tokenizer, config: LLaMAConfig
) -> Iterator[Sample]:
    """A sample for each answer of the conversations, as training has them."""
    how = get_template(template, tokenizer)
    end_id = stop_ids(how, tokenizer, config.eos_token_id)[0]
    for place, messages in conversations.items():
        turns = (number for number, message in enumerate(messages) if message["role"] == "assistant")
        encoded = encode_answers(messages, how, tokenizer, end_id, place)
        for number, (prompt, response) in zip(turns, encoded, strict=True):
            before = messages[:number]
            text = "\n\n".join(f"{message['role']}: {content(message)}" for message in before)
            text = content(before[0]) if len(before) == 1 else text
            yield Sample(text, messages[number]["content"], prompt + response, len(prompt))


def validation_samples(data_dir: Path, tokenizer: Tokenizer, config: LLaMAConfig) -> tuple[str, Iterator[Sample]]:
    """A prepared set's template and validation samples.

    Raises UserError as `open_prepared` does, and where there are none, or prompts are not told from responses.
    """
    _, val_set, meta = open_prepared(data_dir, tokenizer, config)
    if not len(val_set) or not meta["mask_prompt"]:
        lack = "has no validation samples" if meta["mask_prompt"] else "was prepared with --mask_prompt false"
        raise UserError(f"{data_dir}: {lack}. Give records with --source")

    def decoded() -> Iterator[Sample]:
        for index in range(len(val_set)):
            batch = val_set.micro_batch([index], torch.device("cpu"))
            response = batch["labels"].tolist()
            prompt = batch["input_ids"][: batch["positions"][0] + 1].tolist()
            yield Sample(tokenizer.decode(prompt), tokenizer.decode(response), prompt + response, len(prompt))

    return meta["template"], decoded()


def answer(
    model: LLaMA,
    tokenizer: Tokenizer,
    samples: list[Sample],
    ends: list[int],
    sampling: Sampling,
    batch_size: int,
    name: str,
) -> tuple[list[str], float | None]:
    """The answers, and the tokens a second of all rows of a batch after their first; None where none came after.

    A row that has ended counts until its batch has: the speed does not depend on how long the answers are.
    """
    answers, count, seconds = [], 0, 0.0
    for first in tqdm(range(0, len(samples), batch_size), name, unit="batches", delay=2, disable=None):
        prompts = [torch.tensor(sample.ids[: sample.prompt_length]) for sample in samples[first : first + batch_size]]
        tokens, times = [], []
        for token in stream(model, prompts, sampling, ends):
            tokens.append(token)
            times.append(time.perf_counter())
        count += len(prompts) * (len(times) - 1)
        seconds += times[-1] - times[0]
        for ids in torch.stack(tokens, dim=1).tolist():
            answers.append(tokenizer.decode(until_end(ids, ends)).strip())
    return answers, count / seconds if count else None


def score(answers: list[str], references: list[str]) -> dict[str, float]:
    """`rouge_l` and `bleu` of answers against references, from 0 to 100.

    ROUGE-L (Lin 2004): F-measure over words of a-z and 0-9, not stemmed, the mean over samples. BLEU (Papineni et al.
    2002): of all together, sacreBLEU's 13a tokens, not smoothed, so 0 where no four in a row are a reference's.
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
"""Key in a result: its heading, form and unit in a table."""


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """Headings, then a row for each model, with the figures that any of them has."""
    shown = {key: how for key, how in FIGURES.items() if any(result.get(key) is not None for result in results)}
    rows = [["model", "template", *(heading for heading, _, _ in shown.values())]]
    for result in results:
        figures = ((result[key], form, unit) for key, (_, form, unit) in shown.items())
        cells = ("" if value is None else form.format(value / unit) for value, form, unit in figures)
        rows.append([result["name"], result["template"], *cells])
    return rows


def aligned(rows: list[list[str]]) -> str:
    """A table for the terminal, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<" + ">" * (len(widths) - 2)
    padded = [[f"{x:{side}{width}}" for x, side, width in zip(row, sides, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def markdown(setting: str, rows: list[list[str]], samples: list[dict[str, Any]]) -> str:
    """The table, then prompts and answers as code blocks, in which no character means anything."""
    rule = ["---", "---", *["---:"] * (len(rows[0]) - 2)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], rule, *rows[1:])]
    lines = ["# Models side by side", "", f"{setting}.", "", *(f"| {' | '.join(row)} |" for row in cells)]
    for number, sample in enumerate(samples, start=1):
        lines += ["", f"## Sample {number}", "", fenced(sample["prompt"])]
        reference = {"reference": sample["reference"]} if sample["reference"] else {}
        for name, text in (reference | sample["answers"]).items():
            lines += ["", f"### {name}", "", fenced(text)]
    return "\n".join(lines) + "\n"


def fenced(text: str) -> str:
    """A Markdown code block with a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def write(out_dir: Path, setting: str, results: list[dict[str, Any]]) -> None:
    """compare.html, which loads nothing; compare.md; and compare.json: `setting`, `models`, `samples`."""
    models = [{key: value for key, value in result.items() if key != "samples"} for result in results]
    samples = []
    for texts in zip(*(result["samples"] for result in results), strict=True):
        answers = {result["name"]: text["answer"] for result, text in zip(results, texts, strict=True)}
        samples.append(dict(prompt=texts[0]["prompt"], reference=texts[0]["reference"], answers=answers))
    rows = table(results)
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("page.html")
    texts = {
        "html": page.render(setting=setting, rows=rows, samples=samples),
        "md": markdown(setting, rows, samples),
        "json": json.dumps(dict(setting=setting, models=models, samples=samples), indent=2, ensure_ascii=False),
    }
    with ExitStack() as files:  # all are written before the first gets its name
        for kind, text in texts.items():
            files.enter_context(replacing(out_dir / f"compare.{kind}")).write_text(text.rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    run(main, positional="models")
