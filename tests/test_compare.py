"""evaluate/compare.py against transformers, peft, rouge_score, sacrebleu; page; wrong calls."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter
from lit_llama.data import TokenizedDataset
from lit_llama.generation import Sampling
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.prompts import encode_prompt, get_template
from lit_llama.runtime import cli
from lit_llama.storage.files import read_tensors
from lit_llama.storage.methods import SaveInfo, save_methods

compare = load_script("evaluate/compare.py")

RECORDS = [
    {
        "instruction": "Say <script>alert('x')</script> & stop.",
        "input": "a | b",
        "output": "the <b>lazy</b> dog",
    },
    {"instruction": "Show\n```\ncode\n```", "output": "the quick brown fox jumps over the other"},
    {"instruction": "Über 犬 &amp; cats", "input": "", "output": "fox\n\nand dog"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Path]:
    """`base`, and a `lora` and an `adapter` of it that change its answers; `records`, `prompts`."""
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(1)
    lora, lora_config = load_model(tiny_checkpoint, dtype=torch.float32), LoRAConfig(r=4)
    apply_lora(lora, lora_config)
    adapter, adapter_config = (
        load_model(tiny_checkpoint, dtype=torch.float32),
        AdapterConfig(start_layer=1),
    )
    apply_adapter(adapter, adapter_config)
    for model in (lora, adapter):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
    base = str(tiny_checkpoint)
    save_lora(dict(lora.named_parameters()), folder / "lo|ra", lora_config, base, "alpaca")
    methods, info = {"llama_adapter": adapter_config}, SaveInfo(adapter, base, "chatml")
    save_methods(folder / "adapter", adapter.named_parameters(), methods, info)
    (folder / "records.json").write_text(json.dumps(RECORDS), "utf-8")
    (folder / "prompts.txt").write_text("the quick\n\nbrown fox\n", "utf-8")
    files = dict(records=folder / "records.json", prompts=folder / "prompts.txt")
    return dict(base=tiny_checkpoint, lora=folder / "lo|ra", adapter=folder / "adapter") | files


@pytest.fixture
def here(monkeypatch) -> None:
    """Models are measured in this process, which saves the seconds of starting others."""
    monkeypatch.setattr(compare, "in_own_process", compare.measure)


def conversations() -> dict[str, list[dict[str, str]]]:
    return {
        f"record {number}": [
            {"role": "user", "content": record["instruction"], "input": record.get("input", "")},
            {"role": "assistant", "content": record["output"]},
        ]
        for number, record in enumerate(RECORDS)
    }


def measure(
    path: Path, data, template: str | None = None, max_samples: int = 50, batch_size: int = 2
) -> dict:
    return compare.measure(
        path, None, torch.float32, data, template, max_samples, Sampling(12, 0.0), batch_size
    )


@torch.no_grad()
def reference_loss(model, samples: list[tuple[list[int], list[int]]]) -> float:
    """By a model of `transformers`, one sample at a time."""
    total = count = 0
    for prompt, response in samples:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        count += len(response)
    return total / count


@pytest.mark.parametrize(
    ("name", "template"), [("base", "none"), ("base", "chatml"), ("lora", "alpaca")]
)
def test_loss_and_answers_are_those_of_transformers(
    folders: dict, name: str, template: str
) -> None:
    result = measure(folders[name], conversations(), template if template == "chatml" else None)
    assert result["template"] == template
    theirs = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, folders["lora"]).eval() if name == "lora" else theirs
    tokenizer = Tokenizer(folders["base"])
    end = tokenizer.specials["<|im_end|>"] if template == "chatml" else tokenizer.eos_id
    how = get_template(template, tokenizer)
    prompts = [encode_prompt(how, tokenizer, messages[:1]) for messages in conversations().values()]
    responses = [[*tokenizer.encode(record["output"], bos=False), end] for record in RECORDS]
    expected = reference_loss(theirs, list(zip(prompts, responses, strict=True)))
    assert result["loss"] == pytest.approx(expected, rel=1e-5)  # fp32
    assert result["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    for prompt, sample in zip(prompts, result["samples"], strict=True):
        ids = torch.tensor([prompt])
        whole = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list({end, tokenizer.eos_id}),
            pad_token_id=0,
        )
        assert sample["answer"] == tokenizer.decode(whole[0, len(prompt) :].tolist()).strip()
    assert [sample["reference"] for sample in result["samples"]] == [
        record["output"] for record in RECORDS
    ]
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 0


def test_validation_samples_of_a_prepared_set(folders: dict, tiny_data: Path) -> None:
    result = measure(folders["base"], tiny_data, max_samples=7)
    val = TokenizedDataset(read_tensors(tiny_data / "val.safetensors")[0])
    samples = []
    for index in range(7):
        batch = val.micro_batch([index], torch.device("cpu"))
        whole = [*batch["input_ids"].tolist(), batch["labels"][-1].item()]
        samples.append((whole[: -len(batch["labels"])], batch["labels"].tolist()))
    theirs = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    assert result["loss"] == pytest.approx(reference_loss(theirs, samples), rel=1e-5)
    assert result["template"] == "alpaca"
    assert len(result["samples"]) == 7
    for sample in result["samples"]:
        number = int(re.search(r"### Instruction:\nCount to (\d+)\.", sample["prompt"])[1])
        assert sample["reference"] == " ".join("one two"[: number % 8] or "x")
        assert sample["prompt"].endswith("### Response:")


def test_every_answer_of_a_conversation_is_a_sample(folders: dict) -> None:
    turns = (
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    )
    data = {"a place": [{"role": role, "content": text} for role, text in turns]}
    samples = measure(folders["base"], data, "chatml")["samples"]
    assert [sample["reference"] for sample in samples] == ["two", "four"]
    assert samples[1]["prompt"] == "system: be brief\n\nuser: one\n\nassistant: two\n\nuser: three"
    with pytest.raises(UserError, match=r"a place: template 'alpaca' holds a single instruction"):
        measure(folders["base"], data, "alpaca")


ANSWERS = [
    "The quick brown fox jumps over the dog, twice.",
    "",
    "1. Enhance responsiveness.\n2. Make customers' lives easier: 3.5 times!",
    "wholly different words",
]
REFERENCES = [
    "A quick brown fox jumps over the lazy dog.",
    "An answer.",
    "1. Improve responsiveness.\n2. Make customers' lives easier, 3.5 times.",
    "Not one of them is here &amp; there",
]


def test_scores_are_those_of_rouge_score_and_sacrebleu() -> None:
    scores = compare.score(ANSWERS, REFERENCES)
    scorer = RougeScorer(["rougeL"])
    pairs = zip(REFERENCES, ANSWERS, strict=True)
    rouge = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
    assert scores["rouge_l"] == pytest.approx(
        100 * sum(rouge) / len(rouge), rel=1e-5
    )  # torchmetrics counts in fp32
    bleu = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES])
    assert min(bleu.counts) > 0  # so that there is nothing to smooth
    assert scores["bleu"] == pytest.approx(bleu.score, rel=1e-5)
    few = ["the fox runs away"], ["the fox is away now"]
    assert (
        compare.score(*few)["bleu"]
        == sacrebleu.corpus_bleu(few[0], [few[1]], smooth_method="none").score
        == 0
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def find(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(folders: dict, tmp_path: Path, here, capsys) -> tuple[Path, dict, str]:
    """The folder written for three models, compare.json's content, and what was printed."""
    models = [folders[name] for name in ("base", "lora", "adapter")]
    compare.main(
        models, folders["records"], out_dir=tmp_path / "out", max_new_tokens=12, precision="32-true"
    )
    out = tmp_path / "out"
    return out, json.loads((out / "compare.json").read_text("utf-8")), capsys.readouterr().out


