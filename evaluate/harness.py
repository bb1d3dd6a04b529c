"""Run tasks of EleutherAI's lm-evaluation-harness on a model. Guide: howto/evaluate.md"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from scoring import choose_folder, log_likelihoods
from tqdm import tqdm

from lit_llama import LLaMA, Tokenizer, UserError
from lit_llama.data import pack_micro_batches
from lit_llama.fast.decoding import optimize_for_inference
from lit_llama.generation import Sampling, stream
from lit_llama.prompts import get_template
from lit_llama.runtime.cli import run
from lit_llama.runtime.hardware import PRECISION_NAMES, default_device, inference_dtype
from lit_llama.storage.files import atomic_write
from lit_llama.storage.methods import load_finetuned, resolve_model_dir

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
    num_fewshot: NonNegativeInt | None = None,
    limit: PositiveFloat | None = None,
    apply_chat_template: bool = False,
    template: str | None = None,
    batch_tokens: PositiveInt = 4096,
    precision: Literal["auto", "bf16-true", "32-true"] = "auto",
    out_file: Path | None = None,
) -> None:
    """Print lm-eval's table of a model's results on tasks. Guide: howto/evaluate.md

    Example:
        python evaluate/harness.py --lora_path out/lora/alpaca --tasks arc_easy --tasks hellaswag

    Args:
        tasks: Names of lm-eval's tasks, groups or tags, or patterns, as a list: [arc_easy,arc_*].
        checkpoint_dir: Model folder, finetuned or not; with a LoRA or adapter, the base model
            (default: the one that it names).
        lora_path: Folder of the LoRA, ours or PEFT's; an adapter trained with it is used too.
        adapter_path: Folder of the adapter.
        include_path: Folder with YAML files of your own tasks.
        num_fewshot: Number of solved examples in front of each question (default: the task's).
        limit: Number of questions per task, or below 1 a share of them, to try things out.
        apply_chat_template: Put each question into the prompt template of the training.
        template: Another prompt template: alpaca, chatml, llama3, chat or none.
        batch_tokens: Tokens per batch, generated ones included. Changes memory, not results.
        precision: Dtype of the model; auto: the faster one.
        out_file: New JSON file for all figures, versions and settings.
    """
    if TemplateLM is object:
        raise UserError("lm-eval is not installed: pip install -c constraints.txt -e '.[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    if not tasks:
        raise UserError("--tasks: name at least one")
    if template is not None and not apply_chat_template:
        hint = "questions go into a template with --apply_chat_template only"
        raise UserError(f"--template {template}: {hint}")
    if out_file is not None and out_file.exists():
        hint = "Give another name, or move that one away"
        raise UserError(f"--out_file {out_file}: exists already. {hint}")
    folder = choose_folder(checkpoint_dir, lora_path, adapter_path)
    model_dir = resolve_model_dir(folder, checkpoint_dir)  # fails before tasks are looked for
    dtype = inference_dtype(precision, model_dir, tokens=256)
    names, manager = find_tasks(tasks, include_path)
    where = (folder, checkpoint_dir, default_device(), dtype)
    template = template if apply_chat_template else "none"  # not used
    model, tokenizer, template = load_finetuned(*where, template)
    optimize_for_inference(model, default_device())
    adaptor = LitLLaMA(model, tokenizer, template, batch_tokens)
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
        problem = f"what a task needs is not here and cannot be fetched ({reason})"
        raise UserError(f"--tasks: {problem}") from None
    results["config"] |= {"model": str(folder), "precision": PRECISION_NAMES[dtype]}
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if out_file is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        with atomic_write(out_file) as file:
            file.write_text(f"{text}\n", "utf-8")


def find_tasks(names: list[str], include_path: Path | None) -> "tuple[list[str], TaskManager]":
    """Find tasks by names and patterns, in `include_path` or else among lm-eval's own.

    Returns the names and the manager that loads them.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include_path {include_path}: is no folder")
    for own_only in (True, False):  # lm-eval's own ones are thousands of files to read
        folder = include_path and str(include_path)
        manager = TaskManager(include_path=folder, include_defaults=not own_only)
        found = {name: manager.match_tasks([name]) for name in names}
        if all(found.values()):
            return list(dict.fromkeys(task for tasks in found.values() for task in tasks)), manager
    unknown = next(name for name in names if not found[name])
    hint = "`lm-eval ls tasks` lists them; for your own ones give their folder with --include_path"
    raise UserError(f"--tasks {unknown}: no task is called that. {hint}")


class LitLLaMA(TemplateLM):
    """A model for lm-eval, which tokenizes and truncates as lm-eval's own `hf` model does."""

    def __init__(
        self, model: LLaMA, tokenizer: Tokenizer, template: str, batch_tokens: int
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.batch_tokens = batch_tokens
        self.max_length = model.config.max_position_embeddings
        self.max_gen_toks = 256
        eos_ids = model.config.eos_token_id
        eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
        self.stop_ids = {tokenizer.eos_id, *eos_ids} - {None}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without a context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenize; special tokens in the text count as such, as chat templates contain them."""
        bos = self.tokenizer.adds_bos and add_special_tokens is not False
        return self.tokenizer.encode(string, bos=bos, special=True)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render the prompt; without `add_generation_prompt` the last turn starts the answer."""
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
                size = f"an answer of {len(continuation)} tokens"
                limit = f"the model's context holds {self.max_length}"
                raise UserError(f"a task has {size}, {limit}")
            ids = (context + continuation)[-self.max_length - 1 :]  # the last one is predicted only
            samples.append((ids, len(ids) - len(continuation)))
        return log_likelihoods(self.model, samples, self.batch_tokens)

    def loglikelihood_rolling(self, requests: "list[Instance]", **kwargs: Any) -> list[float]:
        """Return the log-likelihood of each text, in windows if it exceeds the context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            prefix, length = self.prefix_token_id, self.max_length
            for window in get_rolling_token_windows(ids, prefix, length, context_len=1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[number] += likelihood
        return totals

    def generate_until(self, requests: "list[Instance]", **kwargs: Any) -> list[str]:
        """Answer each context, up to a stop string, a stop token or `max_gen_toks`."""
        from lm_eval.models.utils import normalize_gen_kwargs

        groups: dict[str, list[int]] = {}  # requests with equal settings are decoded together
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", unit="answers", disable=None) as bar:
            for text, numbers in groups.items():
                settings = normalize_gen_kwargs(json.loads(text), self.max_gen_toks)
                sampling = self.sampling(settings)
                new = sampling.max_new_tokens
                contexts = (self.tok_encode(requests[number].args[0]) for number in numbers)
                prompts = [torch.tensor(ids[new - self.max_length :]) for ids in contexts]
                lengths = [len(prompt) + new for prompt in prompts]
                for batch in pack_micro_batches(range(len(prompts)), lengths, self.batch_tokens):
                    rows = [prompts[index] for index in batch]
                    texts = self.generate_batch(rows, sampling, settings["until"])
                    for index, answer in zip(batch, texts, strict=True):
                        answers[numbers[index]] = answer
                    bar.update(len(batch))
        return answers

    def sampling(self, settings: dict[str, Any]) -> Sampling:
        """Convert a task's generation_kwargs."""
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
        if unknown := settings.keys() - known:
            problem = f"ask for {sorted(unknown)}, which is not supported"
            raise UserError(f"a task's generation_kwargs {problem}")
        new = settings["max_gen_toks"]
        if new >= self.max_length:
            limit = f"the model's context holds {self.max_length}"
            raise UserError(f"a task asks for {new} new tokens, {limit}")
        temperature = float(settings.get("temperature", 0.0)) if settings["do_sample"] else 0.0
        return Sampling(new, temperature, settings.get("top_k"), settings.get("top_p", 1.0))

    def generate_batch(
        self, prompts: list[torch.Tensor], sampling: Sampling, until: Iterable[str]
    ) -> list[str]:
        """Answer prompts, each (seq,), up to the first of the strings `until` in each answer."""
        stops = [stop for stop in until if stop]
        # at least one token for each byte: the last tokens that a stop string may be spread over
        tail_length = 4 + max((len(stop.encode("utf-8")) for stop in stops), default=0)
        rows: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for tokens in stream(self.model, prompts, sampling, self.stop_ids):
            for row in sorted(running):
                rows[row].append(int(tokens[row]))
                tail = self.tokenizer.decode(rows[row][-tail_length:])
                if rows[row][-1] in self.stop_ids or any(stop in tail for stop in stops):
                    running.remove(row)
            if not running:
                break
        texts = []
        for row in rows:
            text = self.tokenizer.decode([index for index in row if index not in self.stop_ids])
            ends = [place for place in map(text.find, stops) if place >= 0]
            texts.append(text[: min(ends, default=len(text))])
        return texts


if __name__ == "__main__":
    run(main)
