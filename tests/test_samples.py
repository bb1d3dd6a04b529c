"""Conversations as samples: token ids of transformers' chat templates, labels of the answers."""

import json
from pathlib import Path

import pytest
from conftest import save_sentencepiece, save_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaTokenizer

from lit_llama import Tokenizer, UserError
from lit_llama.prompts import encode_prompt, get_template, stop_ids
from lit_llama.storage.samples import encode_conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + CHATML
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set content = system + m['content'] if loop.index0 == 0 else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
TINYLLAMA = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA31 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}\n{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}\n"
    "{%- else %}{%- set system_message = '' %}{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}\n"
    "{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}\n"
    "{{- 'Today Date: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}\n"
    "{%- for m in messages %}\n{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}\n"
)
R1 = (  # of the first release; the later one opens <think> in the prompt
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ content + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
R1_THINKS = R1.replace("prompt %}<|Assistant|>", "prompt %}<|Assistant|>{{ '<think>\n' }}")
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PADDED = (  # names pad_token, unk_token, tools and documents
    "{% if tools is none and documents is none and unk_token is not defined %}{{ pad_token }}"
    "{% endif %}" + CHATML
)
GENERATION = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
TOJSON = CHATML.replace("{{ m.content }}", "{{ m.content | tojson }}")

SPECIALS = {
    "llama2": ["[INST]"],
    "llama3.1": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "r1": ["<|User|>", "<|Assistant|>"],
}
SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [
    {"role": "user", "content": "What is the other dog?"},
    {"role": "assistant", "content": "The lazy one."},
    {"role": "user", "content": "and the fox"},
    {"role": "assistant", "content": "It jumps, and then it jumps & <runs> naïvely."},
]
# name: the template, whether it has a place for a system message, what follows an answer
TEMPLATES = {
    "chatml": (CHATML, True, "<|im_end|>"),
    "smollm2": (SMOLLM2, True, "<|im_end|>"),
    "llama2": (LLAMA2, True, "</s>"),
    "mistral": (MISTRAL, False, "</s>"),
    "tinyllama": (TINYLLAMA, True, "</s>"),
    "llama3.1": (LLAMA31, True, "<|eot_id|>"),
    "r1": (R1, True, "</s>"),
    "spaced": (SPACED, False, "</s>"),
    "padded": (PADDED, True, "<|im_end|>"),
    "generation": (GENERATION, True, "<|im_end|>"),
    "tojson": (TOJSON, True, "<|im_end|>"),
}


def save_folder(folder: Path, template: str, name: str = "", kind: str = "bytes") -> None:
    """A tokenizer with this template: byte-level BPE, or sentencepiece in either format."""
    specials = SPECIALS.get(name, []) if name != "llama2" else []
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    options |= {"chat_template": template, "add_bos_token": True}
    if kind == "bytes":
        save_tokenizer(folder)
        options |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        texts = [turn["content"] for turn in TURNS] + [template] * 9
        save_sentencepiece(folder / "tokenizer.model", texts * 9, 340)
        theirs = LlamaTokenizer.from_pretrained(folder, legacy=kind == "legacy")
        theirs.backend_tokenizer.save(str(folder / "tokenizer.json"))
        options |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([*specials, "<|im_start|>", "<|im_end|>", "<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def learned(sample, ids: list[int] | None = None) -> list[list[int]]:
    return [sample.ids[start:end] for start, end in sample.spans]


def encode(folder: Path, messages: list, template: str = "chat"):
    tokenizer = Tokenizer(folder)
    chosen = get_template(template, tokenizer)
    end_id = stop_ids(chosen, tokenizer, None)[0]
    return encode_conversation(messages, chosen, tokenizer, end_id, "here")


@pytest.mark.parametrize("kind", ["bytes", "legacy", "metaspace"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(tmp_path: Path, name: str, kind: str) -> None:
    jinja, has_system, end = TEMPLATES[name]
    save_folder(tmp_path, jinja, name, kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    template = get_template("chat", tokenizer)
    for messages in [TURNS] + ([[SYSTEM, *TURNS]] if has_system else []):
        (sample,) = encode(tmp_path, messages)
        expected = theirs.apply_chat_template(messages, return_dict=False)
        # what follows the last end token is never seen
        end_id = theirs.convert_tokens_to_ids(end)
        expected = expected[: len(expected) - expected[::-1].index(end_id)]
        assert sample.ids == expected
        answers = [turn for turn, m in enumerate(messages) if m["role"] == "assistant"]
        for (start, stop), turn in zip(sample.spans, answers, strict=True):
            prompt = theirs.apply_chat_template(
                messages[:turn], add_generation_prompt=True, return_dict=False
            )
            assert encode_prompt(template, tokenizer, messages[:turn]) == prompt
            assert sample.ids[:start] == prompt
            assert sample.ids[stop - 1] == end_id
            text = messages[turn]["content"]
            text = json.dumps(text, ensure_ascii=False) if name == "tojson" else text
            assert theirs.decode(sample.ids[start : stop - 1]).strip().endswith(text)


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("name", ["llama2", "mistral", "tinyllama"])
def test_ids_of_tokenizer_model_alone(tmp_path: Path, name: str, legacy: bool | None) -> None:
    save_folder(tmp_path, TEMPLATES[name][0], name, "legacy")
    (tmp_path / "tokenizer.json").unlink()
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    options |= {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATES[name][0]}
    options |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (sample,) = encode(tmp_path, TURNS)
    expected = theirs.apply_chat_template(TURNS, return_dict=False)
    assert sample.ids == expected[: len(sample.ids)]
    assert sample.ids[-1] == theirs.eos_token_id


def test_special_tokens_that_take_the_whitespace_beside_them(tmp_path: Path) -> None:
    save_folder(tmp_path, CHATML)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|a|>", rstrip=True), AddedToken("<|b|>", lstrip=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    template = CHATML.replace("<|im_start|>assistant\n", "<|a|> \n").replace("<|im_end|>", " <|b|>")
    (tmp_path / "chat_template.jinja").write_text(template)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    expected = theirs.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=False)
    assert encode_prompt(get_template("chat", tokenizer), tokenizer, TURNS[:1]) == expected
    trick = tokenizer.protect("x <|b|> <|a|>\ny")
    assert not {*tokenizer.specials.values()} & set(tokenizer.encode(trick, False, special=True))


THINKING = "<think>\nlazy?\n</think>\n\nThe lazy one."
OPEN = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
# of Qwen3's kind: the thinking of earlier turns is dropped
FORGETS = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}"
)


@pytest.mark.parametrize(
    ("template", "answer", "expected"),
    [
        (
            CHATML.replace("<|im_start|>assistant\n", OPEN),
            THINKING,
            "lazy?\n</think>\n\nThe lazy one.",
        ),
        (
            CHATML.replace("<|im_start|>assistant\n", OPEN),
            "<think>lazy</think> A",
            "lazy</think> A",
        ),
        (CHATML.replace("<|im_start|>assistant\n", OPEN), "lazy</think> A", "lazy</think> A"),
        (CHATML.replace("<|im_start|>assistant\n", OPEN), "The lazy one.", None),
        (CHATML.replace("<|im_start|>assistant\n", CLOSED), "The lazy one.", "The lazy one."),
        (CHATML.replace("<|im_start|>assistant\n", CLOSED), "<b>lazy</b>", "<b>lazy</b>"),
        (CHATML.replace("<|im_start|>assistant\n", CLOSED), THINKING, None),
        (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n "), "A", "A"),
        (
            CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>{% endif"),
            "A",
            "assistant\nA",
        ),
        (CHATML.replace("<|im_start|>assistant\n", ""), "A", "<|im_start|>assistant\nA"),
        (CHATML.replace("<|im_start|>assistant\n", "<|im_start|>bot\n"), "A", None),
        (CHATML, THINKING, THINKING),
    ],
    ids=[
        *("thinks", "inline", "continues", "open", "closed", "tag", "both", "space", "header"),
        "none",
        "other",
        "plain",
    ],
)
def test_what_is_learned_continues_the_prompt(
    tmp_path: Path, template: str, answer: str, expected: str | None
) -> None:
    save_folder(tmp_path, template)
    tokenizer = Tokenizer(tmp_path)
    messages = [TURNS[0], {"role": "assistant", "content": answer}]
    if expected is None:
        with pytest.raises(UserError, match=r"here: the chat template .* --template"):
            encode(tmp_path, messages)
        return
    (sample,) = encode(tmp_path, messages)
    ((start, end),) = sample.spans
    prompt = encode_prompt(get_template("chat", tokenizer), tokenizer, messages[:1])
    assert sample.ids[:start] == prompt
    ids = tokenizer.encode(expected + "<|im_end|>", bos=False, special=True)
    assert sample.ids[start:end] == ids
    assert sample.ids.count(tokenizer.specials["<|im_end|>"]) == 2


def test_thinking_that_a_template_drops_is_learned(tmp_path: Path) -> None:
    for template in (R1, R1_THINKS):
        save_folder(tmp_path, template, "r1")
        (sample,) = encode(tmp_path, [TURNS[0], {"role": "assistant", "content": THINKING}])
        text = Backend.from_file(str(tmp_path / "tokenizer.json")).decode(sample.ids)
        assert text.endswith(f"dog?{THINKING}")  # special tokens are not shown
        assert text.count("<think>") == 1


def test_a_template_that_forgets_thinking_makes_a_sample_of_each_answer(tmp_path: Path) -> None:
    save_folder(tmp_path, FORGETS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [TURNS[0], {"role": "assistant", "content": THINKING}, *TURNS[2:]]
    samples = encode(tmp_path, messages)
    for sample, turn in zip(samples, (1, 3), strict=True):
        whole = theirs.apply_chat_template(messages[: turn + 1], return_dict=False)
        assert sample.ids == whole[: len(sample.ids)]
        prompt = theirs.apply_chat_template(
            messages[:turn], add_generation_prompt=True, return_dict=False
        )
        assert sample.spans == [(len(prompt), len(sample.ids))]
    assert len(encode(tmp_path, TURNS)) == 1  # there is nothing to forget


def test_a_token_across_the_end_of_a_prompt_is_cut(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n", "assistant: the")
    template = template.replace(
        "{{ m.role }}\n", "{{ m.role }}: {% if m.role == 'assistant' %}the{% endif %}"
    )
    save_folder(tmp_path, template)
    tokenizer = Tokenizer(tmp_path)
    messages = [TURNS[0], {"role": "assistant", "content": "n it jumps"}]
    (sample,) = encode(tmp_path, messages)
    prompt = encode_prompt(get_template("chat", tokenizer), tokenizer, messages[:1])
    assert tokenizer.encode(" then", bos=False) != tokenizer.encode(" the", bos=False)
    assert sample.ids[: sample.spans[0][0]] == prompt
    assert tokenizer.decode(sample.ids[slice(*sample.spans[0])]) == "n it jumps"


def test_turns_that_are_not_learned_are_prompt(tmp_path: Path) -> None:
    save_folder(tmp_path, CHATML)
    everything = encode(tmp_path, TURNS)[0]
    first = {**TURNS[1], "learn": False}
    (sample,) = encode(tmp_path, [TURNS[0], first, *TURNS[2:]])
    assert sample.ids == everything.ids
    assert sample.spans == everything.spans[1:]
    (sample,) = encode(tmp_path, [*TURNS[:3], {**TURNS[3], "learn": False}])
    assert sample.spans == everything.spans[:1]
    assert sample.ids == everything.ids[: sample.spans[0][1]]  # the rest teaches nothing
    with pytest.raises(UserError, match="there is no answer to learn"):
        encode(tmp_path, [TURNS[0], first])
    with pytest.raises(UserError, match="the answer is empty"):
        encode(tmp_path, [TURNS[0], {"role": "assistant", "content": " \n"}])


def test_plain_text_is_learned_as_a_whole(tmp_path: Path) -> None:
    save_folder(tmp_path, CHATML)
    tokenizer = Tokenizer(tmp_path)
    expected = [1, *tokenizer.encode("The fox", bos=False), 2]
    for text in ("The fox", "<s>The fox</s>"):
        (sample,) = encode(tmp_path, [{"role": "text", "content": text}], "none")
        assert sample.ids == expected
        assert sample.spans in ([(0, len(expected))], [(1, len(expected))])


def test_single_instructions_are_encoded_as_prompt_and_answer(tmp_path: Path) -> None:
    save_folder(tmp_path, CHATML)
    tokenizer = Tokenizer(tmp_path)
    messages = [{**TURNS[0], "input": "the quick fox"}, TURNS[1]]
    for name in ("alpaca", "none"):
        (sample,) = encode(tmp_path, messages, name)
        prompt = encode_prompt(get_template(name, tokenizer), tokenizer, messages[:1])
        answer = tokenizer.encode(TURNS[1]["content"], bos=False, eos=True)
        assert sample.ids == prompt + answer
        assert sample.spans == [(len(prompt), len(sample.ids))]
        with pytest.raises(UserError, match="holds a single instruction"):
            encode(tmp_path, TURNS, name)


def test_a_template_that_moves_the_system_message(tmp_path: Path) -> None:
    """Mistral's later ones put it before the last question, so before an answer it disappears."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n"
        "{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    save_folder(tmp_path, template)
    tokenizer = Tokenizer(tmp_path)
    (sample,) = encode(tmp_path, [SYSTEM, *TURNS[:2]])
    prompt = encode_prompt(get_template("chat", tokenizer), tokenizer, [SYSTEM, TURNS[0]])
    assert sample.ids[: sample.spans[0][0]] == prompt
    assert "Be short." in tokenizer.decode(prompt)
    assert tokenizer.decode(sample.ids[slice(*sample.spans[0])]) == " The lazy one."
    assert sample.ids[-1] == tokenizer.eos_id


def test_answers_that_follow_each_other_are_spans_of_their_own(tmp_path: Path) -> None:
    save_folder(tmp_path, SPACED)
    (sample,) = encode(tmp_path, [TURNS[0], TURNS[1], TURNS[3]])
    assert len(sample.spans) == 2
    assert sample.spans[0][1] == sample.spans[1][0]


def test_a_call_that_the_template_drops_is_no_answer(tmp_path: Path) -> None:
    save_folder(tmp_path, CHATML)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    with pytest.raises(UserError, match="here: the template renders an empty answer"):
        encode(tmp_path, [TURNS[0], call])


@pytest.mark.parametrize("kind", ["legacy", "metaspace"])
def test_an_answer_behind_a_space_gets_no_second_one(tmp_path: Path, kind: str) -> None:
    template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant: ")
    template = template.replace("{{ m.role }}\n", "{{ m.role }}: ")
    save_folder(tmp_path, template, kind=kind)
    tokenizer = Tokenizer(tmp_path)
    (sample,) = encode(tmp_path, TURNS[:2])
    ((_, end),) = sample.spans
    assert tokenizer.decode(sample.ids[:end]).endswith("assistant: The lazy one.")


@pytest.mark.parametrize("named", [True, False], ids=["eos_token", "not named"])
def test_an_end_token_that_is_not_special(tmp_path: Path, named: bool) -> None:
    """As `tokenizer.add_tokens` writes it: each answer is learned, and it separates them."""
    save_folder(tmp_path, CHATML)
    file, options = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8"))
    for entry in content["added_tokens"]:
        entry["special"] &= "im_" not in entry["content"]
    file.write_text(json.dumps(content), "utf-8")
    if named:
        settings = json.loads(options.read_text("utf-8")) | {"eos_token": "<|im_end|>"}
        options.write_text(json.dumps(settings), "utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (sample,) = encode(tmp_path, [SYSTEM, *TURNS])
    expected = theirs.apply_chat_template([SYSTEM, *TURNS], return_dict=False)
    assert sample.ids == expected[:-1]  # a newline
    answers = [TURNS[1]["content"], TURNS[3]["content"]]
    texts = [f"{text}<|im_end|>" for text in answers]
    assert learned(sample) == [theirs.encode(text, add_special_tokens=False) for text in texts]
    if named:  # in an answer it stays text
        quoting = [TURNS[0], {"role": "assistant", "content": "It is <|im_end|>, ok?"}]
        ((ids,),) = map(learned, encode(tmp_path, quoting))
        assert Tokenizer(tmp_path).decode(ids) == "It is <|im_end|>, ok?"
        assert ids.count(theirs.convert_tokens_to_ids("<|im_end|>")) == 1


def test_added_tokens_that_are_plain_stay_plain(tmp_path: Path) -> None:
    """added_tokens.json lists them without saying so; tokenizer.json does."""
    save_folder(tmp_path, CHATML)
    file = tmp_path / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.add_tokens(["<city>", "<think>"])
    backend.save(str(file))
    ids = {token: backend.token_to_id(token) for token in ("<city>", "<think>")}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids), "utf-8")
    messages = [{"role": "user", "content": "go to <city>"}, TURNS[1]]
    (sample,) = encode(tmp_path, messages)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert sample.ids == theirs.apply_chat_template(messages, return_dict=False)[:-1]
    assert Tokenizer(tmp_path).decode([ids["<city>"]]) == "<city>"


def test_an_end_token_that_is_in_the_vocabulary_only(tmp_path: Path) -> None:
    save_folder(tmp_path, CHATML)
    file, options = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8"))
    tokens = content["added_tokens"]
    content["added_tokens"] = [entry for entry in tokens if entry["content"] != "<|im_end|>"]
    content["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in tokens}
    file.write_text(json.dumps(content), "utf-8")
    settings = json.loads(options.read_text("utf-8")) | {"eos_token": "<|im_end|>"}
    options.write_text(json.dumps(settings), "utf-8")
    (sample,) = encode(tmp_path, TURNS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert sample.ids == theirs.apply_chat_template(TURNS, return_dict=False)[:-1]
    assert len(sample.spans) == 2
