"""Shared by the scripts in this folder: flags, prompts in, answers out."""

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    restricted_number_type,
)

from lit_llama.errors import UserError

if TYPE_CHECKING:
    import torch

    from lit_llama.generation import Decoder, Sampling
    from lit_llama.model import LLaMA
    from lit_llama.storage.methods import PromptFormat
    from lit_llama.tokenizer import Tokenizer

Precision = Literal["auto", "bf16-true", "32-true"]
TopP = restricted_number_type("TopP", float, [(">", 0), ("<=", 1)])


@dataclass
class AnswerArgs:
    """Prompts, sampling and model settings of an answer.

    Args:
        prompt: Instruction, or with --template none the text to continue.
        input: Context for the instruction.
        prompt_file: Text file with one prompt per line; prints a JSON line for each.
        batch_size: Number of prompts of the file to decode at once.
        num_samples: Number of answers, each with the next seed.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_k: Sample from the k most likely tokens only.
        top_p: Sample from the most likely tokens that make up this probability.
        seed: Sampling seed.
        quantize: Quantize the weights: faster, and a half or a quarter of the memory.
        draft_checkpoint_dir: Small model of the same family, for speculative decoding of --prompt.
        compile: Compile each decoding step with torch.compile; takes up to a minute first.
        fast_paths: Use the optimized modules of lit_llama/fast.
    """

    prompt: str | None = None
    input: str = ""
    prompt_file: Path | None = None
    batch_size: PositiveInt = 8
    num_samples: PositiveInt = 1
    max_new_tokens: NonNegativeInt = 200
    temperature: NonNegativeFloat = 0.8
    top_k: PositiveInt | None = 200
    top_p: TopP = 1.0
    seed: int = 1234
    quantize: Literal["int8", "int4"] | None = None
    draft_checkpoint_dir: Path | None = None
    compile: bool = False
    fast_paths: bool = True

    def sampling(self, number: int = 0) -> "Sampling":
        """Return the settings of the answer `number`, counted from 0."""
        from lit_llama.generation import Sampling

        seed = self.seed + number
        return Sampling(self.max_new_tokens, self.temperature, self.top_k, self.top_p, seed)


def read_prompts(args: AnswerArgs) -> list[str]:
    """Return --prompt, or the lines of --prompt_file that are not empty."""
    if (args.prompt is None) == (args.prompt_file is None):
        raise UserError("--prompt, --prompt_file: give one of them")
    if args.prompt_file is None:
        return [args.prompt]
    from lit_llama.storage import files

    return files.read_prompts(args.prompt_file)


def load_device(args: AnswerArgs) -> "torch.device":
    """Return where to load the weights: weights to be quantized go to the GPU only afterwards."""
    import torch

    from lit_llama.fast import kernels
    from lit_llama.runtime.hardware import default_device

    device = default_device()
    if args.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile: needs a C++ compiler on the CPU, and g++ is not installed")
    if args.compile and device.type == "cuda" and kernels.c_compiler() is None:
        raise UserError("--compile: needs a C compiler on a GPU, and gcc is not installed")
    return torch.device("cpu") if args.quantize else device


def load_decoder(model: "LLaMA", args: AnswerArgs) -> "Decoder":
    """Return the decoding function: speculative decoding if --draft_checkpoint_dir is passed."""
    from lit_llama.generation import decode

    if args.draft_checkpoint_dir is None:
        return decode
    from lit_llama.fast.decoding import optimize_for_inference
    from lit_llama.fast.speculation import speculate
    from lit_llama.storage.model_folder import load_model

    weight = model.embed_tokens.weight
    draft = load_model(args.draft_checkpoint_dir, load_device(args), weight.dtype)
    optimize_for_inference(draft, weight.device, args.quantize, args.fast_paths)
    return partial(speculate, draft=draft)


