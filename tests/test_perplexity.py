"""evaluate/perplexity.py and scoring.py against `transformers`: sliding windows, losses."""

import math
import re
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script
from safetensors.torch import load_file
from scoring import log_likelihoods
from torch import Tensor
from transformers import LlamaForCausalLM

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.storage.methods import SaveInfo, save_methods

SMOLLM2 = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
perplexity = load_script("evaluate/perplexity.py")
TEXT = "the quick brown fox jumps over the lazy dog, and then né 🦙!\n" * 20


def figures(capsys, **flags) -> dict[str, float]:
    """What the script prints, in fp32."""
    capsys.readouterr()
    perplexity.main(precision="32-true", **flags)
    lines = re.findall(
        r"^(tokens|loss|perplexity|bits per byte) +([\d.,]+)", capsys.readouterr().out, re.MULTILINE
    )
    found = {name: float(value.replace(",", "")) for name, value in lines}
    assert found["perplexity"] == pytest.approx(
        math.exp(found["loss"]), rel=1e-4
    )  # four digits are printed
    return found


@torch.no_grad()
def sliding_window(
    model: torch.nn.Module, ids: list[int], window: int, stride: int
) -> tuple[int, float]:
    """Tokens and nats per token, by the guide of `transformers` on perplexity."""
    input_ids, nats, count, previous_end = torch.tensor([ids]), 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = input_ids[:, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - previous_end)] = -100
        scored = int((labels[:, 1:] != -100).sum())  # the first one of a window is never predicted
        nats += model(inputs, labels=labels).loss.item() * scored
        count, previous_end = count + scored, end
        if end == len(ids):
            break
    return count, nats / count


@torch.no_grad()
def response_loss(model: torch.nn.Module, samples: list[tuple[Tensor, int]]) -> tuple[int, float]:
    """Tokens and nats per token over what follows the prompts."""
    nats, count = 0.0, 0
    for ids, prompt_length in samples:
        labels = ids.long().clone()
        labels[:prompt_length] = -100
        scored = int((labels[1:] != -100).sum())
        if scored:
            nats += model(ids.long()[None], labels=labels[None]).loss.item() * scored
        count += scored
    return count, nats / count


