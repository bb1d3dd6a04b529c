"""Forty mistakes that a person could make in the library, one at a time: does a test fail?

    python tests/mutations.py                # all; status 1 if fewer than 36 are caught
    python tests/mutations.py adapter.py     # those with this word in their file or name

Each is written into a copy of the repository, where a test that should catch it runs, in a process
forked from this one, which has imported all that takes long (and nothing of the library). First
the same tests pass on a copy without a mistake.
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


MUTATIONS = [
    # LoRA
    Mutation(
        "rsLoRA scaled by alpha / r",
        "lora.py",
        "scaling = config.alpha / (math.sqrt(config.r) if config.use_rslora else config.r)",
        "scaling = config.alpha / config.r",
        "test_lora.py::test_our_lora_gives_the_same_logits_in_peft",
    ),
    Mutation(
        "a loaded LoRA scaled by the r of its settings",
        "storage/peft.py",
        "scaling = _alpha(settings, layer) / (math.sqrt(r) if lora.config.use_rslora else r)",
        'scaling = _alpha(settings, layer) / settings["r"]',
        "test_lora.py::test_lora_of_peft_gives_the_same_logits_here",
    ),
    Mutation(
        "the norm of DoRA gets gradients",
        "lora.py",
        "with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):",
        "with torch.autocast(weight.device.type, enabled=False):",
        "test_lora.py::test_gradients_match_peft",
    ),
    Mutation(
        "the update rounded before it is merged",
        "lora.py",
        "weight.float() + scaling * (b.float() @ a.float())",
        "weight.float() + (scaling * (b.float() @ a.float())).to(weight.dtype)",
        "test_lora.py::test_merging_into_bf16_rounds_once",
    ),
    Mutation(
        "a DoRA merged by the norms of the base",
        "lora.py",
        "(magnitude / row_norms(merged))",
        "(magnitude / row_norms(weight))",
        "test_lora.py::test_merged_equals_unmerged_and_leaves_a_plain_model",
    ),
    Mutation(
        "DoRA's magnitude not taken from loaded weights",
        "storage/model_folder.py",
        'if hasattr(module, "init_from_base"):',
        'if hasattr(module, "init_from_weight"):',
        "test_lora.py::test_dora_starts_as_the_base_if_weights_load_later",
    ),
    Mutation(
        "LoRA+ raises the learning rate of A",
        "storage/methods.py",
        '".lora_B." in name',
        '".lora_A." in name',
        "test_lora.py::test_loraplus_raises_the_learning_rate_of_b",
    ),
    Mutation(
        "every row of a batch gets every LoRA",
        "multi_lora.py",
        "self.scaling[rows[name], start:end]",
        "self.scaling[:, start:end]",
        "test_multi_lora.py::test_each_row_equals_its_lora_alone",
    ),
    # LLaMA-Adapter, and the table of methods
    Mutation(
        "tanh on the gates",
        "adapter.py",
        "return self.gate.to(query.dtype)[:, None]",
        "return self.gate.to(query.dtype).tanh()[:, None]",
        "test_adapter.py::test_attention_matches_the_paper",
    ),
    Mutation(
        "gates start at one",
        "adapter.py",
        "torch.zeros(config.num_attention_heads",
        "torch.ones(config.num_attention_heads",
        "test_adapter.py::test_at_step_0_every_method_equals_the_base",
    ),
    Mutation(
        "v2's bias added after the scale",
        "adapter.py",
        "self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))",
        "self.adapter_scale.to(y.dtype) * y + self.adapter_bias.to(y.dtype)",
        "test_adapter.py::test_v2_matches_the_paper",
    ),
    Mutation(
        "the table applies version 1 for v2",
        "storage/methods.py",
        "        apply_adapter_v2,\n",
        "        apply_adapter,\n",
        "test_adapter.py::test_a_saved_adapter_loads_with_the_same_logits",
    ),
    # dropout
    Mutation(
        "each step drops the same features",
        "dropout.py",
        "hash((seed, step, sample_id))",
        "hash((seed, sample_id))",
        "test_dropout.py::test_masks_differ_by_seed_step_sample_layer_and_token",
    ),
    Mutation(
        "dropout without its scale on the fast path",
        "fast/modules.py",
        "self.scaling / (1 - p), mask)",
        "self.scaling, mask)",
        "test_fast.py::test_a_run_has_the_same_losses_on_fast_and_plain_paths[lora]",
    ),
    # the model and its KV cache
    Mutation(
        "RoPE turns the other way",
        "model.py",
        "torch.cat((-sin, sin), dim=-1)",
        "torch.cat((sin, -sin), dim=-1)",
        "test_model.py::test_logits_match_transformers",
    ),
    Mutation(
        "positions continue from sample to sample",
        "model.py",
        "torch.cat([torch.arange(length) for length in lengths])",
        "torch.arange(sum(lengths))",
        "test_model.py::test_packed_sequences_know_where_samples_start",
    ),
    Mutation(
        "samples of one length attend to each other",
        "model.py",
        "lengths, count = [sum(lengths)], len(lengths)",
        "lengths, count = [sum(lengths)], 1",
        "test_model.py::test_packed_attention_matches_sdpa_under_dense_mask",
    ),
    Mutation(
        "the model imports storage",
        "model.py",
        "from lit_llama.kv_cache import KVCache",
        "from lit_llama.kv_cache import KVCache\nfrom lit_llama.storage.files import read_text",
        "test_imports.py::test_the_book_imports_only_the_book",
    ),
    Mutation(
        "a new token does not see itself",
        "kv_cache.py",
        "<= positions[..., None]",
        "< positions[..., None]",
        "test_kv_cache.py::test_chunked_prefill_of_a_batch_matches_transformers",
    ),
    Mutation(
        "shorter rows see what is behind their end",
        "kv_cache.py",
        "if new_tokens > 1 or not self.uniform:",
        "if new_tokens > 1:",
        "test_decoding.py::test_prompts_of_other_lengths_do_not_change_a_row",
    ),
    Mutation(
        "shorter rows continue where the longest ends",
        "kv_cache.py",
        "positions = self.lengths[:, None] + torch.arange",
        "positions = self.lengths.amax().expand(batch_size, 1) + torch.arange",
        "test_decoding.py::test_prompts_of_other_lengths_do_not_change_a_row",
    ),
    Mutation(
        "query heads dealt out to the key heads in turn",
        "kv_cache.py",
        "query = query.view(batch_size, new, heads, groups, dim)",
        "query = query.view(batch_size, new, groups, heads, dim).transpose(2, 3)",
        "test_kv_cache.py::test_greedy_with_kv_cache_matches_transformers_without",
    ),
    # fast functions
    Mutation(
        "the gradient of RMSNorm with a wrong power",
        "fast/kernels.py",
        ".mul_(r**3 / size)",
        ".mul_(r**2 / size)",
        "test_fast.py::test_rms_norm",
    ),
    Mutation(
        "the gradient of LoRA's A without the scaling",
        "fast/functions.py",
        "(grad @ b).mul_(ctx.scaling)",
        "(grad @ b)",
        "test_fast.py::test_lora",
    ),
    Mutation(
        "the gradient of short attention without the root",
        "fast/short_attention.py",
        "alpha=1 / math.sqrt(q.size(-1))",
        "alpha=1 / q.size(-1)",
        "test_fast.py::test_short_attention",
    ),
    Mutation(
        "a static cache without its mask",
        "fast/decoding.py",
        "self.uniform = False",
        "self.uniform = True",
        "test_decoding.py::test_fused_projections_and_static_steps_give_the_plain_logits",
    ),
    # data
    Mutation(
        "every epoch has the same order",
        "data.py",
        "(seed * 1_000_003 + epoch)",
        "(seed * 1_000_003)",
        "test_prepare.py::test_epochs_are_permutations_and_steps_cut_them",
    ),
    Mutation(
        "ranks with fewer micro-batches stop early",
        "data.py",
        "return own + [[]] * (per_rank - len(own))",
        "return own",
        "test_prepare.py::test_ranks_get_equally_many_micro_batches",
    ),
    Mutation(
        "labels predicted one token too late",
        "data.py",
        "positions.append(start + is_label.nonzero()[:, 0] - 1)",
        "positions.append(start + is_label.nonzero()[:, 0])",
        "test_prepare.py::test_labels_are_response_and_end_token",
    ),
    Mutation(
        "BOS twice behind a template that spells it out",
        "tokenizer.py",
        "if bos and ids[:1] != [self.bos_id] else ids",
        "if bos else ids",
        "test_tokenizer.py::test_bos_that_a_template_spells_out_is_not_doubled",
    ),
    Mutation(
        "a user's text can end the turn",
        "prompts.py",
        "return tokenizer.protect(value)",
        "return value",
        "test_prompts.py::test_special_tokens_come_from_the_template_alone",
    ),
    # training
    Mutation(
        "loss divided by samples",
        "training.py",
        "num_labels = sum(dataset.label_counts[index] for index in sample_ids)",
        "num_labels = len(sample_ids)",
        "test_lora.py::test_twenty_steps_follow_a_plain_peft_loop",
    ),
    Mutation(
        "gradients clipped if they are small",
        "training.py",
        "if 0 < train.max_grad_norm < grad_norm:",
        "if 0 < grad_norm < train.max_grad_norm:",
        "test_lora.py::test_twenty_steps_follow_a_plain_peft_loop",
    ),
    Mutation(
        "the mean over processes taken for a sum",
        "training.py",
        "fabric.backward(loss * fabric.world_size)",
        "fabric.backward(loss)",
        "test_distributed.py::test_two_processes_give_what_one_gives[lora]",
    ),
    Mutation(
        "the warm-up's first step has a learning rate of zero",
        "training.py",
        "factor = (step + 1) / self.warmup",
        "factor = step / self.warmup",
        "test_training.py::test_schedule_matches_that_of_torch",
    ),
    Mutation(
        "validation with dropout",
        "training.py",
        "    model.eval()\n",
        "",
        "test_training.py::test_validation_is_without_dropout_and_training_with_it",
    ),
    # checkpoints
    Mutation(
        "AdamW starts to count again after a resume",
        "storage/run_folder.py",
        "state[key] = handle.get_tensor(stored).to(device)",
        "state[key] = torch.zeros((), device=device)",
        "test_training.py::test_resumed_run_equals_an_uninterrupted_one",
    ),
    Mutation(
        "files written in place",
        "storage/files.py",
        "        yield temporary\n        _fsync",
        "        yield path\n        temporary = path\n        _fsync",
        "test_model_folder.py::test_an_error_while_writing_leaves_what_was_there",
    ),
    Mutation(
        "checksums compared by length",
        "storage/files.py",
        "if line != other]",
        "if len(line) != len(other)]",
        "test_fuzz.py::test_step_folder",
    ),
    # generation
    Mutation(
        "a rejected token sampled again from all",
        "fast/speculation.py",
        "next_probs = (p - q[0]).clamp(min=0)",
        "next_probs = p",
        "test_decoding.py::test_speculation_does_not_change_the_distribution",
    ),
]


def mutated(mutation: Mutation) -> str:
    """Return the file's text with the mistake. Raises ValueError if the place is not there once."""
    text = (ROOT / "lit_llama" / mutation.file).read_text("utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}"
        )
    return text.replace(mutation.old, mutation.new)


def warm_up() -> None:
    """Import what the tests import, but not the library."""
    # bytecode is found by time and size: two mistakes of one length in one second look alike
    sys.dont_write_bytecode = True
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    import jsonargparse  # noqa: F401
    import lightning.fabric  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)  # a pool of threads would not survive the fork


def run_tests(copy: Path, tests: list[str]) -> tuple[int | None, str]:
    """Run tests in a copy of the repository. Returns pytest's status (None: hangs) and output."""
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
    chosen = [m for m in MUTATIONS if all(word in f"{m.file} {m.name}" for word in words)]
    texts = [mutated(mutation) for mutation in chosen]
    warm_up()
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(
            ".*", "__pycache__", "checkpoints", "data", "out", "build", "*.egg-info"
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        status, log = run_tests(
            copy, sorted({test for mutation in chosen for test in mutation.tests.split()})
        )
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
            print(
                f"{mutation.file:13}  {mutation.name:60}  {result:8}  {seconds:4.1f} s  {by}",
                flush=True,
            )
    print(f"{caught} of {len(chosen)} caught")
    return 0 if caught >= min(ENOUGH, len(chosen)) else 1


if __name__ == "__main__":
    sys.exit(main())