def answer(
    model: "LLaMA",
    tokenizer: "Tokenizer",
    template: "str | Mapping[str, PromptFormat]",
    prompts: list[str],
    args: AnswerArgs,
) -> None:
    """Print the answers on stdout, and time, tokens/s and memory on stderr.

    A single prompt's answer is printed as it is decoded. `template` is a prompt template's name, or
    for a model that holds several LoRAs, which all answer, the format of each by its name.
    """
    import torch

    from lit_llama.generation import stream
    from lit_llama.multi_lora import set_adapters
    from lit_llama.prompts import encode_prompt, get_template, stop_ids
    from lit_llama.runtime.hardware import peak_memory_bytes
    from lit_llama.storage.methods import PromptFormat

    # the LoRAs that answer, or None alone: the model as it is
    formats = {None: PromptFormat(tokenizer, template, model.config.eos_token_id)}
    formats = template if isinstance(template, Mapping) else formats
    names = list(formats)
    tokenizers, templates, ends = [form.tokenizer for form in formats.values()], [], []
    for form in formats.values():
        templates.append((get_template(form.template, form.tokenizer), form.tokenizer))
        ends.append(stop_ids(*templates[-1], form.eos_ids))
    # one row of the batch for each prompt and LoRA
    encoded = []
    for text in prompts:
        message = {"role": "user", "content": text, "input": args.input}
        ids = [encode_prompt(*pair, [message]) for pair in templates]
        encoded.append([torch.tensor(row, dtype=torch.long) for row in ids])
    decoder = load_decoder(model, args)

    for number in range(args.num_samples):
        started, count = time.perf_counter(), 0
        for start in range(0, len(prompts), args.batch_size):
            batch = prompts[start : start + args.batch_size]
            rows = list(chain(*encoded[start : start + args.batch_size]))
            if names != [None]:
                set_adapters(model, names * len(batch))
            if args.prompt is not None and names == [None]:
                tokens = stream(model, rows, args.sampling(number), ends[0], decoder)
                count += _print_stream(tokenizer, tokens, ends[0])
                continue
            tokens = stream(model, rows, args.sampling(number), None, decoder)
            answers = until_stops(tokens, ends * len(batch))
            count += sum(map(len, answers))
            pairs = zip(tokenizers * len(batch), answers, strict=True)
            texts = [each.decode(ids) for each, ids in pairs]
            for prompt in batch:
                answers = {name: texts.pop(0) for name in names}
                _print_answers(prompt, answers, as_json=args.prompt is None)
        seconds = time.perf_counter() - started
        speed = f"{seconds:.2f} seconds total, {count / seconds:.2f} tokens/sec"
        print(f"Time for inference {number + 1}: {speed}", file=sys.stderr)
    memory = peak_memory_bytes(model.embed_tokens.weight.device) / 1e9
    print(f"Memory used: {memory:.2f} GB", file=sys.stderr)


def until_stops(
    tokens: "Iterator[torch.Tensor]", ends: Sequence[Collection[int]]
) -> list[list[int]]:
    """Return the tokens of each row before its own end token; decode until all have ended."""
    answers: list[list[int]] = [[] for _ in ends]
    running = set(range(len(ends)))
    for step in tokens:
        for row, token in enumerate(step.tolist()):
            if row in running and token in ends[row]:
                running.remove(row)
            elif row in running:
                answers[row].append(token)
        if not running:
            break
    return answers


def _print_stream(
    tokenizer: "Tokenizer", tokens: "Iterator[torch.Tensor]", ends: Collection[int]
) -> int:
    """Print one answer as it is decoded. Returns its number of tokens."""
    count = -1  # the last piece belongs to no token
    for piece in stream_text(tokenizer, map(int, tokens), ends):
        print(piece, end="", flush=True)
        count += 1
    print(flush=True)
    return count


def stream_text(
    tokenizer: "Tokenizer", tokens: Iterable[int], ends: Collection[int] = ()
) -> Iterator[str]:
    """Yield the text that each token adds, and in the end what an incomplete character left.

    An end token, special or not, is not part of the text.
    """
    ids: list[int] = []
    printed = text = ""
    for token in takewhile(lambda token: token not in ends, tokens):
        ids.append(token)
        text = tokenizer.decode(ids)
        # a character of several tokens decodes to U+FFFD until the last of them is there
        complete = printed if text.endswith("\ufffd") else text
        yield complete[len(printed) :]
        printed = complete
    yield text[len(printed) :]


def _print_answers(prompt: str, answers: dict[str | None, str], as_json: bool) -> None:
    """Print the answers of all LoRAs to a prompt, as a JSON line or as columns."""
    if as_json:
        result = {"answer": answers[None]} if None in answers else {"answers": answers}
        print(json.dumps({"prompt": prompt} | result, ensure_ascii=False), flush=True)
    else:
        print("\n".join(side_by_side(answers)), flush=True)


def side_by_side(texts: Mapping[str, str], width: int | None = None) -> list[str]:
    """Return lines with one column per text under its title, or blocks if the columns are narrow.

    `width` is the number of characters per line; default: the terminal's.
    """
    width = shutil.get_terminal_size((120, 24)).columns if width is None else width
    column = (width + 2) // len(texts) - 2
    if column < 36:
        blocks = [f"{title}\n{'-' * len(title)}\n{text}" for title, text in texts.items()]
        return "\n\n".join(blocks).splitlines()
    columns = []
    for title, text in texts.items():
        title = title if len(title) <= column else f"...{title[3 - column :]}"
        lines = [title, "-" * column]
        for line in text.strip().splitlines():
            lines += textwrap.wrap(line, column) or [""]
        columns.append(lines)
    rows = zip_longest(*columns, fillvalue="")
    return ["  ".join(f"{cell:{column}}" for cell in row).rstrip() for row in rows]
