"""Text to token ids and back, from a checkpoint folder's own `tokenizer.json` or SentencePiece `tokenizer.model`."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_llama.config import read_json
from lit_llama.errors import UserError
from lit_llama.files import MAX_JSON_BYTES, MAX_TOKENIZER_BYTES, check_file, read_text

# Put into the spelling of a special token that stands in somebody's text, so that a template's own ones remain the
# only ones; a noncharacter of Unicode, which no text should hold. `Tokenizer.protect` adds it, `encode` drops it.
_MARK = "\ufdd1"


class Tokenizer:
    """`tokenizer.json` through `tokenizers`, or `tokenizer.model` through `sentencepiece`.

    Raises UserError where the folder has none, a damaged one, or one with more tokens than the model's embedding.

    Attributes:
        bos_id, eos_id: from the folder's files, None where it has none.
        adds_bos: whether the model was trained with BOS in front of its text.
        vocab_size: one more than the highest token id.
        specials: special tokens (BOS, EOS, `<|im_end|>`...) and their ids.
        chat_template: the folder's Jinja template, or None.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        folder = Path(checkpoint_dir)
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
        if not files:
            hint = "python scripts/download.py --repo_id ... (see howto/download_weights.md)"
            raise UserError(f"{folder}: no tokenizer.json and no tokenizer.model there. Download the folder: {hint}")
        self.path = files[0]
        check_file(self.path, MAX_TOKENIZER_BYTES)
        try:
            self._load()
        except Exception as error:  # both libraries raise bare Exception and RuntimeError
            raise UserError(f"{self.path}: not a tokenizer ({error}). Download it again") from None
        paths = [folder / name for name in ("tokenizer_config.json", "config.json", "added_tokens.json")]
        options, config, added = (read_json(path) if path.exists() else {} for path in paths)
        if not all(type(index) is int and 0 <= index < 2**31 for index in added.values()):
            raise UserError(f"{paths[2]}: should hold tokens and their ids, such as {{'<pad>': 32000}}")
        if self.path.suffix == ".model":
            self.specials |= added
            self.vocab_size = max(self.vocab_size, *(index + 1 for index in self.specials.values()))
        spellings = sorted(map(re.escape, filter(None, self.specials)), key=len, reverse=True)
        self._special_pattern = re.compile("(" + ("|".join(spellings) or "(?!)") + ")")  # (?!) never matches
        embedding = _typed(config, "vocab_size", (int,), paths[1])
        if self.vocab_size > (embedding or self.vocab_size):
            raise UserError(
                f"{self.path}: has {self.vocab_size} tokens, the model's embedding only {embedding} "
                "(vocab_size in config.json). Use the tokenizer that came with the model"
            )
        self.bos_id, self.eos_id = (
            self._id_of(
                _typed(options, f"{name}_token", (str, dict), paths[0]),
                self._own_ids.get(name),
                _typed(config, f"{name}_token_id", (int, list), paths[1]),
            )
            for name in ("bos", "eos")
        )
        adds_bos = _typed(options, "add_bos_token", (bool,), paths[0])
        self.adds_bos = self.bos_id is not None and (self._starts_with(self.bos_id) if adds_bos is None else adds_bos)
        jinja_file, template = folder / "chat_template.jinja", _typed(options, "chat_template", (str, list), paths[0])
        if isinstance(template, list):  # several named ones
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = _typed(named[0], "template", (str,), paths[0]) if named else None
        self.chat_template = read_text(jinja_file, MAX_JSON_BYTES) if jinja_file.exists() else template

    def _load(self) -> None:
        if self.path.suffix == ".json":
            from tokenizers import Tokenizer as Backend

            backend = Backend.from_file(str(self.path))
            backend.no_truncation()  # files of finetuned models carry some
            backend.no_padding()
            added = backend.get_added_tokens_decoder()
            self.specials = {token.content: index for index, token in added.items() if token.special}
            self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            self._own_ids, self._starts_with = {}, lambda index: index in backend.encode("a").ids[:1]
            # text is text: only `encode(..., special=True)` looks for special tokens, and does so itself
            backend.encode_special_tokens = True
            starts_words = getattr(backend.pre_tokenizer, "prepend_scheme", None) == "first"

            def encode(text: str, first: bool) -> list[int]:
                if starts_words:  # a space in front of the text, but not behind each special token in it
                    backend.pre_tokenizer.prepend_scheme = "first" if first else "never"
                return backend.encode(text, add_special_tokens=False).ids

            self._encode, self._decode = encode, backend.decode  # which leaves special tokens out
        else:
            from sentencepiece import SentencePieceProcessor

            sp = SentencePieceProcessor(model_file=str(self.path))
            size = self.vocab_size = sp.vocab_size()
            self.specials = {sp.id_to_piece(i): i for i in range(size) if sp.is_control(i)}
            self._own_ids, self._starts_with = {"bos": sp.bos_id(), "eos": sp.eos_id()}, lambda index: True
            self._encode = lambda text, first: sp.encode(text)
            self._decode = lambda ids: sp.decode([index for index in ids if index < size])

    def _id_of(self, token: str | dict | None, own: int | None, fallback: int | list | None) -> int | None:
        """A token's id from tokenizer_config.json's spelling, else SentencePiece's own, else config.json's."""
        spelling = token.get("content") if isinstance(token, dict) else token
        if isinstance(spelling, str) and spelling in self.specials:
            return self.specials[spelling]
        if own is not None and own >= 0:
            return own
        index = next(iter(fallback), None) if isinstance(fallback, list) else fallback
        if index is not None and (type(index) is not int or index < 0):
            raise UserError(f"{self.path.parent / 'config.json'}: {index!r} is no token id")
        return index

    def encode(self, text: str, bos: bool | None = None, eos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text. Raises UserError for a lone surrogate in it, and where there is no BOS or EOS to put.

        Args:
            text: a special token's spelling in it is encoded as the characters that it is, unless `special`.
            bos: put BOS in front. Default: as the model was trained (`adds_bos`).
            eos: put EOS behind.
            special: for a rendered prompt template: special tokens in it are meant, except in what `protect` returned.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds a lone surrogate at character {error.start}: not valid Unicode") from None
        ids: list[int] = []
        for number, part in enumerate(self._special_pattern.split(text) if special else [text]):
            if number % 2:
                ids.append(self.specials[part])
            elif part:
                ids.extend(self._encode(part.replace(_MARK, "") if special else part, number == 0))
        bos = self.adds_bos if bos is None else bos
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            raise UserError(
                f"{self.path}: the tokenizer has no {'EOS' if eos and self.eos_id is None else 'BOS'} token"
            )
        if bos and ids[:1] != [self.bos_id]:  # a chat template may spell it out
            ids.insert(0, self.bos_id)
        return [*ids, self.eos_id] if eos else ids

    def protect(self, text: str) -> str:
        """Text for a slot of a prompt template: special tokens' spellings in it stay text in `encode(special=True)`."""
        return self._special_pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._decode([int(index) for index in ids])

    @property
    def sha256(self) -> str:
        """Of the tokenizer file: prepared data and model must agree on it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def _typed(options: dict[str, Any], key: str, kinds: tuple[type, ...], file: Path) -> Any:
    """The option `key` of a file, None where it has none. Raises UserError for one that is of no such type."""
    value = options.get(key)
    if value is not None and type(value) not in kinds:
        raise UserError(f"{file}: {key} should be {' or '.join(kind.__name__ for kind in kinds)}, not {value!r}")
    return value
