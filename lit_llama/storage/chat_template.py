"""The Jinja chat template of a model folder, rendered as `transformers` renders it."""

import json
import re
from datetime import datetime
from functools import lru_cache
from typing import Any

from lit_llama.errors import UserError
from lit_llama.prompts import Messages, Template, content
from lit_llama.tokenizer import Tokenizer


def load_chat_template(tokenizer: Tokenizer) -> Template:
    """Return the template "chat". Raises UserError if the folder has none, or a broken one."""
    # imported here: the other templates do not need Jinja
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = tokenizer.path.parent
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: has no chat template. Use --template alpaca, chatml or llama3")

    def fail(reason: str) -> None:
        raise ValueError(reason)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # the template is untrusted code: it runs in a sandbox without I/O
    settings = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment = ImmutableSandboxedEnvironment(**settings)
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks tokens to learn; Jinja itself does not know it
    marker = re.compile(r"{%([-+]?)\s*(?:end)?generation\s*([-+]?)%}")
    source = marker.sub(r"{%\1 set _ = 0 \2%}", tokenizer.chat_template)
    compiled = lru_cache(lambda: environment.from_string(source))
    variables = dict(tools=None, documents=None) | tokenizer.named

    in_parts = False

    def render(messages: Messages, add_generation_prompt: bool = True) -> str:
        turns = []
        for message in messages:
            turn = {key: message[key] for key in message if key not in ("input", "learn")}
            text = content(message)
            turn["content"] = [{"type": "text", "text": text}] if in_parts else text
            turns.append(turn)
        options = dict(messages=turns, add_generation_prompt=add_generation_prompt)
        try:
            return compiled().render(variables, **options)
        except Exception as error:  # a template may raise anything
            raise UserError(f"{folder}: the chat template failed ({error!r})") from None

    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = render(turns, add_generation_prompt=False)
    if "question" not in text:  # a template for images, too: text is one of several parts
        in_parts = True
        text = render(turns, add_generation_prompt=False)
    if "question" not in text:
        raise UserError(f"{folder}: its chat template drops the messages. Use another --template")
    # the first special token after an answer ends it
    suffix = text.rpartition("answer")[2]
    ends = sorted(token for token in tokenizer.added if token.strip() and token in suffix)
    return Template(render, min(ends, key=suffix.find, default=None), bos=False)
