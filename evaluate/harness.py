"""Run tasks of EleutherAI's lm-evaluation-harness, or your own ones, on a model. Guide: howto/evaluate.md"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from lit_llama import LLaMA, Tokenizer, UserError
from lit_llama.cli import run
from lit_llama.data import pack
from lit_llama.decoding import prepare
from lit_llama.distributed import inference_dtype
from lit_llama.files import replacing
from lit_llama.generation import Sampling, default_device, stream
from lit_llama.loading import chosen_folder, load_finetuned, model_folder
from lit_llama.prompts import get_template
from lit_llama.scoring import log_likelihoods

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # `main` says so; --help works without
    TemplateLM = object

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager


def main(
    tasks: list[str],
    checkpoint_dir: Path | None = None,
    lora_path: Path | None = None,
    adapter_path: Path | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    template: str | None = None,
    batch_tokens: int = 4096,
    precision: str = "bf16-true",
    out_file: Path | None = None,
) -> None:
    """Print lm-eval's table of a model's results on tasks. Guide: howto/evaluate.md

    Example:
        python evaluate/harness.py --lora_path out/lora/alpaca --tasks arc_easy --tasks hellaswag

    Args:
        tasks: names of lm-eval's tasks, groups or tags, or patterns of them, as a list: [arc_easy,hellaswag].
        checkpoint_dir: the model folder, finetuned or not; beside a LoRA or adapter: its base, if not the one it names.
        lora_path: the LoRA's folder, ours or PEFT's; an adapter that was trained with it is used too.
        adapter_path: the adapter's folder.
        include_path: a folder with your own tasks' YAML files.
        num_fewshot: solved examples in front of each question; default: the task's.
        limit: only the first so many questions of each task, or below 1 that share of them: for trying out.
        apply_chat_template: put each question into the prompt template that the model was trained with.
        template: that template, if another: alpaca, chatml, llama3, chat (the model folder's own) or none.
        batch_tokens: tokens computed at a time, of answers being generated too; a memory knob.
        precision: bf16-true or 32-true.
        out_file: a new JSON file for all figures, versions and settings.
    """
    if TemplateLM is object:
        raise UserError("lm-eval is not installed: pip install -c constraints.txt -e '.[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    if not tasks or batch_tokens < 1 or (limit is not None and not 0 < limit < math.inf) or (num_fewshot or 0) < 0:
        raise UserError("--tasks: name at least one; --batch_tokens, --limit: more than 0; --num_fewshot: from 0 on")
    if template is not None and not apply_chat_template:
        raise UserError(f"--template {template}: questions go into a template with --apply_chat_template only")
    if out_file is not None and out_file.exists():
        raise UserError(f"--out_file {out_file}: exists already. Give another name, or move that one away")
    folder, dtype = chosen_folder(checkpoint_dir, lora_path, adapter_path), inference_dtype(precision)
    model_folder(folder, checkpoint_dir)
    names, manager = find_tasks(tasks, include_path)
    model, tokenizer, trained_with = load_finetuned(folder, checkpoint_dir, default_device(), dtype)
    prepare(model, default_device())
    adaptor = LitLLaMA(model, tokenizer, template or trained_with, batch_tokens)
    try:
        results = simple_evaluate(
            adaptor,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
            log_samples=False,
        )
    except (OSError, ImportError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tasks: what a task needs is not here and cannot be fetched ({reason})") from None
    results["config"] |= {"model": str(folder), "precision": precision}
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if out_file is not None:
        with replacing(out_file) as file:
            file.write_text(json.dumps(results, indent=2, default=handle_non_serializable) + "\n", "utf-8")


def find_tasks(names: list[str], include_path: Path | None) -> "tuple[list[str], TaskManager]":
    """The tasks that these names and patterns mean, and what loads them: of `include_path`, else lm-eval's own ones.

    Raises UserError for a name that means none.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: is no folder")
    for own_only in (True, False):  # lm-eval's own ones are thousands of files to read
        manager = TaskManager(include_path=include_path and str(include_path), include_defaults=not own_only)
        found = {name: manager.match_tasks([name]) for name in names}
        if all(found.values()):
            return list(dict.fromkeys(task for tasks in found.values() for task in tasks)), manager
    unknown = next(name for name in names if not found[name])
    hint = "`lm-eval ls tasks` lists them; for your own ones give their folder with --include_path"
    raise UserError(f"--tasks {unknown}: no task is called that. {hint}")


class LitLLaMA(TemplateLM):
    """A model for lm-eval, which tokenizes and truncates as lm-eval's own `hf` model does."""

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, template: str, batch_tokens: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.template, self.batch_tokens = model, tokenizer, template, batch_tokens
        self.max_length, self.max_gen_toks = model.config.max_position_embeddings, 256
        of_model = model.config.eos_token_id
        self.ends = {tokenizer.eos_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without a context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens that are spelled out are meant, as a chat template's are."""
        bos = self.tokenizer.adds_bos and add_special_tokens is not False
        return self.tokenizer.encode(string, bos=bos, special=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for an answer; without `add_generation_prompt` the last turn is how that answer begins."""
        render = get_template(self.template, self.tokenizer).render
        if add_generation_prompt:
            return render(chat_history)
        return render(chat_history[:-1]) + chat_history[-1]["content"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        samples = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task has an answer of {len(continuation)} tokens, the model's context holds {self.max_length}"
                )
            ids = (context + continuation)[-self.max_length - 1 :]  # the last one is predicted only
            samples.append((ids, len(ids) - len(continuation)))
        return log_likelihoods(self.model, samples, self.batch_tokens)

    def loglikelihood_rolling(self, requests: "list[Instance]", **kwargs: Any) -> list[float]:
        """The log-likelihood of each whole text, cut into windows where it exceeds the context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += likelihood
        return totals

    def generate_until(self, requests: "list[Instance]", **kwargs: Any) -> list[str]:
        """An answer to each context, up to the first of its stop strings, an end token or `max_gen_toks`."""
        from lm_eval.models.utils import normalize_gen_kwargs

        alike: dict[str, list[int]] = {}  # those with the same settings are decoded together
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", unit="answers", disable=None) as bar:
            for settings, numbers in alike.items():
                settings = normalize_gen_kwargs(json.loads(settings), self.max_gen_toks)
                known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
                if unknown := settings.keys() - known:
                    raise UserError(f"a task's generation_kwargs ask for {sorted(unknown)}, which is not supported")
                new = settings["max_gen_toks"]
                if new >= self.max_length:
                    raise UserError(f"a task asks for {new} new tokens, the model's context holds {self.max_length}")
                temperature = float(settings.get("temperature", 0.0)) if settings["do_sample"] else 0.0
                sampling = Sampling(new, temperature, settings.get("top_k"), settings.get("top_p", 1.0))
                contexts = (self.tok_encode(requests[number].args[0]) for number in numbers)
                prompts = [torch.tensor(ids[new - self.max_length :]) for ids in contexts]
                lengths = [len(prompt) + new for prompt in prompts]
                for batch in pack(range(len(prompts)), lengths, self.batch_tokens):
                    texts = self.answer([prompts[index] for index in batch], sampling, settings["until"])
                    for index, text in zip(batch, texts, strict=True):
                        answers[numbers[index]] = text
                    bar.update(len(batch))
        return answers

    def answer(self, prompts: list[torch.Tensor], sampling: Sampling, until: Iterable[str]) -> list[str]:
        """Answers to prompts, each (seq,), up to the first of the strings `until` in each."""
        stops = [stop for stop in until if stop]
        reach = 4 + max((len(stop.encode("utf-8")) for stop in stops), default=0)  # tokens that may make up one
        rows: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for tokens in stream(self.model, prompts, sampling, self.ends):
            for row in sorted(going):
                rows[row].append(int(tokens[row]))
                tail = self.tokenizer.decode(rows[row][-reach:])
                if rows[row][-1] in self.ends or any(stop in tail for stop in stops):
                    going.remove(row)
            if not going:
                break
        texts = [self.tokenizer.decode([index for index in row if index not in self.ends]) for row in rows]
        return [text[: min(place for place in (*map(text.find, stops), len(text)) if place >= 0)] for text in texts]


if __name__ == "__main__":
    run(main)
