"""Prompt templates: from a conversation to the text that the model reads before it answers."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

# `role` ("system", "user" or "assistant") and `content` of each turn; Alpaca's also have `input`
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """`render(messages)` returns the prompt up to where the answer starts."""

    render: Callable[[Messages], str]
    end: str | None = None  # special token that ends an answer; None: the tokenizer's EOS
    bos: bool | None = None  # prepend BOS; None: as the model was trained


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return the template "alpaca", "chatml", "llama3", "none" or "chat" (the folder's own)."""
    if name == "chat":
        return _folder_template(tokenizer)
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}. Known: {', '.join(TEMPLATES)}, chat")
    template = TEMPLATES[name]
    if template.end is not None and template.end not in tokenizer.specials:
        raise UserError(f"template {name!r} needs {template.end}, which {tokenizer.path} lacks")
    return template


def encode_prompt(template: Template, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of the prompt for an answer to `messages`."""
    # special tokens come from the template alone: a user who writes <|im_end|> cannot end the turn
    texts = ("role", "content", "input")
    messages = [{key: tokenizer.protect(m[key]) for key in texts if key in m} for m in messages]
    return tokenizer.encode(template.render(messages), bos=template.bos, special=True)


def stop_ids(template: Template, tokenizer: Tokenizer, eos: int | list[int] | None) -> list[int]:
    """Return all token ids that end an answer. `eos` is eos_token_id of config.json."""
    # the template's own comes first: training appends that one to each response
    end = tokenizer.eos_id if template.end is None else tokenizer.specials[template.end]
    ids = [end, tokenizer.eos_id, *(eos if isinstance(eos, list) else [eos])]
    if not (ids := [index for index in ids if index is not None]):
        raise UserError(f"{tokenizer.path}: no end-of-text token, nor eos_token_id in config.json")
    return list(dict.fromkeys(ids))


# https://github.com/tatsu-lab/stanford_alpaca, with and without input
def _alpaca(messages: Messages) -> str:
    message = _single_instruction(messages, "alpaca")
    context = message.get("input")
    paired = ", paired with an input that provides further context" if context else ""
    task = f"Below is an instruction that describes a task{paired}. "
    task += "Write a response that appropriately completes the request."
    instruction = f"### Instruction:\n{message['content']}"
    given = [f"### Input:\n{context}"] if context else []
    return "\n\n".join([task, instruction, *given, "### Response:"])


# OpenAI's ChatML, the format of SmolLM2 and many others
def _chatml(messages: Messages) -> str:
    turns = [f"<|im_start|>{m['role']}\n{content(m)}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


# Llama 3's instruction format, from its model card
def _llama3(messages: Messages) -> str:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = [f"{header.format(m['role'])}{content(m).strip()}<|eot_id|>" for m in messages]
    return "<|begin_of_text|>" + "".join(turns) + header.format("assistant")


def content(message: dict[str, str]) -> str:
    """Return a message's text, followed by the input of an Alpaca record."""
    return message["content"] + (f"\n\n{message['input']}" if message.get("input") else "")


def _single_instruction(messages: Messages, template: str) -> dict[str, str]:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise UserError(f"template {template!r} holds a single instruction. Use chatml or chat")
    return messages[0]


# the folder's Jinja chat template is untrusted code: it runs in a sandbox without I/O
def _folder_template(tokenizer: Tokenizer) -> Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = tokenizer.path.parent
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: has no chat template. Use --template alpaca, chatml or llama3")

    def fail(reason: str) -> None:
        raise ValueError(reason)

    # set up as in transformers, so that the templates on the hub render alike
    options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment = ImmutableSandboxedEnvironment(**options)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks tokens to learn; Jinja itself does not know it
    source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", tokenizer.chat_template)
    compiled = lru_cache(lambda: environment.from_string(source))
    spelling = {index: token for token, index in tokenizer.specials.items()}
    bos, eos = spelling.get(tokenizer.bos_id, ""), spelling.get(tokenizer.eos_id, "")

    def render(messages: Messages, add_generation_prompt: bool = True) -> str:
        turns = [{"role": m["role"], "content": content(m)} for m in messages]
        variables = dict(messages=turns, add_generation_prompt=add_generation_prompt)
        try:
            return compiled().render(variables, bos_token=bos, eos_token=eos)
        except Exception as error:  # a template may raise anything
            raise UserError(f"{folder}: its chat template failed ({error!r})") from None

    # the first special token after an answer ends it
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "answer"}]
    suffix = render(turns, add_generation_prompt=False).rpartition("answer")[2]
    ends = sorted(token for token in tokenizer.specials if token in suffix)
    return Template(render, min(ends, key=suffix.find, default=None), bos=False)


TEMPLATES = {
    "alpaca": Template(_alpaca),
    "chatml": Template(_chatml, "<|im_end|>"),
    "llama3": Template(_llama3, "<|eot_id|>"),
    "none": Template(lambda messages: content(_single_instruction(messages, "none"))),
}
