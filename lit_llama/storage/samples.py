"""From conversations to samples: token ids, and which of them are learned.

A conversation is one sample with a learned span for each answer, if the template renders its first
turns as the beginning of the whole. If it does not, since it drops the thinking of earlier turns,
say, each answer is a sample of its own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

from lit_llama.errors import UserError
from lit_llama.prompts import Messages, Template, protect
from lit_llama.tokenizer import Tokenizer

Span = tuple[int, int]


class Sample(NamedTuple):
    """Token ids, and the spans (start, end) of those that are learned."""

    ids: list[int]
    spans: list[Span]


@dataclass
class Text:
    """The text of a sample, and the spans of its characters that are learned.

    Args:
        joined: Encode prompt and answer as one text, as `transformers` does.
        end_id: Token to append, which is learned, too.
        bos: Prepend BOS; None: as the model was trained.
    """

    text: str
    spans: list[Span]
    joined: bool = True
    end_id: int | None = None
    bos: bool | None = None


def render_samples(
    messages: Messages, template: Template, tokenizer: Tokenizer, end_id: int
) -> list[Text]:
    """Render a conversation into the texts of its samples; turns with `learn: False` are prompts.

    Raises UserError if there is no answer to learn, or if the template cannot render one.
    """
    if not messages:
        raise UserError("the conversation is empty")
    if messages[0]["role"] == "text":  # special tokens in a plain text become those tokens
        text = messages[0]["content"]
        for token, index in tokenizer.added.items():
            if index in (end_id, tokenizer.eos_id) and text.rstrip().endswith(token):
                text = text.rstrip().removesuffix(token)
        if not text.strip():
            raise UserError("the text is empty")
        return [Text(text, [(0, len(text))], end_id=end_id)]

    turns = learned_turns(messages)
    messages = protect(messages, tokenizer)
    if not template.multi_turn:
        prompt, answer = template.render(messages[: turns[-1]]), messages[turns[-1]]["content"]
        span = (len(prompt), len(prompt + answer))
        return [Text(prompt + answer, [span], joined=False, end_id=end_id, bos=template.bos)]

    texts = [_render_answer(messages, turn, template, end_id) for turn in turns]
    last = texts[-1]
    if all(text.end_id is None and last.text.startswith(text.text) for text in texts):
        last.spans = [span for text in texts for span in text.spans]
        return [last]
    return texts


def learned_turns(messages: Messages) -> list[int]:
    """Return the turns that are answers to learn. Raises UserError if there are none."""
    answers = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
    answers = [n for n in answers if messages[n].get("learn", True)]
    if not answers:
        raise UserError("there is no answer to learn")
    filled = [n for n in answers if not is_empty(messages[n])]
    if not filled:
        raise UserError("the answer is empty")
    return filled


def is_empty(turn: dict[str, Any]) -> bool:
    """Check for a turn that says and calls nothing."""
    return not turn["content"].strip() and not turn.get("tool_calls")


def _render_answer(messages: Messages, turn: int, template: Template, end_id: int) -> Text:
    """Render a conversation up to the answer at `turn`, which alone is learned."""
    prompt = template.render(messages[:turn])
    text = template.render(messages[: turn + 1], add_generation_prompt=False)
    content = messages[turn]["content"]
    if "</think>" in content and "</think>" not in text[_shared(prompt, text) :]:
        # the template drops thinking even from the last turn, where it is what should be learned
        answer = _after_opening(_frame(template).extra, content) + _frame(template).suffix
    elif text.startswith(prompt):
        answer = text[len(prompt) :]
    else:
        answer = _continuation(template, prompt, text, content)
    if template.end is not None and template.end in answer:
        answer, end_id = answer[: answer.index(template.end) + len(template.end)], None
    elif template.end is None:
        answer = answer.rstrip("\n")
    if not answer.removesuffix(template.end or "").strip():  # such as a tool call that it drops
        raise UserError("the template renders an empty answer")
    span = (len(prompt), len(prompt + answer))
    return Text(prompt + answer, [span], end_id=end_id, bos=template.bos)


class _Frame(NamedTuple):
    """Text of a template around an answer."""

    header: str  # before it, in a rendered conversation
    opening: str  # before it, in a prompt
    suffix: str  # after it

    @property
    def extra(self) -> str:
        """Return the end of a prompt that a rendered answer does not begin with."""
        return self.opening[_shared(self.header, self.opening) :]


def _shared(a: str, b: str) -> int:
    """Return the number of characters that two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


@lru_cache
def _frame(template: Template) -> _Frame:
    question, answer = {"role": "user", "content": "hi"}, "A-n-s-w-e-r"
    asked = template.render([question], add_generation_prompt=False)
    turns = [question, {"role": "assistant", "content": answer}]
    text = template.render(turns, add_generation_prompt=False)
    header, _, suffix = text.removeprefix(asked).partition(answer)
    return _Frame(header, template.render([question]).removeprefix(asked), suffix)


def _continuation(template: Template, prompt: str, text: str, content: str) -> str:
    """Return how an answer continues a prompt that its rendered text does not begin with."""
    # With header "<a>\n" and opening "<a>\n<think>\n", `extra` is "<think>\n".
    header, opening, suffix = frame = _frame(template)
    begin = prompt.removesuffix(frame.extra)
    rest = header[len(opening) - len(frame.extra) :]
    for answer in (content, content.strip()):
        # the turns before may look different once they are answered: some templates put the system
        # message before the last question
        if not text.startswith(begin) and text.endswith(header + answer + suffix):
            return _after_opening(frame.extra, rest + answer + suffix)
    if rest.strip() or not frame.extra or not text.startswith(begin + rest):
        problem = f"begins an answer with {header!r}, but a prompt for it ends with {opening!r}"
        raise UserError(f"the chat template {problem}. Use another --template")
    return _after_opening(frame.extra, text[len(begin + rest) :])


