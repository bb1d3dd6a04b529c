"""The tokenizer files of a model folder, by `tokenizers` or `sentencepiece`, for `Tokenizer`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llama.config import read_json
from lit_llama.errors import UserError
from lit_llama.storage.files import read_text


@dataclass
class TokenizerFiles:
    """Content of a folder's tokenizer files; see `Tokenizer` for the attributes."""

    path: Path
    encode: Callable[[list[str], bool], list[list[int]]]  # plain texts, whether they begin theirs
    decode: Callable[[list[int]], str]
    vocab_size: int
    specials: dict[str, int]
    added: dict[str, int]
    # special tokens that take the whitespace on their left or right, too
    strips: dict[str, tuple[bool, bool]]
    first_ids: list[int] | None  # those that tokenizer.json puts before a text; None: no such file
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool | None = None
    chat_template: str | None = None
    named: dict[str, str] = field(default_factory=dict)


def read_tokenizer(checkpoint_dir: Path) -> TokenizerFiles:
    """Read tokenizer.json or tokenizer.model, and the files beside it that complete it."""
    path = checkpoint_dir / "tokenizer.json"
    if not path.exists():
        path = path.with_suffix(".model")
    if not path.exists():
        problem = "no tokenizer.json and no tokenizer.model there"
        hint = "Run scripts/download.py first"
        if (checkpoint_dir / "adapter_config.json").exists():
            hint = "It is a LoRA or adapter: pass its base model"
        raise UserError(f"{checkpoint_dir}: {problem}. {hint}")
    options = _read_options(checkpoint_dir)
    # tokens that a finetuning added may be in either of these files only
    entries = options.get("added_tokens_decoder") or {}
    added = _read(checkpoint_dir, "added_tokens.json")
    added |= {entry["content"]: int(index) for index, entry in entries.items()}
    plain = {entry["content"] for entry in entries.values() if not entry.get("special", True)}
    named = read_named_tokens(checkpoint_dir)
    special = {entry["content"] for entry in entries.values()} - plain
    special |= {named[name] for name in ("bos_token", "eos_token") if named.get(name)}
    try:
        if path.suffix == ".json":
            files = _load_json(path, added, special, plain)
        else:
            files = _load_sentencepiece(path, added, plain, options.get("legacy") or False)
    except UserError:
        raise
    except Exception as error:  # the type that `tokenizers` raises
        raise UserError(f"{path}: not a tokenizer ({error}). Download it again") from None

    files.named = named
    # the ids of config.json come last: a finetuned model may stop at another token
    config = _read(checkpoint_dir, "config.json")
    for name, own in (("bos", files.bos_id), ("eos", files.eos_id)):
        default = config.get(f"{name}_token_id") if own is None else own
        default = default[0] if isinstance(default, list) else default
        index = files.added.get(files.named.get(f"{name}_token"), default)
        setattr(files, f"{name}_id", index)
    first = next(iter(files.first_ids or []), None)
    if files.bos_id is None and first in files.specials.values():
        files.bos_id = first  # named nowhere, but tokenizer.json puts it before each text
    adds_bos = options.get("add_bos_token")
    if adds_bos is None:
        # sentencepiece: all of these models were trained with BOS
        adds_bos = files.first_ids is None or files.bos_id in files.first_ids
    files.adds_bos = adds_bos and files.bos_id is not None
    files.chat_template = read_chat_template(checkpoint_dir)
    return files


def has_tokenizer(folder: Path) -> bool:
    """Check whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_named_tokens(folder: Path) -> dict[str, str]:
    """Read the spellings of "bos_token", "eos_token"... of a folder, which may have none."""
    named = {key: value for key, value in _read_options(folder).items() if key.endswith("_token")}
    named = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _read_options(folder: Path) -> dict[str, Any]:
    return _read(folder, "special_tokens_map.json") | _read(folder, "tokenizer_config.json")


def read_chat_template(folder: Path) -> str | None:
    """Read the chat template of a folder, which may have no tokenizer; None if it has none."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = _read(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name) if (folder / name).exists() else {}


def _load_json(
    path: Path, added: dict[str, int], special: set[str], plain: set[str]
) -> TokenizerFiles:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(path))
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    if any(known.get(token) is False for token in special):  # the files beside it say more
        content = json.loads(backend.to_str())
        for entry in content["added_tokens"]:
            entry["special"] |= entry["content"] in special
        backend = Backend.from_str(json.dumps(content))
    # they may also be in the vocabulary, and nothing more
    ids = {token: backend.token_to_id(token) for token in special}
    added = {token: index for token, index in ids.items() if index is not None} | added
    backend.no_truncation()  # files of finetuned models may set both
    backend.no_padding()
    for token, index in sorted(added.items(), key=lambda item: item[1]):
        if token not in known:
            is_new = backend.token_to_id(token) is None
            backend.add_tokens([AddedToken(token, special=token not in plain)])
            if is_new and backend.token_to_id(token) != index:
                problem = f"{token} has id {index} in the files beside it, which is taken"
                raise UserError(f"{path}: {problem}. Download the folder again")
    first_ids = backend.encode("a").ids[:1]
    # spellings stay text: `Tokenizer.split` looks for special tokens itself
    backend.encode_special_tokens = True
    starts_words = getattr(backend.pre_tokenizer, "prepend_scheme", None) == "first"

    def encode(texts: list[str], first: bool) -> list[list[int]]:
        if starts_words:  # a space before the text, but not after each special token
            backend.pre_tokenizer.prepend_scheme = "first" if first else "never"
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    tokens = backend.get_added_tokens_decoder()
    return TokenizerFiles(
        path,
        encode,
        backend.decode,
        vocab_size=max(backend.get_vocab().values(), default=-1) + 1,
        specials={token.content: index for index, token in tokens.items() if token.special},
        added={token.content: index for index, token in tokens.items()},
        strips={token.content: (token.lstrip, token.rstrip) for token in tokens.values()},
        first_ids=first_ids,
    )


def _load_sentencepiece(
    path: Path, added: dict[str, int], plain: set[str], legacy: bool
) -> TokenizerFiles:
    from sentencepiece import SentencePieceProcessor

    backend = SentencePieceProcessor(model_file=str(path))
    newline, size = backend.encode("\n"), backend.vocab_size()
    kinds = (backend.is_control, backend.is_unknown)
    specials = {backend.id_to_piece(i): i for i in range(size) if any(k(i) for k in kinds)} | added

    def encode(texts: list[str], first: bool) -> list[list[int]]:
        if first or legacy:
            return backend.encode(texts)
        # a space before the text, but not after each special token: not after a newline
        return [ids[len(newline) :] for ids in backend.encode([f"\n{t}" for t in texts])]

    # the library does not know the ids of added_tokens.json
    plain_ids = {index: token for token, index in added.items() if token in plain}

    def decode(ids: list[int]) -> str:
        ids = [index for index in ids if index < size or index in plain_ids]
        return backend.decode_pieces([plain_ids.get(i) or backend.id_to_piece(i) for i in ids])

    return TokenizerFiles(
        path,
        encode,
        decode,
        vocab_size=max([size, *(index + 1 for index in added.values())]),
        specials=specials,
        added=dict(specials),
        strips={},
        first_ids=None,
        bos_id=backend.bos_id() if backend.bos_id() >= 0 else None,
        eos_id=backend.eos_id() if backend.eos_id() >= 0 else None,
    )
