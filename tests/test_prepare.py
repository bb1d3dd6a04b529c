"""Tokenized datasets: labels, truncation, sources of records; and what training reads back."""

import csv
import hashlib
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, save_checkpoint_folder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from transformers import LlamaForCausalLM

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.data import TokenizedDataset, pack_micro_batches, sample_indices, split_across_ranks
from lit_llama.prompts import TEMPLATES, encode_prompt
from lit_llama.storage.datasets import load_dataset
from lit_llama.storage.files import read_tensors

prepare_json = load_script("scripts/prepare_json.py")
RECORDS = [
    {
        "instruction": f"Count to {n}.",
        "input": "slowly" if n % 2 else "",
        "output": "one two three " * n,
    }
    for n in range(1, 21)
]


def write(path: Path, records: list) -> Path:
    path.write_text(json.dumps(records), "utf-8")
    return path


def read(file: Path) -> TokenizedDataset:
    return TokenizedDataset(read_tensors(file)[0])


def samples(file: Path) -> list[tuple[list[int], list[int]]]:
    """(tokens, learned tokens) of each sample, by way of the micro-batches that training sees."""
    data = read(file)
    result = []
    for index in range(len(data)):
        batch = data.micro_batch([index], torch.device("cpu"))
        successors = torch.cat((batch["input_ids"][1:], batch["labels"][-1:]))  # of each token
        assert successors[batch["label_positions"]].tolist() == batch["labels"].tolist()
        result.append(
            ([*batch["input_ids"].tolist(), int(batch["labels"][-1])], batch["labels"].tolist())
        )
    return result


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_labels_are_response_and_end_token(
    tmp_path: Path, tiny_checkpoint: Path, mask_prompt: bool
) -> None:
    source = write(tmp_path / "source.json", RECORDS)
    out = tmp_path / "out"
    prepare_json.main(
        source, tiny_checkpoint, out, val_size=0, max_seq_length=500, mask_prompt=mask_prompt
    )
    tokenizer = Tokenizer(tiny_checkpoint)
    expected = []
    for record in RECORDS:
        user = {"role": "user", "content": record["instruction"], "input": record["input"]}
        prompt = [
            tokenizer.bos_id,
            *tokenizer.encode(TEMPLATES["alpaca"].render([user]), bos=False),
        ]
        response = [*tokenizer.encode(record["output"], bos=False), tokenizer.eos_id]
        expected.append((prompt + response, response if mask_prompt else (prompt + response)[1:]))
    assert samples(out / "train.safetensors") == expected


def test_long_samples_are_cut_and_hopeless_ones_dropped(
    tmp_path: Path, tiny_checkpoint: Path, capsys
) -> None:
    records = [*RECORDS, {"instruction": "Why? " * 300, "output": "So."}]
    out = tmp_path / "out"
    prepare_json.main(
        write(tmp_path / "s.json", records), tiny_checkpoint, out, val_size=0, max_seq_length=256
    )
    meta = json.loads((out / "meta.json").read_text())
    lengths = read(out / "train.safetensors").lengths
    assert max(lengths) == 256
    assert meta["dropped_records"] == 1
    assert meta["cut_samples"] >= lengths.count(256) - 1 > 0
    assert meta["train_samples"] == len(lengths) == 20
    assert meta["train_tokens"] == sum(lengths)
    out = capsys.readouterr().out
    assert f"{meta['cut_samples']} of 21 records: cut at --max_seq_length 256 tokens (re" in out
    assert "1 of 21 records: not learned, its prompt leaves no room for an answer" in out
    assert "Raise --max_seq_length 256 (record 21)" in out


def test_split_follows_the_seed_and_loses_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write(tmp_path / "s.json", RECORDS)
    sets = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_json.main(
            source, tiny_checkpoint, tmp_path / name, val_size=6, max_seq_length=512, seed=seed
        )
        parts = [samples(tmp_path / name / f"{part}.safetensors") for part in ("train", "val")]
        assert [len(part) for part in parts] == [14, 6]
        sets[name] = [{tuple(tokens) for tokens, _ in part} for part in parts]
        assert len(sets[name][0] | sets[name][1]) == 20
    assert sets["a"] == sets["b"] != sets["c"]
    assert (tmp_path / "a/train.safetensors").read_bytes() == (
        tmp_path / "b/train.safetensors"
    ).read_bytes()


