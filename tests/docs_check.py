"""Run each command of the README and the howtos in a short form, on tiny models.

Each page is followed from top to bottom in a copy of the project that has the files its reader is
said to have: shell lines, inline code that is a command, and Python blocks. What is not run is
listed with the reason. Words name the pages: `python tests/docs_check.py howto/resume.md`.

Most of a short command is the time to import torch, so scripts run with the Python of warm.py.
"""

import http.server
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads at work cannot be forked

import torch
import warm
import yaml
from conftest import ROOT, make_hf_model, save_checkpoint_folder
from test_convert import byte_level_bpe, meta_tensors, save_gguf, save_meta
from test_download import Hub

NOT_RUN = {  # pattern -> why
    r"python -m venv|source |pip install torch": "sets up an environment",
    r"([A-Z_]+=\S+ )*make [a-z]|bash \.ci/run": "it takes long",
    r".*--tasks \[arc_easy": "its questions are on the hub",
    r".*NODE_RANK=|torchrun|srun ": "several machines: see tests/test_distributed.py",
    r"(hf auth|vllm|llama|curl|git|ollama|wandb|mlflow|tensorboard)\b": "another project's program",
    r"python (convert_|\S*llama\.cpp)": "another project's program",
}
SHORT = {  # script -> flags that come last, and so win
    "finetune/": "--train.max_steps 2 --train.batch_size 4 --train.eval_samples 4",
    "generate/": "--max_new_tokens 4",
    "scripts/prepare_": "--val_size 4",
    "evaluate/compare.py": "--max_samples 2 --max_new_tokens 4",
    "benchmarks/generate.py": "--rounds 1 --new_tokens 4 --contenders ['lit-llama bf16']",
    "benchmarks/flags.py": "--source alpaca_240.json --steps 2 --batch_size 4 --runs [lora]",
    "benchmarks/count.py": "--models [7B] --recompute [activations]",
    "benchmarks/busy.py": "--rounds 1 --steps 4 --contenders 'lit-llama LoRA, bf16'",
    "benchmarks/rank.py": "--ranks [1,2] --val_size 4",
    "benchmarks/many_loras.py": "--rounds 1",
}
FILE_BLOCK = r"`([\w./-]+\.\w+)`:\n\n((?:    .*\n)+|```\w*\n(?:(?!```).*\n)*```\n)"
SOURCES = {
    "scripts/prepare_alpaca.py": "alpaca_240.json",
    "scripts/prepare_dolly.py": "dolly_2k.jsonl",
}
MODELS = ("SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-hf")


def commands(page: Path) -> list[tuple[int, str]]:
    """Line number and command, Python blocks included."""
    found, lines = [], page.read_text("utf-8").split("\n")
    programs = r"python|pip|make|bash|source|torchrun|srun|hf|vllm|curl|git|llama-\w+|for|cd"
    start = rf"(?:[A-Z_]+=\S+ )*(?:{programs}) "
    number, fence = 0, None
    while number < len(lines):
        line, first = lines[number], number + 1
        number += 1
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
            if fence == "python":
                end = lines.index("```", number)
                found.append((first, "python block\n" + "\n".join(lines[number:end])))
                number, fence = end + 1, None
            continue
        if re.match(rf"(    )?{start}", line) and (
            line.startswith("    ") or fence in ("bash", "sh")
        ):
            command = line.strip()
            while command.endswith("\\"):
                command = command[:-1] + lines[number].strip()
                number += 1
            found.append((first, command))
        elif not line.startswith("    ") and fence is None:
            # inline code may go on in the next line
            text = f"{line}\n{lines[number] if number < len(lines) else ''}"
            for match in re.finditer(rf"`({start}[^`]+)`", text):
                if match.start() < len(line):
                    found.append((first, " ".join(match[1].split())))
    return found


