"""Prompt templates: from a record to the text that the model reads before it answers, and the token that ends it."""

import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

MAX_SECONDS, MAX_BYTES, MAX_TEXT = 5.0, 2**28, 10**6
"""What a folder's chat template may take to render: time, memory, and characters beside those of the messages."""

Messages = list[dict[str, str]]
"""Turns of a conversation: `role` ("system", "user" or "assistant"), `content`, and for Alpaca records `input`."""


@dataclass(frozen=True)
class Template:
    """`render(messages)` is the prompt up to where the answer starts; `end`, the special token that ends an answer."""

    render: Callable[[Messages], str]
    end: str | None = None  # None: the tokenizer's EOS
    bos: bool | None = None  # whether BOS goes in front; None: as the model was trained


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template called `name`: "alpaca", "chatml", "llama3", "chat" (the checkpoint folder's own) or "none".

    Raises UserError where it is unknown, or the tokenizer lacks what it is made of.
    """
    if name == "chat":
        return _folder_template(tokenizer)
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}. Known: {', '.join(TEMPLATES)}, chat (the model folder's own)")
    template = TEMPLATES[name]
    if template.end is not None and template.end not in tokenizer.specials:
        raise UserError(f"template {name!r} needs the special token {template.end}, which {tokenizer.path} lacks")
    return template


def encode_prompt(template: Template, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Token ids of the prompt for an answer to `messages`, BOS included where the model was trained with one.

    Special tokens come from the template alone: spelled out in a message they stay text.
    """
    texts = ("content", "input")
    safe = [{"role": m["role"]} | {key: tokenizer.protect(m[key]) for key in texts if key in m} for m in messages]
    return tokenizer.encode(template.render(safe), bos=template.bos, special=True)


def stop_ids(template: Template, tokenizer: Tokenizer, eos_token_id: int | list[int] | None) -> list[int]:
    """All token ids that end an answer; the first is what training puts behind one. Raises UserError for none."""
    end = tokenizer.specials[template.end] if template.end is not None else tokenizer.eos_id
    of_model = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    ids = list(dict.fromkeys(index for index in (end, tokenizer.eos_id, *of_model) if index is not None))
    if not ids:
        raise UserError(f"{tokenizer.path}: no end-of-text token there, nor in config.json (eos_token_id)")
    return ids


def _alpaca(messages: Messages) -> str:
    """https://github.com/tatsu-lab/stanford_alpaca's prompt, with and without input."""
    message = _only_user_message(messages, "alpaca")
    context = message.get("input")
    paired = ", paired with an input that provides further context" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{message['content']}\n\n" + (f"### Input:\n{context}\n\n" if context else "")
    ) + "### Response:"


def _chatml(messages: Messages) -> str:
    """OpenAI's ChatML, which SmolLM2 and many others were tuned with."""
    turns = [f"<|im_start|>{message['role']}\n{content(message)}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _llama3(messages: Messages) -> str:
    """Llama 3's instruction format, from its model card."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = [f"{header.format(message['role'])}{content(message).strip()}<|eot_id|>" for message in messages]
    return "<|begin_of_text|>" + "".join(turns) + header.format("assistant")


TEMPLATES = {
    "alpaca": Template(_alpaca),
    "chatml": Template(_chatml, "<|im_end|>"),
    "llama3": Template(_llama3, "<|eot_id|>"),
    "none": Template(lambda messages: content(_only_user_message(messages, "none"))),
}


def content(message: dict[str, str]) -> str:
    """A message's text, with an Alpaca record's input behind its instruction."""
    return f"{message['content']}\n\n{message['input']}" if message.get("input") else message["content"]


def _only_user_message(messages: Messages, template: str) -> dict[str, str]:
    if len(messages) != 1 or messages[0]["role"] != "user":
        hint = "For system messages and conversations use --template chatml, llama3 or chat"
        raise UserError(f"template {template!r} holds a single instruction. {hint}")
    return messages[0]


def _folder_template(tokenizer: Tokenizer) -> Template:
    """The Jinja chat template of the checkpoint folder: a stranger's program, run in a sandbox and within bounds."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = tokenizer.path.parent
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: has no chat template. Use --template alpaca, chatml, llama3 or none")
    file = own if (own := folder / "chat_template.jinja").is_file() else folder / "tokenizer_config.json"

    def fail(reason: str) -> None:
        raise TemplateError(reason)

    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    compiled = lru_cache(environment.from_string)
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: datetime.now().strftime(form)}
    jinja = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.chat_template)  # they mark what to learn
    spelling = {index: token for token, index in tokenizer.specials.items()}
    tokens = dict(bos_token=spelling.get(tokenizer.bos_id, ""), eos_token=spelling.get(tokenizer.eos_id, ""))

    def render(messages: Messages, add_generation_prompt: bool = True) -> str:
        turns = [{"role": message["role"], "content": content(message)} for message in messages]
        try:
            with _bounded():
                text = compiled(jinja).render(messages=turns, add_generation_prompt=add_generation_prompt, **tokens)
            if len(text) > MAX_TEXT + 2 * sum(len(turn["content"]) for turn in turns):
                raise ValueError(f"a prompt of {len(text):,} characters")
            return text
        except Exception as error:  # whatever it raises, it is the template that is wrong
            raise UserError(f"{file}: its chat template failed ({type(error).__name__}: {error})") from None

    # what the template puts behind an answer tells which token ends one
    answer = "answer"
    whole = render([{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}], False)
    behind = whole.rpartition(answer)[2]
    ends = sorted((behind.find(token), token) for token in tokenizer.specials if token in behind)
    return Template(render, ends[0][1] if ends else None, bos=False)


@contextmanager
def _bounded() -> Iterator[None]:
    """Code in here ends in TimeoutError or MemoryError where it takes more than `MAX_SECONDS` or `MAX_BYTES`.

    In other threads than the main one it has no such bounds.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"still not done after {MAX_SECONDS:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield  # it could not be interrupted there, nor is the process's memory its own
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS, 1)  # Jinja catches some exceptions: once more
    try:
        if soft == resource.RLIM_INFINITY or soft > held + MAX_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (held + MAX_BYTES, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
