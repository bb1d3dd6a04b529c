"""evaluate/harness.py against lm-eval's own `hf` model, on tasks made of local files."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import load_script, save_checkpoint_folder
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from lit_llama import Tokenizer, UserError, load_model

lm_eval = pytest.importorskip("lm_eval")

import torch  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from lit_llama.lora import LoRAConfig, apply_lora, save_lora  # noqa: E402

harness = load_script("evaluate/harness.py")

CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWER = """
task: local_answer
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: "{{choices[label]}}"
generation_kwargs:
  until: ["q", "ov"]
  max_gen_toks: 16
metric_list:
  - metric: exact_match
"""
TEXT = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: bits_per_byte
  - metric: word_perplexity
"""
TASKS = ["local_choice", "local_answer", "local_text"]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over the same questions: letters, longer answers, a text beyond the context."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog,", "né", "🦙"]
    questions = [" ".join((words * 60)[n : n + 3 + 5 * n]) for n in range(11)]
    questions[7] = " ".join(words * 60)
    choices = [["A", "B", "C", "D"] if n % 2 else words[n % 3 : n % 3 + 4] for n in range(11)]
    records = [
        {"question": question, "choices": own, "label": n % 4}
        for n, (question, own) in enumerate(zip(questions, choices, strict=True))
    ]
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), "utf-8"
    )
    for name, text in zip(TASKS, (CHOICE, ANSWER, TEXT), strict=True):
        source = {
            "data_files": {"test": str(folder / "questions.jsonl")},
            "cache_dir": str(folder / "cache"),
        }
        head = f"dataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + text, "utf-8")
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["with BOS", "without BOS"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model whose tokenizer puts BOS in front, for `transformers` too, or does not."""
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint_folder(folder, num_key_value_heads=2)
    if request.param:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", 1)]
        )
        backend.save(str(folder / "tokenizer.json"))
    turns = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    template = f"{{{{ bos_token }}}}{turns}<|im_start|>"
    options = dict(
        bos_token="<s>", eos_token="</s>", add_bos_token=request.param, chat_template=template
    )
    options["tokenizer_class"] = (
        "PreTrainedTokenizerFast"  # else transformers 5.0 makes another one of tokenizer.json
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def evaluate(model: lm_eval.api.model.LM, task_folder: Path, **flags) -> dict:
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **flags
    )


def ours(checkpoint: Path, batch_tokens: int) -> "harness.LitLLaMA":
    model = load_model(checkpoint, dtype=torch.float32)
    return harness.LitLLaMA(model, Tokenizer(checkpoint), "chat", batch_tokens)


@pytest.mark.parametrize(
    ("batch_tokens", "flags"),
    [(40, {}), (2000, {"num_fewshot": 1}), (300, {"apply_chat_template": True})],
    ids=str,
)
def test_answers_and_figures_are_those_of_hf(
    checkpoint: Path, task_folder: Path, batch_tokens: int, flags: dict
) -> None:
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=4)
    expected = evaluate(theirs, task_folder, **flags)
    found = evaluate(ours(checkpoint, batch_tokens), task_folder, **flags)
    for task in TASKS:
        responses = [
            [
                sample["resps"]
                for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
            ]
            for result in (found, expected)
        ]
        if task == "local_answer":
            assert responses[0] == responses[1]
            texts = [text for ((text,),) in responses[0]]
            assert len(set(texts)) > 5
            assert not any(stop in text for text in texts for stop in ("q", "ov"))
        elif task == "local_text":
            assert responses[0] == [
                [[pytest.approx(value, abs=1e-3)]] for ((value,),) in responses[1]
            ]
        else:
            for own, other in zip(*responses, strict=True):
                assert own == [
                    [(pytest.approx(value, abs=1e-4), greedy)] for ((value, greedy),) in other
                ]
        values, others = (
            {
                name: value
                for name, value in result["results"][task].items()
                if isinstance(value, float)
            }
            for result in (found, expected)
        )
        assert values == pytest.approx(others, rel=1e-4)


def test_the_script_prints_lm_evals_table(
    tmp_path: Path, tiny_checkpoint: Path, task_folder: Path, capsys
) -> None:
    flags = dict(tasks=["local_ch*", "local_text"], include_path=task_folder, precision="32-true")
    harness.main(
        checkpoint_dir=tiny_checkpoint, limit=4, out_file=tmp_path / "results.json", **flags
    )
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["n-samples"]["local_choice"] == {"original": 11, "effective": 4}
    for task, metric in (
        ("local_choice", "acc"),
        ("local_choice", "acc_norm"),
        ("local_text", "bits_per_byte"),
    ):
        assert f"{results['results'][task][f'{metric},none']:.4f}" in printed
    model, config = load_model(tiny_checkpoint, dtype=torch.float32), LoRAConfig()
    apply_lora(model, config)
    save_lora(
        dict(model.named_parameters()), tmp_path / "lora", config, str(tiny_checkpoint), "alpaca"
    )
    harness.main(lora_path=tmp_path / "lora", limit=4, **flags)
    assert capsys.readouterr().out == printed  # an untrained LoRA changes nothing


def test_an_answer_is_put_into_the_template_of_the_training(tiny_checkpoint: Path) -> None:
    model = harness.LitLLaMA(load_model(tiny_checkpoint), Tokenizer(tiny_checkpoint), "alpaca", 100)
    turns = [{"role": "user", "content": "Why?"}]
    prompt = model.apply_chat_template(turns)
    assert prompt.endswith("### Instruction:\nWhy?\n\n### Response:")
    begun = [*turns, {"role": "assistant", "content": "Because"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == f"{prompt}Because"
    with pytest.raises(UserError, match="template 'alpaca' holds a single instruction"):
        model.apply_chat_template([{"role": "system", "content": "Be kind."}, *turns])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"tasks": ["no_such_task"]},
            r"--tasks no_such_task: no task is called that.*--include_path",
        ),
        ({"tasks": []}, r"--tasks: name at least one"),
        ({"template": "alpaca"}, r"--template alpaca: .*--apply_chat_template"),
        ({"template": "vicuna", "apply_chat_template": True}, r"unknown template 'vicuna'"),
        ({"out_file": "there.json"}, r"--out_file there.json: exists already"),
        ({"include_path": "none"}, r"--include_path none: is no folder"),
        ({"lora_path": "none"}, r"none: no adapter_config.json"),
        ({"gone": True}, r"--tasks: what a task needs is not here .*questions.jsonl"),
        ({"ask": "num_beams: 4"}, r"generation_kwargs ask for \['num_beams'\]"),
        (
            {"ask": "max_gen_toks: 512"},
            r"a task asks for 512 new tokens, the model's context holds 512",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch, tiny_checkpoint: Path, task_folder: Path, flags: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").touch()
    monkeypatch.setattr(TaskManager, "__init__", own_tasks_only(TaskManager.__init__))
    shutil.copytree(task_folder, "tasks")
    answer = Path("tasks/local_answer.yaml")
    if "ask" in flags:
        answer.write_text(
            answer.read_text("utf-8").replace("max_gen_toks: 16", flags["ask"]), "utf-8"
        )
    if "gone" in flags:
        answer.write_text(answer.read_text("utf-8").replace(str(task_folder), "gone"), "utf-8")
    given = {name: value for name, value in flags.items() if name not in ("ask", "gone")}
    paths = {
        name: Path(value)
        for name, value in given.items()
        if name in ("out_file", "include_path", "lora_path")
    }
    defaults = dict(
        tasks=["local_answer"], checkpoint_dir=tiny_checkpoint, include_path=Path("tasks"), limit=1
    )
    with pytest.raises(UserError, match=message) as error:
        harness.main(**(defaults | given | paths))
    assert "\n" not in str(error.value)
    assert not Path("there.json").read_bytes()


def own_tasks_only(init):
    """lm-eval's own tasks take a quarter of a minute to read."""
    return lambda self, include_path=None, include_defaults=True: init(
        self, include_path=include_path, include_defaults=False
    )


def test_without_lm_eval_a_line_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr(harness, "TemplateLM", object)
    with pytest.raises(
        UserError, match=r"lm-eval is not installed: pip install -c constraints.txt -e '\.\[eval\]'"
    ):
        harness.main(tasks=["arc_easy"])
