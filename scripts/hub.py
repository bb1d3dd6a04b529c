"""What the scripts for the Hugging Face hub share: the files of a model, and TLS only."""

import re
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

from lit_llama.errors import UserError
from lit_llama.storage.model_folder import TOKENIZER_FILES

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
FILES = ["config.json", *TOKENIZER_FILES, *ADAPTER_FILES]
FILES += [f"adapter/{name}" for name in ADAPTER_FILES]  # of an adapter beside a LoRA


def files_needed(names: list[str]) -> list[str]:
    """Return the files to load a model or LoRA from, among those of a repository.

    These are config, tokenizer, and the weights in one format, preferably safetensors. Raises
    UserError if there is neither a model nor a LoRA.
    """
    wanted = [name for name in names if name in FILES]
    if not {"config.json", "adapter_config.json"} & set(wanted):
        problem = "holds no config.json and no adapter_config.json: no model and no LoRA"
        raise UserError(f"the repository {problem}")
    for pattern in (r"model[\w.-]*\.safetensors", r"pytorch_model[\w.-]*\.bin"):
        pattern = re.compile(rf"{pattern}(\.index\.json)?", re.ASCII)
        if weights := [name for name in names if pattern.fullmatch(name)]:
            return wanted + weights
    return wanted


def refuse_plain_http() -> None:
    """Let `huggingface_hub` raise UserError if the hub, or a redirect, is not reached over TLS."""
    import huggingface_hub

    def check(response: Any) -> None:
        check_secure(urljoin(str(response.url), response.headers.get("location", "")))

    check_secure(huggingface_hub.constants.ENDPOINT)
    usual = huggingface_hub.get_session()
    hooks = usual.event_hooks | {"response": [*usual.event_hooks["response"], check]}
    options = dict(event_hooks=hooks, follow_redirects=True, timeout=usual.timeout)
    huggingface_hub.set_client_factory(partial(type(usual), **options))


def check_secure(url: str) -> None:
    """Raise UserError if an address is neither https nor on this machine."""
    is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    if not url.startswith("https://") and not is_local:
        reason = "only https:// is safe from being read and changed on its way"
        raise UserError(f"{url}: refused, {reason}")