def hugging_face(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prepared_samples(folder: Path, name: str) -> list[tuple[Tensor, int]]:
    tensors = load_file(folder / f"{name}.safetensors")
    parts = tensors["tokens"].split(tensors["offsets"].diff().tolist())
    firsts = (tensors["offsets"].diff() - tensors["label_counts"]).tolist()
    return list(zip(parts, firsts, strict=True))


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (64, 63), (100, 7), (512, 256)])
def test_a_texts_loss_is_that_of_transformers_recipe(
    tmp_path: Path, tiny_checkpoint: Path, capsys, window: int, stride: int
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    flags = dict(
        checkpoint_dir=tiny_checkpoint, source=tmp_path / "text.txt", window=window, stride=stride
    )
    count, loss = sliding_window(
        hugging_face(tiny_checkpoint), Tokenizer(tiny_checkpoint).encode(TEXT), window, stride
    )
    for batch_tokens in (1, 300):
        found = figures(capsys, batch_tokens=batch_tokens, **flags)
        assert found["tokens"] == count
        assert found["loss"] == pytest.approx(loss, rel=1e-3)
        bits = loss * count / math.log(2) / len(TEXT.encode("utf-8"))
        assert found["bits per byte"] == pytest.approx(bits, rel=1e-3)


def test_smollm2s_loss_on_a_real_text_is_that_of_transformers_recipe(
    tmp_path: Path, capsys
) -> None:
    if not (SMOLLM2 / "model.safetensors").is_file():
        pytest.skip("no SmolLM2-135M-Instruct in checkpoints/")
    tokenizer = Tokenizer(SMOLLM2)
    text = "\n\n".join(file.read_text("utf-8") for file in sorted((ROOT / "howto").glob("*.md")))
    text = tokenizer.decode(tokenizer.encode(text)[:5_100])
    (tmp_path / "text.txt").write_text(text, "utf-8")
    found = figures(
        capsys, checkpoint_dir=SMOLLM2, source=tmp_path / "text.txt", window=256, stride=240
    )
    count, loss = sliding_window(hugging_face(SMOLLM2), tokenizer.encode(text), 256, 240)
    assert found["tokens"] == count >= 5_000
    assert found["loss"] == pytest.approx(loss, rel=1e-3)


def test_windows_score_each_token_once_with_all_the_context_there_is() -> None:
    ids = list(range(1000))
    for window, stride in ((10, 1), (10, 9), (300, 150), (1000, 500), (2000, 1)):
        windows = list(perplexity.windows(ids, window, stride))
        assert [token for part, first in windows for token in part[first:]] == ids[1:]
        assert all(first >= window - stride for _, first in windows[1:])
        assert max(len(part) for part, _ in windows) <= window


def test_a_prepared_sets_loss_is_that_of_transformers_on_responses(
    tiny_checkpoint: Path, tiny_data: Path, capsys
) -> None:
    count, loss = response_loss(hugging_face(tiny_checkpoint), prepared_samples(tiny_data, "val"))
    found = figures(capsys, checkpoint_dir=tiny_checkpoint, data_dir=tiny_data)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("longest", [400, 150])
def test_records_give_the_loss_of_the_set_that_is_prepared_from_them(
    tmp_path: Path, tiny_checkpoint: Path, records_file: Path, capsys, longest: int
) -> None:
    flags = dict(val_size=0, max_seq_length=longest, template="alpaca")
    load_script("scripts/prepare_json.py").main(
        records_file, tiny_checkpoint, tmp_path / "all", **flags
    )
    count, loss = response_loss(
        hugging_face(tiny_checkpoint), prepared_samples(tmp_path / "all", "train")
    )
    flags = dict(
        checkpoint_dir=tiny_checkpoint, source=records_file, template="alpaca", window=longest
    )
    found = figures(capsys, **flags)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(loss, rel=1e-3)
    perplexity.main(**flags)
    assert ("answers cut" in capsys.readouterr().out) == (longest == 150)


def randomized(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, a method's drawn anew: at first it changes nothing."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return dict(model.named_parameters())


def test_a_lora_is_evaluated_as_peft_has_it(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, capsys
) -> None:
    model, config = load_model(tiny_checkpoint, dtype=torch.float32), LoRAConfig()
    apply_lora(model, config)
    save_lora(
        randomized(model),
        tmp_path / "lora",
        config,
        base_model=str(tiny_checkpoint),
        template="alpaca",
    )
    theirs = peft.PeftModel.from_pretrained(hugging_face(tiny_checkpoint), tmp_path / "lora")
    _, loss = response_loss(theirs, prepared_samples(tiny_data, "val"))
    assert figures(capsys, lora_path=tmp_path / "lora", data_dir=tiny_data)[
        "loss"
    ] == pytest.approx(loss, rel=1e-3)
    base = figures(capsys, checkpoint_dir=tiny_checkpoint, data_dir=tiny_data)["loss"]
    assert base != pytest.approx(loss, rel=1e-2)


@torch.no_grad()
def test_an_adapter_is_evaluated_with_what_it_learned(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, capsys
) -> None:
    model, config = load_model(tiny_checkpoint, dtype=torch.float32), AdapterConfig(start_layer=1)
    apply_adapter(model, config)
    info = SaveInfo(model, str(tiny_checkpoint), "alpaca")
    methods = {"llama_adapter": config}
    save_methods(tmp_path / "adapter", randomized(model).items(), methods, info)
    nats, count = 0.0, 0
    for ids, first in prepared_samples(tiny_data, "val"):
        nats += F.cross_entropy(
            model(ids[:-1].long())[first - 1 :], ids[first:].long(), reduction="sum"
        ).item()
        count += len(ids) - first
    found = figures(capsys, adapter_path=tmp_path / "adapter", data_dir=tiny_data)["loss"]
    assert found == pytest.approx(nats / count, rel=1e-3)
    assert found != pytest.approx(
        figures(capsys, checkpoint_dir=tiny_checkpoint, data_dir=tiny_data)["loss"], rel=1e-3
    )


@torch.no_grad()
def test_log_likelihoods_are_those_of_transformers(tiny_checkpoint: Path) -> None:
    theirs, model = hugging_face(tiny_checkpoint), load_model(tiny_checkpoint, dtype=torch.float32)
    drawn = torch.randint(3, 300, (6, 20), generator=torch.Generator().manual_seed(0)).tolist()
    likely = int(theirs(torch.tensor([drawn[0][:9]])).logits[0, -1].argmax())
    samples = [(ids[: 2 + 3 * number], 1 + 2 * number) for number, ids in enumerate(drawn)]
    samples += [
        ([*drawn[0][:9], last], 9) for last in (5, 6, likely)
    ]  # the same but for the last token
    samples += [
        ([*drawn[0][:9], likely], 4),
        (drawn[1][:5], 5),
        ([7], 1),
    ]  # and two with nothing to score
    for batch_tokens in (1, 25, 1000):
        for (ids, first), (likelihood, greedy) in zip(
            samples, log_likelihoods(model, samples, batch_tokens), strict=True
        ):
            scores = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)[first - 1 : -1]
            labels = torch.tensor(ids[first:], dtype=torch.long)
            assert likelihood == pytest.approx(
                scores.gather(1, labels[:, None]).sum().item(), abs=1e-3
            )
            assert greedy == (scores.argmax(-1) == labels).all()
    assert [greedy for _, greedy in log_likelihoods(model, samples, 100)[6:9]] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"--source, --data_dir: give one"),
        ({"source": "text.txt", "data_dir": "data"}, r"--source, --data_dir: give one"),
        (
            {"source": "text.txt", "checkpoint_dir": None},
            r"--checkpoint_dir, --lora_path, --adapter_path: pass one",
        ),
        (
            {"source": "text.txt", "lora_path": "a", "adapter_path": "b"},
            r"--adapter_path: pass only one of the last two",
        ),
        (
            {"source": "text.txt", "lora_path": "none"},
            r"none: no adapter_config.json",
        ),
        ({"source": "text.txt", "window": 513}, r"--window 513.*context of 512"),
        ({"source": "text.txt", "window": 8, "stride": 8}, r"--stride 8.*below --window"),
        ({"source": "text.txt", "precision": "fp8"}, r"--precision fp8: unknown"),
        ({"source": "empty.txt"}, r"empty.txt: nothing to predict"),
        ({"source": "latin1.txt"}, r"latin1.txt: not UTF-8 \(byte 1\)"),
        ({"source": "records.json", "template": "vicuna"}, r"unknown template 'vicuna'"),
        (
            {"source": "records.json", "columns": perplexity.Columns("q")},
            r"record 1: no column 'q'",
        ),
        ({"data_dir": "none"}, r"none: no tokenized dataset"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch,
    tiny_checkpoint: Path,
    records_file: Path,
    flags: dict,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, "utf-8")
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes(b"n\xe9")
    Path("records.json").write_bytes(records_file.read_bytes())
    paths = {
        name: Path(value)
        for name, value in flags.items()
        if name.endswith(("source", "_dir", "_path")) and value
    }
    with pytest.raises(UserError, match=message) as error:
        perplexity.main(**({"checkpoint_dir": tiny_checkpoint} | flags | paths))
    assert "\n" not in str(error.value)
