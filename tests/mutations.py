"""Forty mistakes that a person could make in the library, one at a time: does a test fail?

    python tests/mutations.py                # all of them, in about five minutes; a table, and status 1 below 36
    python tests/mutations.py proposal       # those with that word in their name

Each is written into a copy of the repository, and a few tests that should catch it run there. They run in a process
forked from this one, which has imported all that takes long (and nothing of the library). First the same tests pass on
a copy without a mistake. `tests/test_mutations.py` sees to it that the table fits the code.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 36
TIMEOUT = 300  # seconds; a mistake under which a test hangs is caught too


class Mutation(NamedTuple):
    name: str
    file: str  # in lit_llama/
    old: str  # occurs once in the file
    new: str
    tests: str  # in tests/, separated by spaces


LORA, ADAPTER, ATTENTION = "test_lora.py::test_", "test_adapter.py::test_", "test_attention.py::test_"
MODEL, TRAINING, RESUME = "test_model.py::test_", "test_training.py::test_", "test_resume.py::test_"
GENERATION, DECODING, CHECKPOINT = "test_generation.py::test_", "test_decoding.py::test_", "test_checkpoint.py::test_"

MUTATIONS = [
    # LoRA
    Mutation(
        "rsLoRA scaled by alpha / r",
        "lora.py",
        "scaling = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)",
        "scaling = config.alpha / config.r",
        LORA + "our_lora_gives_the_same_logits_in_peft",
    ),
    Mutation(
        "rank_pattern ignored in the scaling of a loaded LoRA",
        "lora.py",
        'settings["lora_alpha"]) / (math.sqrt(r) if use_rslora else r)',
        'settings["lora_alpha"]) / (math.sqrt(settings["r"]) if use_rslora else settings["r"])',
        LORA + "pefts_lora_gives_the_same_logits_here",
    ),
    Mutation(
        "LoRA+ raises the learning rate of A",
        "lora.py",
        '".lora_B." in name else 1.0',
        '".lora_A." in name else 1.0',
        LORA + "loraplus_raises_the_learning_rate_of_b",
    ),
    Mutation(
        "dropout without its scale on the fast path",
        "lora.py",
        "self.scaling / (1 - self.dropout) if drops else self.scaling",
        "self.scaling",
        "test_fast.py::test_a_run_has_the_same_losses_on_fast_and_plain_paths[lora]",
    ),
    Mutation(
        "DoRA's length is not a constant",
        "lora.py",
        "with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):",
        "with torch.autocast(weight.device.type, enabled=False):",
        LORA + "gradients_are_pefts",
    ),
    Mutation(
        "the update rounded before it is merged",
        "lora.py",
        "weight = lora.base.weight.float() + lora.scaling * (lora.lora_B.weight @ lora.lora_A.weight)",
        "weight = lora.base.weight + (lora.scaling * (lora.lora_B.weight @ lora.lora_A.weight)).to("
        "lora.base.weight.dtype)",
        LORA + "merging_into_bf16_rounds_once",
    ),
    Mutation(
        "merging a DoRA by the lengths of the base",
        "lora.py",
        "(lora.lora_magnitude_vector / row_lengths(weight))",
        "(lora.lora_magnitude_vector / row_lengths(lora.base.weight))",
        LORA + "merged_equals_unmerged_and_leaves_a_plain_model",
    ),
    Mutation(
        "a target matches the end of a longer name",
        "lora.py",
        'f".{own}".endswith(f".{target}")',
        "own.endswith(target)",
        LORA + "a_target_is_a_whole_name",
    ),
    # LLaMA-Adapter
    Mutation(
        "tanh on the gates",
        "adapter.py",
        "return self.gate.to(query.dtype)[:, None]",
        "return self.gate.to(query.dtype).tanh()[:, None]",
        ADAPTER + "attention_is_the_papers",
    ),
    Mutation(
        "gates start at one",
        "adapter.py",
        "torch.zeros(config.num_attention_heads",
        "torch.ones(config.num_attention_heads",
        ADAPTER + "at_step_0_every_method_is_the_base",
    ),
    Mutation(
        "layers counted from one",
        "adapter.py",
        "for layer in model.layers[config.start_layer :]:",
        "for layer in model.layers[config.start_layer + 1 :]:",
        ADAPTER + "logits_are_pefts_where_all_heads_have_one_gate",
    ),
    Mutation(
        "v2's bias after the scale",
        "adapter.py",
        "self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))",
        "self.adapter_scale.to(y.dtype) * y + self.adapter_bias.to(y.dtype)",
        ADAPTER + "v2_is_the_papers",
    ),
    Mutation(
        "v2's norms stay frozen",
        "adapter.py",
        "nn.Parameter(module.weight.detach().float())",
        "nn.Parameter(module.weight.detach().float(), requires_grad=False)",
        ADAPTER + "v2_is_the_papers",
    ),
    # attention
    Mutation(
        "query heads dealt out to the key heads in turn",
        "attention.py",
        "query.view(batch, self.new, heads, groups, dim).permute(0, 2, 3, 1, 4)",
        "query.view(batch, self.new, groups, heads, dim).permute(0, 3, 2, 1, 4)",
        MODEL + "greedy_with_kv_cache_matches_transformers_without",
    ),
    Mutation(
        "positions run on from sample to sample",
        "attention.py",
        "torch.cat([torch.arange(length) for length in lengths])",
        "torch.arange(sum(lengths))",
        ATTENTION + "sample_lengths_say_where_samples_start",
    ),
    Mutation(
        "samples of one length attend to each other",
        "attention.py",
        "return _sdpa(*(samples.split(t) for t in (query, key, value))).transpose(1, 2).flatten(0, 1)",
        "return _sdpa(*(t.transpose(0, 1)[None] for t in (query, key, value)))[0].transpose(0, 1)",
        MODEL + "samples_end_to_end_match_transformers_one_at_a_time",
    ),
    Mutation(
        "a new token does not see itself",
        "attention.py",
        "torch.arange(self.end, device=device) <= positions[..., None]",
        "torch.arange(self.end, device=device) < positions[..., None]",
        MODEL + "chunked_prefill_of_a_batch_matches_transformers",
    ),
    Mutation(
        "shorter rows see what is behind their end",
        "attention.py",
        "if self.static or new > 1 or not self.uniform:",
        "if self.static or new > 1:",
        DECODING + "prompts_of_other_lengths_do_not_change_a_row",
    ),
    Mutation(
        "shorter rows go on where the longest does",
        "attention.py",
        "positions = self.lengths[:, None] + torch.arange(new, device=device)",
        "positions = self.longest + torch.arange(new, device=device).expand(batch, -1)",
        DECODING + "prompts_of_other_lengths_do_not_change_a_row",
    ),
    # training
    Mutation(
        "loss divided by samples",
        "training.py",
        "num_labels = sum(train_set.label_counts[index] for index in sample_ids)",
        "num_labels = len(sample_ids)",
        LORA + "twenty_steps_follow_a_plain_peft_loop",
    ),
    Mutation(
        "the mean over processes taken for a sum",
        "training.py",
        "fabric.backward(loss * fabric.world_size)",
        "fabric.backward(loss)",
        "test_distributed.py::test_two_processes_give_what_one_gives[lora]",
    ),
    Mutation(
        "gradients clipped where they are small",
        "training.py",
        "if 0 < args.max_grad_norm < grad_norm:",
        "if 0 < grad_norm < args.max_grad_norm:",
        LORA + "twenty_steps_follow_a_plain_peft_loop",
    ),
    Mutation(
        "the schedule starts again with a resume",
        "training.py",
        "schedule(args.schedule, step, warmup, num_steps)\n            for",
        "schedule(args.schedule, step - first_step, warmup, num_steps)\n            for",
        RESUME + "a_loss_that_is_not_finite_names_its_samples_and_leaves_what_was_good",
    ),
    Mutation(
        "the warm-up's first step stands still",
        "training.py",
        "return (step + 1) / warmup",
        "return step / warmup",
        TRAINING + "schedule_matches_torchs",
    ),
    Mutation(
        "the warm-up counts samples, not steps",
        "training.py",
        "math.ceil(args.warmup_epochs * len(train_set) / args.batch_size)",
        "math.ceil(args.warmup_epochs * len(train_set))",
        TRAINING + "a_warm_up_in_epochs_counts_steps",
    ),
    Mutation(
        "validation drops features out",
        "training.py",
        "    model.eval()\n    total =",
        "    total =",
        TRAINING + "validation_is_without_dropout_and_training_with_it",
    ),
    Mutation(
        "LoRA+ left out of the loop",
        "training.py",
        'group["lr"] = learning_rate * group["ratio"]',
        'group["lr"] = learning_rate',
        TRAINING + "loraplus_reaches_the_optimizer",
    ),
    Mutation(
        "the best checkpoint is the worst",
        "training.py",
        "val_loss < (progress.best_val_loss or math.inf)",
        "val_loss > (progress.best_val_loss or 0)",
        RESUME + "the_best_checkpoint_stays_and_every_checkpoint_can_be_used",
    ),
    Mutation(
        "a short step counts as a whole one",
        "training.py",
        "progress.samples + len(sample_ids)",
        "progress.samples + args.batch_size",
        RESUME + "more_epochs_leave_no_sample_out",
    ),
    # generation
    Mutation(
        "top_p drops the token that reaches p",
        "generation.py",
        "ordered.cumsum(-1) - ordered >= sampling.top_p",
        "ordered.cumsum(-1) >= sampling.top_p",
        GENERATION + "probabilities_are_those_of_transformers",
    ),
    Mutation(
        "the first row that ends ends all",
        "generation.py",
        "if ended.all():",
        "if ended.any():",
        GENERATION + "rows_end_like_those_of_transformers",
    ),
    Mutation(
        "a refused proposal drawn again from the whole distribution",
        "generation.py",
        "want = (want - guess).clamp(min=0)",
        "want = want.clamp(min=0)",
        DECODING + "speculation_leaves_the_distribution_as_it_is",
    ),
    Mutation(
        "a proposal accepted by the model's probability alone",
        "generation.py",
        "if chance * guess[token] >= want[token]:",
        "if chance >= want[token]:",
        DECODING + "speculation_leaves_the_distribution_as_it_is",
    ),
    Mutation(
        "a full context is refused",
        "generation.py",
        "if longest + new > (context :=",
        "if longest + new >= (context :=",
        GENERATION + "a_context_is_used_to_its_end",
    ),
    Mutation(
        "all answers have one seed",
        "generation.py",
        "replace(settings, seed=seed + number)",
        "replace(settings, seed=seed)",
        GENERATION + "each_answer_has_a_seed_of_its_own",
    ),
    # checkpoint
    Mutation(
        "weights keep the dtype of their file",
        "checkpoint.py",
        "return LLaMA(config).to(dtype).requires_grad_(False)",
        "return LLaMA(config).requires_grad_(False)",
        CHECKPOINT + "weights_are_frozen_and_rounded_to_the_dtype",
    ),
    Mutation(
        ".bin before safetensors",
        "checkpoint.py",
        '(folder / "model.safetensors", folder / "pytorch_model.bin")',
        '(folder / "pytorch_model.bin", folder / "model.safetensors")',
        CHECKPOINT + "safetensors_come_before_bin",
    ),
    Mutation(
        "rotary buffers of old exports taken for weights",
        "checkpoint.py",
        'if not name.endswith("rotary_emb.inv_freq"):',
        'if not name.endswith("rotary.inv_freq"):',
        CHECKPOINT + "rotary_buffers_of_old_exports_are_left_out",
    ),
    Mutation(
        "DoRA's lengths are not taken from the loaded weights",
        "checkpoint.py",
        'if hasattr(module, "init_from_base"):',
        'if hasattr(module, "init_from_weight"):',
        LORA + "dora_built_for_a_run_starts_as_the_base",
    ),
    Mutation(
        "files of an older result stay",
        "checkpoint.py",
        "if stale.name not in written:",
        "if stale.name in files:",
        RESUME + "full_result_replaces_an_older_one",
    ),
]


def mutated(mutation: Mutation) -> str:
    """The file's text with the mistake in it. Raises ValueError where the table does not fit the code."""
    text = (ROOT / "lit_llama" / mutation.file).read_text("utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


def warm_up() -> None:
    """Import what the tests import, but not the library."""
    sys.dont_write_bytecode = True  # two mistakes of one length in one second would look alike to it
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    import jsonargparse  # noqa: F401
    import lightning.fabric  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not survive the fork


def run_tests(copy: Path, tests: list[str]) -> tuple[int | None, str]:
    """pytest's status (None: timed out) and output, for tests run in a copy of the repository."""
    log = copy.parent / "log.txt"
    child = os.fork()
    if child == 0:
        status = 3  # pytest's own for an internal error
        try:
            os.setpgid(0, 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(copy)
            os.environ["PYTHONPATH"] = sys.path[0] = str(copy)
            import pytest

            flags = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'pytest'}"]
            status = int(pytest.main([*flags, *(f"tests/{test}" for test in tests)]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    started, status = time.monotonic(), None
    while status is None and time.monotonic() < started + TIMEOUT:
        time.sleep(0.02)
        done, ended = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(ended) if done else None
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status, log.read_text("utf-8", "replace")


def main() -> int:
    words = sys.argv[1:]
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.name for word in words)]
    texts = [mutated(mutation) for mutation in chosen]
    warm_up()
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "checkpoints", "data", "out", "build", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignored)
        status, log = run_tests(copy, sorted({test for mutation in chosen for test in mutation.tests.split()}))
        if status != 0:
            print(f"{log}\nThe tests do not pass without a mistake (status {status})")
            return 1
        for mutation, text in zip(chosen, texts, strict=True):
            file = copy / "lit_llama" / mutation.file
            right, started = file.read_text("utf-8"), time.monotonic()
            file.write_text(text, "utf-8")
            status, log = run_tests(copy, mutation.tests.split())
            file.write_text(right, "utf-8")
            if status not in (0, 1, None):
                print(f"{log}\n{mutation.name}: pytest ended with status {status}")
                return 1
            found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", log, re.MULTILINE)
            by = found[1] if found else "a test that hangs" if status is None else ""
            caught += status != 0
            seconds = time.monotonic() - started
            result = "survived" if status == 0 else "caught"
            print(f"{mutation.file:13}  {mutation.name:60}  {result:8}  {seconds:4.1f} s  {by}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught >= min(ENOUGH, len(chosen)) else 1


if __name__ == "__main__":
    sys.exit(main())