def test_the_page_loads_nothing_and_holds_all_texts_as_text(report: tuple) -> None:
    out, content, _ = report
    source = (out / "compare.html").read_text("utf-8")
    page = Page(source)
    head, body = (
        {"html", "head", "meta", "title", "style"},
        {"body", "main", "section", "div", "h1", "h2", "h3", "p", "em"},
    )
    assert {tag for tag, _ in page.tags} <= head | body | {
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    harmless = {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "dir",
        "role",
        "scope",
        "id",
    }
    named = {name for _, attributes in page.tags for name in attributes}
    assert named <= harmless | {
        "aria-labelledby",
        "data-label",
    }  # no src, no href, no style, no on...
    assert not re.search(r"url\(|@import|image-set", source)
    (policy,) = [meta["content"] for meta in page.find("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    assert page.find("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.find(
        "meta"
    )
    assert len(page.find("caption")) == 1
    assert [th["scope"] for th in page.find("th")] == ["col"] * 8 + ["row"] * 3
    assert "prefers-color-scheme: dark" in source
    for sample in content["samples"]:
        assert all(
            text in page.text
            for text in (sample["prompt"], sample["reference"], *sample["answers"].values())
        )
    assert all(page.text.count(model["name"]) == 1 + len(RECORDS) for model in content["models"])
    assert "<script>" in page.text  # as text


def test_table_markdown_and_page_hold_the_figures(report: tuple) -> None:
    out, content, printed = report
    lines = printed.splitlines()
    assert (
        re.sub(" +", " ", lines[0]) == "model template loss perplexity ROUGE-L BLEU tokens/s memory"
    )
    assert [model["template"] for model in content["models"]] == ["none", "alpaca", "chatml"]
    assert len({tuple(sample["answers"].values()) for sample in content["samples"]}) > 1
    markdown = (out / "compare.md").read_text("utf-8")
    page = Page((out / "compare.html").read_text("utf-8")).text
    for model, line in zip(content["models"], lines[1:4], strict=True):
        memory, units = (
            model["peak_memory_bytes"] / 1e9,
            [f"{model[key]:.1f}" for key in ("rouge_l", "bleu")],
        )
        figures = [
            f"{model['loss']:.4f}",
            f"{model['perplexity']:.2f}",
            *units,
            f"{model['tokens_per_second']:.1f}",
        ]
        cells = [model["name"], model["template"], *figures, f"{memory:.2f} GB"]
        assert re.split(" {2,}", line) == cells
        assert f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" in markdown
        assert "".join(cells) in page
    ends = {len(line) for line in lines[:4]}
    assert len(ends) == 1  # aligned
    assert "\n````\nShow\n```\ncode\n```\n````\n" in markdown
    scores = [
        compare.score(
            [sample["answers"][model["name"]] for sample in content["samples"]],
            [r["output"] for r in RECORDS],
        )
        for model in content["models"]
    ]
    assert scores == [
        {key: model[key] for key in ("rouge_l", "bleu")} for model in content["models"]
    ]


def test_a_model_whose_answers_end_at_once_has_no_speed() -> None:
    figures = dict(template="none", peak_memory_bytes=2.5e9)
    results = [
        dict(name="a", tokens_per_second=None) | figures,
        dict(name="b", tokens_per_second=12.0) | figures,
    ]
    assert compare.table(results)[1:] == [
        ["a", "none", "", "2.50 GB"],
        ["b", "none", "12.0", "2.50 GB"],
    ]


def test_nothing_is_written_where_something_fails(
    folders: dict, tmp_path: Path, here, monkeypatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/compare.html").write_text("old")
    (tmp_path / "out/notes.txt").write_text("mine")
    dumps = json.dumps  # the last of the three cannot be written
    monkeypatch.setattr(
        compare.json, "dumps", lambda *args, **settings: dumps(*args, **settings) + "\ud800"
    )
    with pytest.raises(UnicodeEncodeError):
        compare.main(
            [folders["base"]],
            prompt_file=folders["prompts"],
            out_dir=tmp_path / "out",
            max_new_tokens=2,
        )
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {
        "compare.html": "old",
        "notes.txt": "mine",
    }


def test_prompts_in_processes_of_their_own(folders: dict, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "evaluate/compare.py"),
        "--models",
        f"[{folders['base']}]",
    ]
    command += [
        "--prompt_file",
        str(folders["prompts"]),
        "--out_dir",
        str(tmp_path / "out"),
        "--max_new_tokens",
        "5",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split() == ["model", "template", "tokens/s", "memory"]
    content = json.loads((tmp_path / "out/compare.json").read_text("utf-8"))
    assert [sample["prompt"] for sample in content["samples"]] == ["the quick", "brown fox"]
    assert content["models"][0].keys() == {
        "name",
        "template",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert (
        "reference"
        not in Page((tmp_path / "out/compare.html").read_text("utf-8")).text.split("Sample 1")[1]
    )


BASE, SOURCE = "--models [{base}]", "--source {records}"
CASES = {
    "no model there": (
        f"--models [{{base}},{{records}}] {SOURCE}",
        r"records.json: no adapter_config.json",
        1,
    ),
    "no model": (f"--models [] {SOURCE}", r"--models \[\]: should name at least one", 2),
    "twice": (f"--models [{{base}},{{base}}] {SOURCE}", r"--models .*none twice", 2),
    "nothing to compare on": (BASE, r"--source, --data_dir, --prompt_file: give one", 2),
    "two things to compare on": (
        f"{BASE} {SOURCE} --prompt_file {{prompts}}",
        r"--source, --data_dir.*one of them",
        2,
    ),
    "a template for a prepared set": (
        f"{BASE} --data_dir {{data}} --template alpaca",
        r"--template: .*--source",
        2,
    ),
    "no samples": (f"{BASE} {SOURCE} --max_samples 0", r"--max_samples 0: should be", 2),
    "temperature below 0": (f"{BASE} {SOURCE} --temperature -1", r"--temperature", 2),
    "unknown precision": (f"{BASE} {SOURCE} --precision 16", r"--precision 16: should be", 2),
    "a file in the way": (
        f"{BASE} {SOURCE} --out_dir {{records}}",
        r"--out_dir .*records.json: is a file",
        2,
    ),
    "no file": (f"{BASE} --source {{base}}/none.json", r"none.json: cannot be read", 1),
    "no prompt file": (
        f"{BASE} --prompt_file {{base}}/none.txt",
        r"none.txt: cannot be read \(No such file",
        1,
    ),
    "no such column": (
        f"{BASE} {SOURCE} --columns.output answer",
        r"record 1: no column 'answer'",
        1,
    ),
    "no prepared set": (f"{BASE} --data_dir {{base}}", r"no tokenized dataset there", 1),
    "a template that the tokenizer lacks": (
        f"{BASE} {SOURCE} --template llama3",
        r"llama3.*needs.*<\|eot_id\|>",
        1,
    ),
    "unknown template": (f"{BASE} {SOURCE} --template vicuna", r"unknown template 'vicuna'", 1),
    "beyond the context": (
        f"{BASE} {SOURCE} --max_new_tokens 500",
        r"\d+ tokens, the context holds 512.*--max_new",
        1,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_mistake_is_one_line(
    folders: dict, tiny_data: Path, tmp_path: Path, here, monkeypatch, capsys, case
) -> None:
    flags, message, status = case
    flags = f"{flags.format(**folders, data=tiny_data)} --out_dir {tmp_path / 'out'}".split()
    if "--out_dir" in flags[:-2]:
        flags = flags[:-2]
    monkeypatch.setattr(sys, "argv", ["compare.py", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.run(compare.main)
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("precision ")]  # what was chosen
    assert ended.value.code == status, lines
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_not_told_from_responses(
    folders: dict, tiny_data: Path, tmp_path: Path
) -> None:
    for name in ("train.safetensors", "val.safetensors"):
        (tmp_path / name).write_bytes((tiny_data / name).read_bytes())
    meta = json.loads((tiny_data / "meta.json").read_text()) | {"mask_prompt": False}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        UserError, match=r"was prepared with --mask_prompt false. Give records with --source"
    ):
        measure(folders["base"], tmp_path)


def test_a_killed_process_is_one_line(monkeypatch) -> None:
    class Killed:
        def __init__(self, *_) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...

        def submit(self, *_):
            raise compare.BrokenProcessPool

    monkeypatch.setattr(compare, "ProcessPoolExecutor", Killed)
    with pytest.raises(UserError, match=r"out/full: its process was killed.*--batch_size"):
        compare.in_own_process(Path("out/full"))
