"""Prompt templates: from a conversation to the text that the model reads before it answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lit_llama.errors import UserError
from lit_llama.tokenizer import Tokenizer

# `role` ("system", "user", "assistant" or "tool") and `content` of each turn. Alpaca's also have
# `input`, and chat templates see whatever else there is, such as `reasoning_content`.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Template:
    """`render(messages)` returns the prompt up to where the answer starts.

    `render(messages, add_generation_prompt=False)` ends after the last message.
    """

    render: Callable[..., str]
    end: str | None = None  # token that ends an answer; None: the tokenizer's EOS
    bos: bool | None = None  # prepend BOS; None: as the model was trained
    multi_turn: bool = True


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """Return the template "alpaca", "chatml", "llama3", "none" or "chat" (the folder's own)."""
    if name == "chat":
        from lit_llama.storage.chat_template import load_chat_template  # storage imports the book

        return load_chat_template(tokenizer)
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}. Known: {', '.join(TEMPLATES)}, chat")
    template = TEMPLATES[name]
    if template.end is not None and template.end not in tokenizer.added:
        raise UserError(f"template {name!r} needs {template.end}, which {tokenizer.path} lacks")
    return template


def encode_prompt(template: Template, tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the token ids of the prompt for an answer to `messages`."""
    text = template.render(protect(messages, tokenizer))
    return tokenizer.encode(text, bos=template.bos, special=True)


def protect(value: Any, tokenizer: Tokenizer) -> Any:
    """Protect all text in messages: a user who writes <|im_end|> cannot end the turn."""
    if isinstance(value, str):
        return tokenizer.protect(value)
    if isinstance(value, list):
        return [protect(item, tokenizer) for item in value]
    if isinstance(value, dict):
        return {key: protect(item, tokenizer) for key, item in value.items()}
    return value


def stop_ids(template: Template, tokenizer: Tokenizer, eos: int | list[int] | None) -> list[int]:
    """Return all token ids that end an answer. `eos` is LLaMAConfig's."""
    # the template's own comes first: training appends that one to each response
    end = tokenizer.eos_id if template.end is None else tokenizer.added[template.end]
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
def _chatml(messages: Messages, add_generation_prompt: bool = True) -> str:
    turns = [f"<|im_start|>{m['role']}\n{content(m)}<|im_end|>\n" for m in messages]
    return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


# Llama 3's instruction format, from its model card
def _llama3(messages: Messages, add_generation_prompt: bool = True) -> str:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = [f"{header.format(m['role'])}{content(m).strip()}<|eot_id|>" for m in messages]
    opening = header.format("assistant") if add_generation_prompt else ""
    return "<|begin_of_text|>" + "".join(turns) + opening


def content(message: dict[str, Any]) -> str:
    """Return a message's text, followed by the input of an Alpaca record."""
    return "\n\n".join(filter(None, (message["content"], message.get("input"))))


def _single_instruction(messages: Messages, template: str) -> dict[str, Any]:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise UserError(f"template {template!r} holds a single instruction. Use chatml or chat")
    return messages[0]


TEMPLATES = {
    "alpaca": Template(_alpaca, multi_turn=False),
    "chatml": Template(_chatml, "<|im_end|>"),
    "llama3": Template(_llama3, "<|eot_id|>"),
    "none": Template(lambda turns: content(_single_instruction(turns, "none")), multi_turn=False),
}
