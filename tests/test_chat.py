"""Conversations: beside transformers' greedy decoding of the same turns, and in a terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, save_checkpoint_folder
from conversation import Chat
from transformers import AutoModelForCausalLM

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.adapter import AdapterConfig, apply_adapter
from lit_llama.generation import Sampling
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.multi_lora import enable_multi_lora, load_adapter
from lit_llama.prompts import encode_prompt, get_template
from lit_llama.storage.methods import SaveInfo, save_methods


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a context so long that an answer to fill it takes minutes."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_checkpoint_folder(folder, max_position_embeddings=100_000, seed=3)
    return folder


def reference(
    folder: Path, messages: list[dict[str, str]], new: int, template: str = "chatml"
) -> str:
    """What transformers decodes greedily after these messages."""
    tokenizer = Tokenizer(folder)
    ids = torch.tensor([encode_prompt(get_template(template, tokenizer), tokenizer, messages)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = dict(do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=[2, 4])
    return tokenizer.decode(
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
            0, ids.size(1) :
        ]
    )


def make_chat(folder: Path, template: str = "chatml", new: int = 12, **more) -> Chat:
    model = load_model(folder, dtype=torch.float32)
    return Chat(
        model, Tokenizer(folder), {None: template}, Sampling(new, temperature=0, seed=0), **more
    )


def test_turns_are_those_of_transformers(folder: Path) -> None:
    """Also with earlier turns in the cache, after a stopped answer, and after /reset."""
    chat = make_chat(folder, system="Be brief.")
    said = [{"role": "system", "content": "Be brief."}]
    for turn, text in enumerate(["the quick fox", "and then?", "the other one", "over"]):
        said.append({"role": "user", "content": text})
        with closing(chat.reply(text)) as pieces:
            answer = "".join(islice(pieces, 5) if turn == 1 else pieces)
        want = reference(folder, said, 12)
        assert answer == want if turn != 1 else want.startswith(answer) and answer != want
        said.append({"role": "assistant", "content": answer})
        assert chat.system + chat.messages == said
    chat.reset()
    assert "".join(chat.reply("and then?")) == reference(
        folder, [said[0], {"role": "user", "content": "and then?"}], 12
    )


def test_only_what_is_new_goes_through_the_model(folder: Path) -> None:
    chat, seen = make_chat(folder), []
    chat.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(
            (kwargs.get("input_ids", args[0] if args else None)).numel()
        ),
        with_kwargs=True,
    )
    list(chat.reply("the quick brown fox jumps over the lazy dog"))
    first = seen[0]
    seen.clear()
    list(chat.reply("and"))
    whole = len(encode_prompt(chat.template, chat.tokenizer, chat.messages[:-1]))
    assert seen[0] <= whole - first  # of the first answer, too, what is read as it was decoded
    assert seen[1:] == [1] * 11


def test_the_oldest_turns_go_when_there_is_no_room(folder: Path) -> None:
    chat = make_chat(folder, context=100)
    texts = ["the quick brown fox", "jumps over the dog", "and then", "the other one"]
    for text in texts:
        answer = "".join(chat.reply(text))
    assert chat.forgotten
    assert chat.messages[0]["role"] == "user"
    assert chat.messages[-1]["content"] == answer == reference(folder, chat.messages[:-1], 12)
    before = list(chat.messages)
    with pytest.raises(UserError, match=r"too long: \d+ tokens, there is room for 88"):
        list(chat.reply("the fox " * 100))
    assert all(message in before for message in chat.messages)
    with pytest.raises(
        UserError, match="--max_new_tokens 100: should be from 1 on, below --context 100"
    ):
        make_chat(folder, new=100, context=100)


def test_alpaca_turns_stand_alone(folder: Path) -> None:
    chat = make_chat(folder, template="alpaca")
    for text in ("the fox", "the dog"):
        assert "".join(chat.reply(text)) == reference(
            folder, [{"role": "user", "content": text}], 12, "alpaca"
        )
    with pytest.raises(UserError, match="--system: template 'alpaca' has no place for it"):
        make_chat(folder, template="alpaca", system="Be brief.")


def test_a_question_with_an_input(folder: Path, tmp_path: Path) -> None:
    """As the input of an Alpaca record, for one question."""
    chat = make_chat(folder, template="alpaca")
    assert "/input TEXT" in chat.command("/help")
    assert chat.command("/input the quick  brown fox") == "(context for the next question)"
    asked = {"role": "user", "content": "jumps", "input": "the quick  brown fox"}
    assert "".join(chat.reply("jumps")) == reference(folder, [asked], 12, "alpaca")
    plain = {"role": "user", "content": "jumps"}
    assert "".join(chat.reply("jumps")) == reference(folder, [plain], 12, "alpaca")
    chat.command("/input the dog")
    assert chat.command("/input") == "(no context)"
    list(chat.reply("jumps"))
    assert chat.messages[-2] == plain
    # a question that is too long was not asked: its context is still there
    chat.command("/input the dog")
    with pytest.raises(UserError, match="too long"):
        list(chat.reply("the fox " * 100_000))
    list(chat.reply("jumps"))
    assert chat.messages[-2]["input"] == "the dog"
    chat.command(f"/save {tmp_path}/chats.jsonl")
    saved = json.loads((tmp_path / "chats.jsonl").read_text("utf-8"))["messages"]
    assert saved[0] == {"role": "user", "content": "jumps\n\nthe quick  brown fox"}
    assert saved[2] == plain


def save_random_lora(folder: Path, path: Path, template: str, seed: int) -> None:
    model, config = load_model(folder, dtype=torch.float32), LoRAConfig(targets=("all-linear",))
    apply_lora(model, config)
    torch.manual_seed(seed)
    tensors = {
        name: torch.randn_like(p) * 0.2 for name, p in model.named_parameters() if ".lora_" in name
    }
    save_lora(tensors, path, config, str(folder), template)


def test_another_lora_in_the_middle_of_a_conversation(folder: Path, tmp_path: Path, capsys) -> None:
    for number, template in enumerate(["chatml", "alpaca"]):
        save_random_lora(folder, tmp_path / f"lora{number}", template, number)
    alone = load_script("scripts/merge_lora.py")
    alone.main(tmp_path / "lora0", tmp_path / "merged", precision="32-true")
    model, one, two = (
        load_model(folder, dtype=torch.float32),
        str(tmp_path / "lora0"),
        str(tmp_path / "lora1"),
    )
    enable_multi_lora(model)
    load_adapter(model, one, one)
    chat = Chat(
        model,
        Tokenizer(folder),
        {one: "chatml", None: "chatml"},
        Sampling(12, temperature=0, seed=0),
    )
    list(chat.reply("the fox"))
    assert chat.messages[1]["content"] == reference(tmp_path / "merged", chat.messages[:1], 12)
    assert chat.command("/lora base") == f"{one}, [base]"
    list(chat.reply("the dog"))
    assert chat.messages[3]["content"] == reference(folder, chat.messages[:3], 12)
    assert chat.command(f"/lora {two}") == f"{one}, base, [{two}]"
    assert chat.single_turn
    assert chat.command(f"/lora {one}") == f"[{one}], base, {two}"
    list(chat.reply("again"))
    assert chat.messages[5]["content"] == reference(tmp_path / "merged", chat.messages[:5], 12)
    with pytest.raises(UserError, match="/lora: no 'nowhere', and no such folder"):
        chat.command("/lora nowhere")


def test_a_lora_that_cannot_be_used_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """With a system message, for which its template has no place."""
    save_random_lora(folder, tmp_path / "lora", "alpaca", 1)
    chat = make_chat(folder, system="Be brief.")
    enable_multi_lora(chat.model)
    with pytest.raises(UserError, match="--system: template 'alpaca' has no place for it"):
        chat.command(f"/lora {tmp_path / 'lora'}")
    assert chat.command("/lora") == f"[base], {tmp_path / 'lora'}"
    list(chat.reply("the fox"))
    assert chat.messages[1]["content"] == reference(folder, [*chat.system, chat.messages[0]], 12)
    # with --template
    sampling = Sampling(12, temperature=0)
    chat = Chat(
        chat.model, Tokenizer(folder), {None: "chatml"}, sampling, "Be brief.", template="chatml"
    )
    chat.command(f"/lora {tmp_path / 'lora'}")
    assert not chat.single_turn


def test_an_end_token_that_is_not_special_is_no_part_of_an_answer(
    folder: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    # the third token of the greedy answer becomes an ordinary one that ends answers
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([Tokenizer(folder).encode("the fox")])
    new = model.generate(input_ids=ids, do_sample=False, max_new_tokens=3)[0, ids.size(1) :]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [int(new[-1])]}))
    expected = Tokenizer(folder).decode(new[:2])
    script = load_script("generate/base.py")
    args = script.AnswerArgs(prompt="the fox", temperature=0, max_new_tokens=9)
    script.main(args, path, "none", "32-true")
    assert capsys.readouterr().out == f"{expected}\n"
    chat = make_chat(path, "none")
    assert "".join(chat.reply("the fox")) == expected
    assert chat.messages[1]["content"] == expected


def test_a_saved_conversation_can_be_learned(folder: Path, tmp_path: Path) -> None:
    chat = make_chat(folder)
    file = tmp_path / "chats.jsonl"
    with pytest.raises(UserError, match="/save: nothing was said yet"):
        chat.command(f"/save {file}")
    for text in ("the fox", "the dog"):
        list(chat.reply(text))
        chat.command(f"/save {file}")
    meta = load_script("scripts/prepare_json.py").main(
        file, folder, tmp_path / "data", val_size=0, template="chatml"
    )
    assert len(file.read_text("utf-8").splitlines()) == 2
    assert (tmp_path / "data/meta.json").is_file(), meta


def test_an_adapter_answers(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    model, config = (
        load_model(folder, dtype=torch.float32),
        AdapterConfig(prompt_length=4, start_layer=0),
    )
    apply_adapter(model, config)
    info = SaveInfo(model, str(folder), "chatml")
    methods = {"llama_adapter": config}
    save_methods(tmp_path / "adapter", model.named_parameters(), methods, info)
    main = load_script("generate/chat.py").main
    monkeypatch.setattr("sys.stdin", io.StringIO(f"the fox\n/lora {tmp_path}\n"))
    main(adapter_path=tmp_path / "adapter", temperature=0, max_new_tokens=12, precision="32-true")
    answer = reference(
        folder, [{"role": "user", "content": "the fox"}], 12
    )  # the adapter's gates are closed at first
    assert (
        capsys.readouterr().out
        == f"{answer}\n\n(/lora: an adapter answers, beside which there can be no LoRA)\n\n"
    )
    with pytest.raises(UserError, match="--adapter_path: give a model, LoRAs or an adapter"):
        main(adapter_path=tmp_path / "adapter", lora_path=[tmp_path])
    with pytest.raises(UserError, match="LoRAs cannot be used beside an adapter"):
        enable_multi_lora(model)


class Terminal:
    """A program in a pseudo-terminal, typed at."""

    def __init__(self, command: list[str]) -> None:
        self.own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
            preexec_fn=self.at_the_terminal, env=os.environ | {"TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def at_the_terminal(self) -> None:
        """Make the terminal that of the new process, and let Ctrl-C reach it."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """All that came up to what matches, which is taken away."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.text!r}"
            if select.select([self.own], [], [], left)[0]:
                try:
                    self.text += os.read(self.own, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.text), (
                        f"ended without {pattern!r}: {self.text!r}"
                    )
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen


