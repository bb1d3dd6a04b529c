"""Tokenizer: text to token ids and back, by a folder's tokenizer.json or tokenizer.model."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

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
    # added: ids of all tokens beside the vocabulary proper, such as `<think>`, by spelling
    # chat_template: Jinja chat template, None if the folder has none
    # named: spelling of "bos_token", "pad_token"... for the chat template
    # path, sha256: tokenizer file and its checksum, which a tokenized dataset stores
    def __init__(self, checkpoint_dir: str | Path) -> None:
        from lit_llama.storage.tokenizer_files import read_tokenizer  # storage imports the book

        files = read_tokenizer(Path(checkpoint_dir))
        self._encode, self._decode = files.encode, files.decode
        self.path, self.vocab_size = files.path, files.vocab_size
        self.specials, self.added, self.named = files.specials, files.added, files.named
        self.bos_id, self.eos_id, self.adds_bos = files.bos_id, files.eos_id, files.adds_bos
        self.chat_template = files.chat_template
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        patterns = []
        # longest first, since a spelling may begin with another one; (?!) never matches
        for token in sorted(filter(None, self.specials), key=len, reverse=True):
            left, right = files.strips.get(token, (False, False))
            patterns.append(r"\s*" * left + re.escape(token) + r"\s*" * right)
        self._special_pattern = re.compile(f"({'|'.join(patterns) or '(?!)'})")

    def split(self, text: str) -> list[str]:
        """Split a rendered text into plain parts and special tokens, which alternate."""
        return self._special_pattern.split(text)

    def special_id(self, part: str) -> int:
        """Return the id of a special token from `split`."""
        # some tokens take the whitespace beside them, too
        index = self.specials.get(part)
        return self.specials[part.strip()] if index is None else index

    def encode_batch(self, parts: list[str], first: bool = True) -> list[list[int]]:
        """Return the token ids of plain parts, on all cores. `first`: they begin their texts."""
        return self._encode([part.replace(_MARK, "") for part in parts], first)

    def encode_rest(self, text: str) -> list[int]:
        """Return the token ids of a text that continues another one."""
        # Behind a newline, so that sentencepiece puts no space before it; as transformers does.
        newline, ids = self.encode_batch(["\n", f"\n{text}"], first=False)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self.encode_batch([text], first=False)[0]

    def encode(
        self, text: str, bos: bool | None = None, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Return the token ids of a text, with BOS (default: `adds_bos`) and EOS if requested.

        A special token's spelling is encoded as ordinary characters. With `special`, for rendered
        prompts, it becomes that token, except in text from `protect`.
        """
        text.encode()  # raises for half of an emoji, where both libraries have obscure errors
        ids: list[int] = []
        # The parts are encoded one by one: no token reaches across a special token, and only the
        # first part may get the space that sentencepiece puts before a text.
        for number, part in enumerate(self.split(text) if special else [text]):
            if number % 2:
                ids.append(self.special_id(part))
            elif part:
                ids.extend(self.encode_batch([part], number == 0)[0])
        ids = self.add_bos(ids, bos)
        if eos and self.eos_id is None:
            raise UserError(f"{self.path}: the tokenizer has no EOS token")
        return [*ids, self.eos_id] if eos else ids

    def add_bos(self, ids: list[int], bos: bool | None = None) -> list[int]:
        """Prepend BOS (default: if `adds_bos`), unless it is there already."""
        bos = self.adds_bos if bos is None else bos
        if bos and self.bos_id is None:
            raise UserError(f"{self.path}: the tokenizer has no BOS token")
        # a chat template may spell it out
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def protect(self, text: str) -> str:
        """Mark special tokens' spellings in a text as text for `encode(special=True)`."""

        def mark(match: re.Match) -> str:
            token = match[0].strip()
            if token in ("<think>", "</think>"):  # belong to an answer, and end nothing
                return match[0]
            return match[0].replace(token, token[0] + _MARK + token[1:])

        return self._special_pattern.sub(mark, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._decode([int(index) for index in ids])