def test_json_jsonl_and_csv_with_named_columns_are_the_same(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    named = [
        {"q": r["instruction"] + '\n"so", he said', "context": r["input"], "a": r["output"]}
        for r in RECORDS
    ]
    write(tmp_path / "s.json", named)
    (tmp_path / "s.jsonl").write_text(
        "\n".join(json.dumps(record) for record in named) + "\n\n", "utf-8"
    )
    with (tmp_path / "s.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["q", "context", "a"])
        writer.writeheader()
        writer.writerows(named)
    columns = prepare_json.Columns(instruction="q", input="context", output="a")
    results = []
    for kind in ("json", "jsonl", "csv"):
        source, out = tmp_path / f"s.{kind}", tmp_path / kind
        prepare_json.main(
            source, tiny_checkpoint, out, val_size=3, max_seq_length=512, columns=columns
        )
        results.append((out / "train.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


def test_a_conversation_is_one_sample(tmp_path: Path, tiny_checkpoint: Path) -> None:
    turns = [
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Hi!"),
        ("user", "Bye"),
        ("assistant", "See you!"),
    ]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    source = write(tmp_path / "s.json", [record])
    prepare_json.main(source, tiny_checkpoint, tmp_path / "out", val_size=0, template="chatml")
    tokenizer = Tokenizer(tiny_checkpoint)
    ((tokens, labels),) = samples(tmp_path / "out/train.safetensors")
    text = "system\nBe kind.\nuser\nHello\nassistant\nHi!\nuser\nBye\nassistant\nSee you!"
    assert tokenizer.decode(tokens) == text
    end = tokenizer.specials["<|im_end|>"]
    answers = [tokenizer.encode(answer, bos=False) for answer in ("Hi!", "See you!")]
    assert labels == [*answers[0], end, *answers[1], end]


def old_samples(messages: list, tokenizer: Tokenizer) -> list[tuple[list[int], int]]:
    """One sample for each answer, as version 1.4.0 made them: ids, tokens of the prompt."""
    found = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(TEMPLATES["chatml"], tokenizer, messages[:turn])
            answer = tokenizer.encode(message["content"], bos=False)
            found.append(([*prompt, *answer, tokenizer.specials["<|im_end|>"]], len(prompt)))
    return found


def test_ten_answers_in_one_sample_have_the_loss_of_ten_samples(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    words = ["the lazy dog", "a quick fox", "jumps over", "and then the other one"]
    messages = []
    for n in range(10):
        messages.append({"role": "user", "content": f"{words[n % 4]} {n}?"})
        messages.append({"role": "assistant", "content": f"{words[n % 3]}, {n * n} times."})
    source = write(tmp_path / "s.json", [{"messages": messages}])
    flags = dict(val_size=0, template="chatml", max_seq_length=512)
    prepare_json.main(source, tiny_checkpoint, tmp_path / "out", **flags)
    data = read(tmp_path / "out/train.safetensors")
    assert len(data) == 1
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    loss = float(model(**data.micro_batch([0], torch.device("cpu"))))
    theirs = LlamaForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected, labels, tokens = 0.0, 0, 0
    for ids, prompt_length in old_samples(messages, Tokenizer(tiny_checkpoint)):
        batch = torch.tensor([ids])
        targets = batch.clone()
        targets[:, :prompt_length] = -100
        count = len(ids) - prompt_length
        expected += float(theirs(batch, labels=targets).loss) * count
        labels, tokens = labels + count, tokens + len(ids)
    assert data.label_counts == [labels]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert data.lengths[0] <= tokens / 4


def test_dolly_has_its_own_field_names(tmp_path: Path, tiny_checkpoint: Path) -> None:
    lines = [
        json.dumps(
            {"instruction": r["instruction"], "context": r["input"], "response": r["output"]}
        )
        for r in RECORDS
    ]
    (tmp_path / "dolly.jsonl").write_text("\n".join(lines))
    flags = dict(val_size=5, max_seq_length=512)
    load_script("scripts/prepare_dolly.py").main(
        tmp_path / "dolly.jsonl", tiny_checkpoint, tmp_path / "dolly", **flags
    )
    prepare_json.main(
        write(tmp_path / "s.json", RECORDS), tiny_checkpoint, tmp_path / "json", **flags
    )
    assert (tmp_path / "dolly/val.safetensors").read_bytes() == (
        tmp_path / "json/val.safetensors"
    ).read_bytes()


class Server(http.server.BaseHTTPRequestHandler):
    body, announced, requests = b"", None, 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(self.announced or len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        Server.announced, Server.requests = None, 0
        yield f"http://127.0.0.1:{httpd.server_port}/data.json"
        httpd.shutdown()


def test_alpaca_is_downloaded_once_and_counted(
    tmp_path: Path, tiny_checkpoint: Path, server, monkeypatch
) -> None:
    script = load_script("scripts/prepare_alpaca.py")
    assert script.NUM_RECORDS == 51_759
    monkeypatch.setattr(script, "URL", server)
    monkeypatch.setattr(script, "NUM_RECORDS", 20)
    Server.body = json.dumps(RECORDS).encode()
    for name in ("first", "second"):
        script.main(checkpoint_dir=tiny_checkpoint, data_dir=tmp_path / name, val_size=4)
    assert Server.requests == 1
    assert len(read(tmp_path / "second/train.safetensors")) == 16
    monkeypatch.setattr(script, "NUM_RECORDS", 21)
    with pytest.raises(UserError, match="holds 20 records instead of 21"):
        script.main(checkpoint_dir=tiny_checkpoint, data_dir=tmp_path / "third", val_size=4)


@pytest.mark.parametrize("script", ["prepare_alpaca", "prepare_json"])
def test_a_tenth_is_held_out_and_at_most_2000(
    tmp_path: Path, tiny_checkpoint: Path, capsys, script: str
) -> None:
    main = load_script(f"scripts/{script}.py").main
    for count, expected in ((9, 0), (25, 2), (21_000, 2000)):
        records = [{"instruction": "a", "output": "b"}] * count
        main(write(tmp_path / "s.json", records), tiny_checkpoint, tmp_path / "out")
        meta = json.loads((tmp_path / "out/meta.json").read_text())
        assert (meta["train_samples"], meta["val_samples"]) == (count - expected, expected)
    assert capsys.readouterr().err == ""
    main(write(tmp_path / "s.json", RECORDS), tiny_checkpoint, tmp_path / "out", val_size=15)
    assert "warning: more samples to validate than to train" in capsys.readouterr().err


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, server) -> None:
    Server.body, Server.announced = b"[1, 2", 1000
    with pytest.raises(UserError, match=r"5 of 1000 bytes|cannot be downloaded"):
        prepare_json.fetch(server, tmp_path / "data.json")
    assert not list(tmp_path.iterdir())


def test_no_connection_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be downloaded .*--source"):
        prepare_json.fetch("http://127.0.0.1:9/data.json", tmp_path / "data.json")


def test_micro_batches_hold_every_sample_once_within_the_limit() -> None:
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    lengths[7] = 900  # longer than a micro-batch
    bins = pack_micro_batches(range(200), lengths, 512)
    assert sorted(index for ids in bins for index in ids) == list(range(200))
    assert all(sum(lengths[index] for index in ids) <= 512 for ids in bins if ids != [7])
    assert [7] in bins
    # first-fit decreasing needs at most 11/9 of the best (Johnson 1973), which is at least this
    assert len(bins) <= 11 / 9 * (sum(lengths) / 512) + 2


def test_epochs_are_permutations_and_steps_cut_them() -> None:
    positions = [range(first, min(first + 16, 150)) for first in range(0, 150, 16)]
    steps = [sample_indices(part, 50, seed=3) for part in positions]
    assert [len(step) for step in steps] == [16] * 9 + [6]
    flat = [index for step in steps for index in step]
    epochs = [flat[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sample_indices(positions[4], 50, seed=3) == steps[4]
    assert sample_indices(positions[4], 50, seed=4) != steps[4]


def test_ranks_get_equally_many_micro_batches() -> None:
    parts = [split_across_ranks([[1], [2], [3], [4]], rank, 3) for rank in range(3)]
    assert parts == [[[1], [4]], [[2], []], [[3], []]]
    tensors = dict(tokens=torch.zeros(0), is_label=torch.zeros(0), label_counts=torch.zeros(0))
    tensors["offsets"] = torch.zeros(1)
    batch = TokenizedDataset(tensors).micro_batch([], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [0]
    assert batch["lengths"] == [1]
    assert batch["labels"].tolist() == batch["label_positions"].tolist() == []


def write_dataset(folder: Path, checkpoint: Path) -> Path:
    source = write(folder / "s.json", RECORDS)
    prepare_json.main(source, checkpoint, folder / "data", val_size=4, max_seq_length=256)
    return folder / "data"


def test_load_dataset(tmp_path: Path, tiny_checkpoint: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path, tiny_checkpoint), tiny_checkpoint)
    assert (len(dataset.train), len(dataset.val), dataset.template) == (16, 4, "alpaca")
    assert dataset.meta["max_seq_length"] == max(dataset.train.lengths) == 256
    content = (tmp_path / "data/meta.json").read_bytes()
    assert dataset.sha256 == hashlib.sha256(content).hexdigest()


def test_unusable_datasets_are_one_line(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenized dataset there.*prepare_alpaca.py"):
        load_dataset(tmp_path, tiny_checkpoint)
    data = write_dataset(tmp_path, tiny_checkpoint)
    save_checkpoint_folder(tmp_path / "short", max_position_embeddings=64)
    with pytest.raises(UserError, match=r"sample of 256 tokens, the model's context holds 64"):
        load_dataset(data, tmp_path / "short")
    save_checkpoint_folder(tmp_path / "other")
    tokenizer = tmp_path / "other/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(UserError, match=r"prepared with another tokenizer"):
        load_dataset(data, tmp_path / "other")
    flipped = bytearray((data / "val.safetensors").read_bytes())
    flipped[-1] ^= 1
    (data / "val.safetensors").write_bytes(flipped)
    with pytest.raises(UserError, match=r"val.safetensors.*Prepare it again"):
        load_dataset(data, tiny_checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"holds no records"),
        ("a.json", '[{"a": 1},\n{"b" 2}]', r"a.json, line 2: malformed"),
        ("a.json", '[{"a": 1},\n', r"a.json, line 2: malformed"),
        ("a.jsonl", '{"a": 1}\n\n{"a"\n', r"a.jsonl, line 4: malformed"),
        ("a.jsonl", "\n", r"holds no records"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv, line 3: .*Quote fields with a comma"),
        ("a.csv", "a,b\n1\n", r"a.csv, line 2: .*Quote fields with a comma"),
        ("a.csv", 'a,b\n1,2\n"1,2\n', r"a.csv, line 3: malformed"),
        ("a.txt", "a", r"a.txt, line 1: malformed"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(prepare_json.read_records(tmp_path / name))


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output\nf\u00fcnf,5\n", "latin-1")
    with pytest.raises(UserError, match=r"a.csv: not UTF-8"):
        list(prepare_json.read_records(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "a", "output": "b"},
            r"s.json, record 1: no column 'instruction', found: question",
        ),
        ({"instruction": "a"}, r"no column 'output'"),
        ({"instruction": "a", "output": 3}, r"record 1: output is 3, expected text"),
        ("a", r"record 1: is \"a\", expected an object"),
        ({"instruction": "half a \ud83d", "output": "b"}, r"instruction is .*valid Unicode"),
    ],
)
def test_records_with_mistakes(tmp_path: Path, tiny_checkpoint: Path, record, message: str) -> None:
    source = write(tmp_path / "s.json", [record])
    with pytest.raises(UserError, match=message):
        prepare_json.main(source, tiny_checkpoint, tmp_path / "out", val_size=0)
    assert not (tmp_path / "out").exists()


def test_other_files_in_the_data_dir_are_never_lost(tmp_path: Path, tiny_checkpoint: Path) -> None:
    data = write_dataset(tmp_path, tiny_checkpoint)
    write_dataset(tmp_path, tiny_checkpoint)  # a dataset alone is replaced
    (data / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists already, and holds notes.txt"):
        write_dataset(tmp_path, tiny_checkpoint)
    assert (data / "notes.txt").read_text() == "mine"


def test_only_line_ends_end_a_row_of_a_csv(tmp_path: Path) -> None:
    file = tmp_path / "s.csv"
    file.write_text(
        'instruction,output\nfirst,one\u2028still\x0bone\r\n"se\ncond",two\n', "utf-8", newline=""
    )
    assert [record for _, record in prepare_json.read_records(file)] == [
        {"instruction": "first", "output": "one\u2028still\x0bone"},
        {"instruction": "se\ncond", "output": "two"},
    ]


def test_what_is_not_used_is_named_once(tmp_path: Path, tiny_checkpoint: Path, capsys) -> None:
    turns = [
        {"role": "user", "content": "hi", "name": None, "speaker": "Bo"},
        {"role": "assistant", "content": "yo", "weight": 1},
    ]
    source = write(tmp_path / "s.json", [{"messages": turns, "id": n} for n in range(3)])
    prepare_json.main(source, tiny_checkpoint, tmp_path / "out", val_size=0, template="chatml")
    error = capsys.readouterr().err
    assert error.count("warning: columns that are not used: id, messages.speaker.") == 1
    assert error.count("warning") == 1
    assert len(read(tmp_path / "out/train.safetensors")) == 3


def test_what_cannot_be_learned_is_counted_with_its_reason(
    tmp_path: Path, tiny_checkpoint: Path, capsys
) -> None:
    question = {"role": "user", "content": "a"}
    talk = [question, {"role": "assistant", "content": "b"}]
    records = [
        *({"messages": turns} for turns in (talk, [question], talk)),
        {"instruction": "a", "output": None},
        {"instruction": "a", "output": " "},
        {"messages": [*talk, question, {"role": "assistant", "content": ""}]},
        {"messages": []},
        {"messages": None},
        {"instruction": " ", "input": None, "output": "a"},
    ]
    source = write(tmp_path / "s.json", records)
    prepare_json.main(source, tiny_checkpoint, tmp_path / "out", val_size=0, template="chatml")
    out = capsys.readouterr().out
    assert "1 of 9 records: has an empty question (record 9)" in out
    out = out.replace("of 9", "of 8")
    assert "out: 4 samples to train, 0 to validate, template chatml" in out
    assert "2 of 8 records: not learned, the conversation is empty (record 7, 8)" in out
    assert "1 of 8 records: not learned, there is no answer to learn (record 2)" in out
    assert "2 of 8 records: not learned, the answer is empty (record 4, 5)" in out
    assert "1 of 8 records: has an empty answer, which is not learned (record 6)" in out
    assert json.loads((tmp_path / "out/meta.json").read_text())["dropped_records"] == 5


def test_what_must_not_be_learned_is_no_label_without_a_mask_either(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    question, bad, good = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c"},
    )
    source = write(tmp_path / "s.json", [{"messages": [question, bad, question, good]}])
    flags = dict(val_size=0, template="chatml", mask_prompt=False)
    prepare_json.main(source, tiny_checkpoint, tmp_path / "out", **flags)
    tokenizer = Tokenizer(tiny_checkpoint)
    ((_, labels),) = samples(tmp_path / "out/train.safetensors")
    assert labels == [*tokenizer.encode("c", bos=False), tokenizer.specials["<|im_end|>"]]


def test_more_than_a_batch_of_records_that_cannot_be_learned(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch
) -> None:
    monkeypatch.setattr(prepare_json, "BATCH", 3)
    for count in (0, 1, 3, 9, 10):
        records = [*RECORDS[:3], *[{"instruction": "a", "output": ""}] * count, *RECORDS[3:6]]
        source = write(tmp_path / "s.json", records)
        prepare_json.main(source, tiny_checkpoint, tmp_path / "out", val_size=0)
        assert len(read(tmp_path / "out/train.safetensors")) == 6


@pytest.mark.parametrize(
    ("records", "has_template", "expected"),
    [
        (RECORDS, True, "chat"),
        (RECORDS, False, "alpaca"),
        ([{"text": "the quick fox"}], True, "none"),
        ([{"text": "the quick fox"}, *RECORDS], True, "chat"),
    ],
)
def test_the_template_follows_from_the_model(
    tmp_path: Path, records: list, has_template: bool, expected: str
) -> None:
    save_checkpoint_folder(tmp_path / "model")
    if has_template:
        jinja = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        (tmp_path / "model/chat_template.jinja").write_text(jinja)
    source = write(tmp_path / "s.json", records)
    prepare_json.main(source, tmp_path / "model", tmp_path / "out")
    assert json.loads((tmp_path / "out/meta.json").read_text())["template"] == expected


def test_tokens_behind_the_embedding_are_refused_where_they_come_up(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    save_checkpoint_folder(tmp_path / "model", vocab_size=300)
    backend = Backend.from_file(str(tmp_path / "model/tokenizer.json"))
    backend.add_special_tokens(["<extra>"])
    backend.save(str(tmp_path / "model/tokenizer.json"))
    source = write(tmp_path / "s.json", RECORDS)
    prepare_json.main(source, tmp_path / "model", tmp_path / "out")
    load_dataset(tmp_path / "out", tmp_path / "model")
    write(tmp_path / "s.json", [{"text": "one"}, {"text": "one <extra>"}])
    with pytest.raises(UserError, match=r"record 2: has token 300, .*no row \(300 rows\)"):
        prepare_json.main(source, tmp_path / "model", tmp_path / "out")


def test_tokens_that_were_never_trained_are_told(tmp_path: Path, capsys) -> None:
    model = save_checkpoint_folder(tmp_path / "model")
    source = write(tmp_path / "s.json", RECORDS)
    for name in ("good", "bad"):
        if name == "bad":
            model.model.embed_tokens.weight.data[3:5] = 0
            model.save_pretrained(tmp_path / "model")
        flags = dict(data_dir=tmp_path / name, template="chatml")
        prepare_json.main(source, tmp_path / "model", **flags)
        capsys.readouterr()
        load_dataset(tmp_path / name, tmp_path / "model")
        error = capsys.readouterr().err
        assert error.count("never trained on <|im_start|>, <|im_end|>") == (name == "bad")


def test_a_linked_folder_stays_linked(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big disk")
    for _ in range(2):
        prepare_json.main(
            write(tmp_path / "s.json", RECORDS), tiny_checkpoint, tmp_path / "link", val_size=1
        )
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big disk/meta.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big disk", "link", "s.json"]


def test_datasets_of_version_1_4_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    data = write_dataset(tmp_path, tiny_checkpoint)
    for name in ("train", "val"):
        tensors = load_file(data / f"{name}.safetensors")
        del tensors["is_label"]
        save_file(tensors, data / f"{name}.safetensors")
    (data / "checksums.txt").unlink()
    with pytest.raises(UserError, match=r"by an earlier version. Prepare it again"):
        load_dataset(data, tiny_checkpoint)


def test_memory_does_not_grow_with_the_records(tmp_path: Path, tiny_checkpoint: Path) -> None:
    code = (
        "import re, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "peak = re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(peak, 'torch' in sys.modules)"
    )
    peaks = []
    for count in (3000, 60_000):
        file = tmp_path / f"{count}.jsonl"
        line = json.dumps({"instruction": "Count.", "output": "one two three " * 9, "n": "x" * 300})
        file.write_text(f"{line}\n" * count)
        command = [sys.executable, "-c", code, str(ROOT / "scripts/prepare_json.py"), "--source"]
        command += [str(file), "--checkpoint_dir", str(tiny_checkpoint)]
        command += ["--data_dir", str(tmp_path / f"data-{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, has_torch = done.stdout.split()[-2:]
        assert has_torch == "False"  # which takes longer to import than many a file to prepare
        peaks.append(int(peak) * 1024)
    assert peaks[1] < peaks[0] + 8e6  # the larger file has 28 MB