def _after_opening(opening: str, answer: str) -> str:
    """Return the rest of an answer whose first part is the end of the prompt: `<think>` or a space.

    Raises UserError if the answer cannot follow it.
    """
    opening = opening.strip()
    if answer.lstrip().startswith(opening):
        return answer.lstrip().removeprefix(opening).lstrip() if opening else answer
    tags = [tag for tag in re.findall(r"<(\w+)>", opening) if f"</{tag}>" not in opening]
    if all(f"</{tag}>" in answer for tag in tags) and not answer.lstrip().startswith("<think>"):
        return answer
    problem = f"ends a prompt with {opening!r}, which the answer does not continue"
    raise UserError(f"the chat template {problem}. Use another --template, or begin answers so")


class _Piece(NamedTuple):
    """A part of a text between special tokens, or such a token."""

    text: str
    first: bool  # it begins its text
    learned: int  # number of its span, counted from 1; 0: not learned
    head: str = ""  # the beginning of `text` that is not learned
    special_id: int | None = None


class TextBatch:
    """Texts on their way to token ids: split, then encoded on all cores, then put together.

    Only `encode` takes long, and can run in a thread.
    """

    def __init__(self, texts: Sequence[Text], tokenizer: Tokenizer) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.pieces = [list(_split(text, tokenizer)) for text in texts]
        # distinct strings, that begin their text or not
        self.parts: dict[bool, dict[str, list[int]]] = {True: {}, False: {}}
        for piece in chain(*self.pieces):
            if piece.special_id is None:
                self.parts[piece.first].update({piece.text: [], piece.head: []})

    def encode(self) -> None:
        for first, ids in self.parts.items():
            encoded = self.tokenizer.encode_batch(list(ids), first)
            ids.update(zip(ids, encoded, strict=True))

    def samples(self) -> Iterator[Sample]:
        for text, pieces in zip(self.texts, self.pieces, strict=True):
            yield _assemble(text, pieces, self.parts, self.tokenizer)


def _parts(text: Text, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield plain parts and special tokens, with whether they are special.

    Plain parts are cut where a span ends, too: behind an end token that is not a special one.
    """
    begin = 0
    for number, part in enumerate(tokenizer.split(text.text)):
        end, is_special = begin + len(part), number % 2 == 1
        cuts = [] if is_special else [b for _, b in text.spans if begin < b < end]
        for cut in (*cuts, end):
            yield text.text[begin:cut], is_special
            begin = cut


def _split(text: Text, tokenizer: Tokenizer) -> Iterator[_Piece]:
    begin = 0
    for part, is_special in _parts(text, tokenizer):
        end, first = begin + len(part), begin == 0
        numbers = (n for n, (a, b) in enumerate(text.spans, start=1) if a < end and begin < b)
        # a span ends with a part, so that a part has one start at most
        last = max(numbers, default=0)
        start = max(0, text.spans[last - 1][0] - begin) if last else 0
        learned = 0 if start else last
        if is_special:
            yield _Piece(part, first, learned, special_id=tokenizer.special_id(part))
        elif start and text.joined:
            yield _Piece(part, first, last, head=part[:start])
        elif start:
            yield _Piece(part[:start], first, learned)
            yield _Piece(part[start:], True, last)
        elif part:
            yield _Piece(part, first, learned)
        begin = end


def _assemble(
    text: Text, pieces: list[_Piece], known: dict[bool, dict[str, list[int]]], tokenizer: Tokenizer
) -> Sample:
    ids: list[int] = []
    found: dict[int, Span] = {}
    for piece in pieces:
        start = len(ids)
        if piece.special_id is not None:
            ids.append(piece.special_id)
        else:
            own, head = known[piece.first][piece.text], known[piece.first][piece.head]
            if own[: len(head)] != head:
                # A token would reach across the end of the prompt, behind which the model answers.
                own = head + tokenizer.encode_rest(piece.text.removeprefix(piece.head))
            ids += own
            start += len(head)
        if piece.learned:
            start, _ = found.get(piece.learned, (start, 0))
            found[piece.learned] = (start, len(ids))
    if text.end_id is not None:
        ids.append(text.end_id)
        start, _ = found.get(len(text.spans), (len(ids) - 1, 0))
        found[len(text.spans)] = (start, len(ids))
    with_bos = tokenizer.add_bos(ids, text.bos)
    shift = len(with_bos) - len(ids)
    return Sample(with_bos, [(start + shift, end + shift) for start, end in found.values()])


def encode_conversation(
    messages: Messages, template: Template, tokenizer: Tokenizer, end_id: int, where: str
) -> list[Sample]:
    """Return the samples of a conversation. Raises UserError, with `where`, if it has none."""
    try:
        batch = TextBatch(render_samples(messages, template, tokenizer, end_id), tokenizer)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    batch.encode()
    return list(batch.samples())


def encode_answers(
    messages: Messages, template: Template, tokenizer: Tokenizer, end_id: int, where: str
) -> list[Sample]:
    """Return a sample for each answer of a conversation, which ends with it, as learned."""
    samples = encode_conversation(messages, template, tokenizer, end_id, where)
    return [Sample(ids[:end], [(start, end)]) for ids, spans in samples for start, end in spans]