def shortened(command: str, folder: Path) -> list[str]:
    """Return the words to run: fewer devices, steps, samples and tokens; remove an old result."""
    words = shlex.split(command, comments=True)
    if words[0] == "pip":
        return [sys.executable, "-m", *words[:2], "--dry-run", "--quiet", "--no-deps", *words[2:]]
    script, words = words[1], [sys.executable, *words[1:]]
    for place, word in enumerate(words[:-1]):
        if word == "--devices" and int(words[place + 1]) > 1:
            words[place + 1] = "2"
    if "--help" in words or "--print_config" in words:
        return words
    if (
        script.startswith("generate/")
        and "chat" not in script
        and not {"--prompt", "--prompt_file"} & {*words}
    ):
        words += ["--prompt", "What is a dog?"]
    newest = max((path.name for path in (folder / "out/lora/alpaca").glob("step-*")), default="")
    words = [re.sub(r"step-\d{6}", newest, word) for word in words]
    resumes = "--resume" in words
    if script in SOURCES and "--source" not in words:
        words += ["--source", SOURCES[script]]
    for prefix, flags in SHORT.items():
        if script.startswith(prefix):
            words += shlex.split(flags)
    if script.startswith("finetune/"):
        words += ["--train.max_steps", "3"] if resumes else []
        config = words[words.index("--config") + 1] if "--config" in words else None
        flags = yaml.safe_load((folder / config).read_text("utf-8")) if config else {}
        out = flags.get("out_dir", f"out/{Path(script).stem}/alpaca")
    else:
        out = None
    if "--out_dir" in words:
        out = words[words.index("--out_dir") + 1]
    if out and not resumes:
        shutil.rmtree(folder / out, ignore_errors=True)
    return words


def check_page(page: Path, fixture: Path, environment: dict[str, str]) -> list[str]:
    """Follow one page; return a text for each command that failed, with the end of its output."""
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "project"
        shutil.copytree(fixture, folder, symlinks=True)
        for name, block in re.findall(
            FILE_BLOCK, page.read_text("utf-8")
        ):  # "`tasks/sea.yaml`:", and what is in it
            lines = block.splitlines()
            (folder / name).parent.mkdir(exist_ok=True)
            text = lines[1:-1] if block.startswith("```") else [line[4:] for line in lines]
            (folder / name).write_text("\n".join(text) + "\n", "utf-8")
        for number, command in commands(page):
            where = f"{page.relative_to(ROOT)}:{number}: {command.splitlines()[0]}"
            reason = next(
                (why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), None
            )
            if reason:
                print(f"not run  {where}  ({reason})", flush=True)
                continue
            started = time.perf_counter()
            settings = dict(
                re.findall(r"([A-Z_]+)=(\S+) ", re.match(r"([A-Z_]+=\S+ )*", command)[0])
            )
            if command.startswith("python block\n"):
                words = [sys.executable, "-c", command.partition("\n")[2]]
            else:
                words = shortened(re.sub(r"^([A-Z_]+=\S+ )+", "", command), folder)
            status, printed = run(words, folder, environment | settings)
            took = f"{time.perf_counter() - started:.1f} s"
            print(f"{'FAILED ' if status else 'ok     '}  {where}  ({took})", flush=True)
            if status:
                printed = "\n".join(printed.splitlines()[-12:])
                failures.append(f"{where}\nran: {shlex.join(words)}\n{printed}\n")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            if not (page.parent / target).exists():
                failures.append(
                    f"{page.relative_to(ROOT)}: links to {target}, which is not there\n"
                )
    return failures


