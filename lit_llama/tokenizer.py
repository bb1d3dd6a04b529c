"""Tokenizer: text to token ids and back, by a folder's tokenizer.json or tokenizer.model."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from lit_llama.config import read_json
from lit_llama.errors import UserError

# Put into a special token's spelling inside a user's text, so that it stays text in a rendered
# prompt. A noncharacter of Unicode, which no text holds: `protect` adds it, `encode` drops it.
_MARK = "\ufdd1"


class Tokenizer:
    """The tokenizer of a model folder, through `tokenizers` or `sentencepiece`."""

    # bos_id, eos_id: None if the folder does not define them
    # adds_bos: whether the model was trained with BOS in front of its text
    # vocab_size: highest token id plus one
    # specials: ids of the special tokens (BOS, EOS, `<|im_end|>`...) by spelling
    # chat_template: Jinja chat template, None if the folder has none
    # path, sha256: tokenizer file and its checksum, which a tokenized dataset stores
    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.path = Path(checkpoint_dir) / "tokenizer.json"
        if not self.path.exists():
            self.path = self.path.with_suffix(".model")
        if not self.path.exists():
            problem = "no tokenizer.json and no tokenizer.model there"
            raise UserError(f"{checkpoint_dir}: {problem}. Run scripts/download.py first")
        try:
            self._load_json() if self.path.suffix == ".json" else self._load_sentencepiece()
        except Exception as error:  # the type that `tokenizers` raises
            raise UserError(f"{self.path}: not a tokenizer ({error}). Download it again") from None
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        names = ("tokenizer_config.json", "config.json", "added_tokens.json")
        paths = [self.path.with_name(name) for name in names]
        options, config, added = (read_json(path) if path.exists() else {} for path in paths)
        # tokens that a finetuning added; tokenizer.json holds its own
        if self.path.suffix == ".model":
            self.specials |= added
            self.vocab_size = max([self.vocab_size, *(index + 1 for index in added.values())])
        # a row too few in the embedding would be an index error deep in the model
        embedding = config.get("vocab_size") or self.vocab_size
        if self.vocab_size > embedding:
            sizes = f"{self.vocab_size} tokens for an embedding of {embedding}"
            raise UserError(f"{self.path}: {sizes}. Use the tokenizer that came with the model")
        # longest first, since a spelling may begin with another one; (?!) never matches
        spellings = sorted(map(re.escape, filter(None, self.specials)), key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(spellings) or '(?!)'})")
        # the ids of config.json come last: a finetuned model may stop at another token
        ids = config | self._own_ids
        self.bos_id = self._find_id(options.get("bos_token"), ids.get("bos_token_id"))
        self.eos_id = self._find_id(options.get("eos_token"), ids.get("eos_token_id"))
        adds_bos = options.get("add_bos_token")
        if adds_bos is None:
            adds_bos = self._adds_token(self.bos_id)
        self.adds_bos = adds_bos and self.bos_id is not None
        template = options.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        jinja = self.path.with_name("chat_template.jinja")
        self.chat_template = jinja.read_text("utf-8") if jinja.exists() else template

    def _load_json(self) -> None:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_file(str(self.path))
        backend.no_truncation()  # files of finetuned models may set both
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self._own_ids, self._adds_token = {}, lambda index: index in backend.encode("a").ids[:1]
        # spellings stay text: `encode(special=True)` looks for special tokens itself
        backend.encode_special_tokens = True
        starts_words = getattr(backend.pre_tokenizer, "prepend_scheme", None) == "first"

        def encode(text: str, first: bool) -> list[int]:
            if starts_words:  # a space before the text, but not after each special token
                backend.pre_tokenizer.prepend_scheme = "first" if first else "never"
            return backend.encode(text, add_special_tokens=False).ids

        self._encode, self._decode = encode, backend.decode

    def _load_sentencepiece(self) -> None:
        from sentencepiece import SentencePieceProcessor

        backend = SentencePieceProcessor(model_file=str(self.path))
        size = self.vocab_size = backend.vocab_size()
        self.specials = {backend.id_to_piece(i): i for i in range(size) if backend.is_control(i)}
        own_ids = {"bos_token_id": backend.bos_id(), "eos_token_id": backend.eos_id()}
        self._own_ids = {name: index for name, index in own_ids.items() if index >= 0}
        self._adds_token = lambda index: True  # all of these models were trained with BOS
        self._encode = lambda text, first: backend.encode(text)
        # the library does not know the ids of added_tokens.json
        self._decode = lambda ids: backend.decode([index for index in ids if index < size])

    def _find_id(self, token: str | dict | None, fallback: int | list[int] | None) -> int | None:
        spelling = token["content"] if isinstance(token, dict) else token
        index = self.specials.get(spelling, fallback)
        return index[0] if isinstance(index, list) else index

    def encode(
        self, text: str, bos: bool | None = None, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Return the token ids of a text, with BOS (default: `adds_bos`) and EOS if requested.

        A special token's spelling is encoded as ordinary characters. With `special`, for rendered
        prompts, it becomes that token, except in text from `protect`.
        """
        text.encode()  # raises for half of an emoji, where both libraries have obscure errors
        parts = self._special_pattern.split(text) if special else [text]
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:  # text and special tokens alternate
                ids.append(self.specials[part])
            elif part:
                plain = part.replace(_MARK, "") if special else part
                ids.extend(self._encode(plain, number == 0))
        bos = self.adds_bos if bos is None else bos
        for name, wanted, index in (("BOS", bos, self.bos_id), ("EOS", eos, self.eos_id)):
            if wanted and index is None:
                raise UserError(f"{self.path}: the tokenizer has no {name} token")
        if bos and ids[:1] != [self.bos_id]:  # a chat template may spell it out
            ids.insert(0, self.bos_id)
        return [*ids, self.eos_id] if eos else ids

    def protect(self, text: str) -> str:
        """Mark special tokens' spellings in a text as text for `encode(special=True)`."""
        return self._special_pattern.sub(lambda match: match[0][0] + _MARK + match[0][1:], text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._decode([int(index) for index in ids])