def test_in_a_terminal(folder: Path) -> None:
    """Two turns, Ctrl-C in the middle of an answer, /reset, Ctrl-C at the prompt, Ctrl-D."""
    flags = [
        "--checkpoint_dir",
        str(folder),
        "--template",
        "chatml",
        "--temperature",
        "0",
        "--precision",
        "32-true",
    ]
    flags += ["--context", "90000", "--max_new_tokens", "80000"]
    terminal = Terminal([sys.executable, "generate/chat.py", *flags])
    try:
        terminal.wait_for(r"Ctrl-D ends\.\r\n> ")
        for text in ("the quick fox", "and then"):
            terminal.type(f"{text}\n")
            terminal.wait_for(
                re.escape(text) + r"\r\n.{30}"
            )  # the answer is on its way, and would be for minutes
            terminal.type("\x03")
            terminal.wait_for(r"\(stopped\)\r\n\r\n> ")
        terminal.type("/reset\n")
        terminal.wait_for(r"\(forgotten\)\r\n> ")
        terminal.type("/save nowhere-yet.jsonl\n")
        terminal.wait_for(r"\(/save: nothing was said yet\)\r\n> ")
        time.sleep(1)  # readline shows its prompt a moment before it notices signals
        terminal.type("\x03")
        terminal.wait_for(r"\(Ctrl-D ends\)\r\n> ")
        time.sleep(1)
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
        os.close(terminal.own)


def test_lines_from_a_pipe(folder: Path, python: str) -> None:
    flags = [
        "--checkpoint_dir",
        str(folder),
        "--template",
        "chatml",
        "--temperature",
        "0",
        "--max_new_tokens",
        "12",
    ]
    command = [python, str(ROOT / "generate/chat.py"), *flags, "--precision", "32-true"]
    done = subprocess.run(
        command, input="the fox\n/lora\n/unknown\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer = reference(folder, [{"role": "user", "content": "the fox"}], 12)
    assert done.stdout.startswith(f"{answer}\n\n[base]\n(no command /unknown)\n/reset ")