def run(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and all that was printed."""
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done = subprocess.run(words, cwd=folder, env=environment, timeout=600, **streams)
    return done.returncode, done.stdout.decode(errors="replace")


def make_fixture(folder: Path, environment: dict[str, str]) -> None:
    """The project's files, and beside them tiny ones of what the pages speak of."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = listed.stdout.splitlines() or [
        str(file.relative_to(ROOT)) for file in ROOT.rglob("*") if file.is_file()
    ]
    for name in files:
        if (ROOT / name).is_file() and not name.startswith("."):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    tiny = folder / "checkpoints" / MODELS[0]
    tiny.parent.mkdir()
    settings = dict(
        num_hidden_layers=3, num_key_value_heads=2, max_position_embeddings=8192, hidden_size=64
    )
    save_checkpoint_folder(tiny, **settings)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    (tiny / "chat_template.jinja").write_text(template + "<|im_start|>assistant\n", "utf-8")
    recipes = [
        yaml.safe_load(file.read_text("utf-8"))
        for file in sorted(folder.glob("finetune/configs/*.yaml"))
    ]
    for name in {
        *MODELS[1:],
        *(recipe["checkpoint_dir"].removeprefix("checkpoints/") for recipe in recipes),
    } - {MODELS[0]}:
        shutil.copytree(tiny, folder / "checkpoints" / name)
    # sources
    lines = [
        "Count to three.",
        "Name a fruit, please.",
        "What is a dog?",
        "Say it again, and then once more.",
    ]
    records = [
        {"instruction": lines[n % 4], "input": "", "output": f"The answer is {n}."}
        for n in range(48)
    ]
    for name in ("alpaca_240.json", "alpaca_1200.json", "alpaca_2k.json", "held_out.json"):
        (folder / name).write_text(json.dumps(records), "utf-8")
    dolly = [
        {"instruction": r["instruction"], "context": "", "response": r["output"]} for r in records
    ]
    (folder / "dolly_2k.jsonl").write_text(
        "".join(f"{json.dumps(record)}\n" for record in dolly), "utf-8"
    )
    (folder / "support.csv").write_text("question,answer\n" + "How?,So.\n" * 6, "utf-8")
    chat = {
        "messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    }
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 6, "utf-8")
    (folder / "prompts.txt").write_text("What is a dog?\nAnd a fox?\n", "utf-8")
    (folder / "book.txt").write_text(
        "The quick brown fox jumps over the lazy dog, and then the other one. " * 60, "utf-8"
    )
    # models in other layouts
    other = make_hf_model(num_key_value_heads=2)
    save_gguf(other, folder / "SmolLM2-135M-Instruct.Q4_1.gguf", byte_level_bpe(tiny.parent))
    save_meta(make_hf_model(), folder / "llama-2-7b", shards=1)
    old = folder / "checkpoints/lit-llama/7B"
    old.mkdir(parents=True)
    save_old_lit(old / "lit-llama.pth")
    for place in (folder / "llama-2-7b", old):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, place)
    # prepared sets and finetuned models

    def call(command: str) -> None:
        status, printed = run([sys.executable, *command.split()], folder, environment)
        assert status == 0, printed

    base = f"--checkpoint_dir checkpoints/{MODELS[0]}"
    call(f"scripts/prepare_alpaca.py --source alpaca_240.json --val_size 8 {base}")
    for name in {"data/dolly", "data/quickstart", *(recipe["data_dir"] for recipe in recipes)}:
        if name != "data/alpaca":
            shutil.copytree(folder / "data/alpaca", folder / name)
    for method in ("lora", "adapter", "adapter_v2", "full"):
        call(f"finetune/{method}.py --train.max_steps 2 --train.batch_size 4 {base}")
    shutil.copy(folder / "out/lora/alpaca/config.yaml", folder)
    for name in ("quickstart", "alice", "bob"):
        shutil.copytree(folder / "out/lora/alpaca", folder / "out/lora" / name)


def save_old_lit(file: Path) -> None:
    """A checkpoint of the former Lit-LLaMA."""
    meta = meta_tensors(make_hf_model(hidden_size=128, num_attention_heads=1))
    old = {
        "transformer.wte.weight": meta["tok_embeddings.weight"],
        "transformer.ln_f.scale": meta["norm.weight"],
    }
    old["lm_head.weight"] = meta["output.weight"]
    parts = {
        "rms_1.scale": "attention_norm",
        "attn.c_proj.weight": "attention.wo",
        "rms_2.scale": "ffn_norm",
    }
    parts |= {"mlp.c_fc1.weight": "feed_forward.w1", "mlp.c_fc2.weight": "feed_forward.w3"}
    parts |= {"mlp.c_proj.weight": "feed_forward.w2"}
    for index in range(2):
        old |= {
            f"transformer.h.{index}.{new}": meta[f"layers.{index}.{part}.weight"]
            for new, part in parts.items()
        }
        qkv = [meta[f"layers.{index}.attention.w{part}.weight"] for part in "qkv"]
        old[f"transformer.h.{index}.attn.c_attn.weight"] = torch.cat(qkv)
    torch.save(old, file)


def main() -> None:
    pages = [ROOT / word for word in sys.argv[1:]] or [
        ROOT / "README.md",
        *sorted((ROOT / "howto").glob("*.md")),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    forking = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temporary:
        fixture = Path(temporary) / "fixture"
        environment |= {"HF_HOME": f"{temporary}/home", "HF_HUB_DISABLE_XET": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        sys.executable, python = warm.start(Path(temporary))
        make_fixture(fixture, environment)
        Hub.repo_id, Hub.folder, Hub.gets, Hub.break_offs = (
            "",
            fixture / "checkpoints" / MODELS[0],
            [],
            0,
        )
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
            environment["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
            server = forking.Process(target=hub.serve_forever, daemon=True)
            server.start()
            with ProcessPoolExecutor(2, forking) as pool:
                found = list(
                    pool.map(partial(check_page, fixture=fixture, environment=environment), pages)
                )
            server.terminate()
        python.stdin.close()
        python.wait()
    failures = [line for lines in found for line in lines]
    print("\n".join(["", *failures, f"{len(failures)} failed"]))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
