"""Token ids against `tokenizers`, `transformers` and `sentencepiece`, special tokens included."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import ROOT, save_sentencepiece, save_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_llama import Tokenizer, UserError

SMOLLM2 = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
RECORDS = json.loads((ROOT / "scripts/quickstart_records.json").read_text("utf-8"))
TEXTS = [value for record in RECORDS for value in record.values() if value] + [
    "  two spaces, a tab\tand\r\nlines\n\n\n",
    "naïve café, Ελληνικά, русский, 日本語, 🦙🏽‍♂️",
    "<s>not a token</s> <|im_start|>user<|im_end|><unk><pad>",
    "1234567890 3.14159 x=y**2; // <0x0A> ▁ \u200b\x00",
    " ",
]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_sentencepiece(folder / "tokenizer.model", TEXTS[: len(RECORDS)], vocab_size=1000)
    return folder


def test_ids_of_tokenizer_model_are_sentencepieces(sentencepiece_folder: Path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    ours = Tokenizer(sentencepiece_folder)
    assert ours.vocab_size == 1000
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 2, True)
    for text in TEXTS:
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.encode(text, bos=False, eos=True) == [*theirs.encode(text), 2]
        assert ours.decode(ours.encode(text, eos=True)) == theirs.decode(theirs.encode(text))
        assert not {1, 2} & set(ours.encode(text, bos=False))


def test_ids_of_tokenizer_json_are_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    for text in TEXTS:
        expected = theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids
        assert ours.encode(text) == [1, *expected]
        assert ours.encode(text, bos=False, eos=True) == [*expected, 2]
        assert ours.decode(ours.encode(text)) == text
        marked = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, bos=False, special=True) == marked
        assert ours.encode(ours.protect(text), bos=False, special=True) == expected


def test_ids_of_smollm2_are_transformers() -> None:
    if not (SMOLLM2 / "tokenizer.json").is_file():
        pytest.skip("no SmolLM2-135M-Instruct in checkpoints/")
    theirs, ours = AutoTokenizer.from_pretrained(SMOLLM2), Tokenizer(SMOLLM2)
    assert not ours.adds_bos
    for text in TEXTS:
        expected = theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected
        assert ours.decode(expected) == text


def test_bos_and_eos_come_from_the_folders_own_files(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    options = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (3, 4, False)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": [2, 4], "vocab_size": 300}'
    )
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    (tmp_path / "config.json").unlink()
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (None, None, False)
    for flags, name in ((dict(bos=True), "BOS"), (dict(eos=True), "EOS")):
        with pytest.raises(UserError, match=f"no {name} token"):
            tokenizer.encode("a", **flags)


def test_bos_that_a_template_spells_out_is_not_doubled(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert (
        tokenizer.encode("<s>a", special=True)
        == tokenizer.encode("a")
        == [1, *tokenizer.encode("a", bos=False)]
    )


def test_folders_without_a_usable_tokenizer_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer.json and no tokenizer.model there"):
        Tokenizer(tmp_path)
    save_tokenizer(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        Tokenizer(tmp_path)


def test_named_chat_templates(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    templates = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer(tmp_path).chat_template == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    assert Tokenizer(tmp_path).chat_template == "C"


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    plain = Tokenizer(tmp_path).encode("the lazy dog " * 50)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(16)
    backend.enable_padding(length=900)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode("the lazy dog " * 50) == plain


def test_a_bos_setting_of_null_is_none_at_all(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": null}')
    assert not Tokenizer(tmp_path).adds_bos
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).adds_bos
    assert Tokenizer(tmp_path).encode("a")[0] == 1


def test_added_tokens_beside_tokenizer_model_are_special(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 1000, "<|im_end|>": 1001}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 1001, 1002)
    ids = tokenizer.encode("<|im_start|>user", bos=False, special=True)
    # no space after a special token, unless `legacy` is set
    backend = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert ids[0] == 1000
    assert "".join(backend.id_to_piece(ids[1:])) == "user"
    assert tokenizer.decode([*ids, 1001]) == "user"
    assert 1000 not in tokenizer.encode("<|im_start|>user")


def test_decoding_of_tokenizer_model(sentencepiece_folder: Path, tmp_path: Path) -> None:
    """As sentencepiece decodes; added tokens that are not special, such as tags, are text."""
    shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
    entries = {
        "1000": {"content": "<think>", "special": False},
        "1001": {"content": "<|im_end|>", "special": True},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    tokenizer = Tokenizer(tmp_path)
    backend = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in TEXTS:
        ids = [1, *backend.encode(text), 2]
        assert tokenizer.decode(ids) == backend.decode(ids)
    generator = torch.Generator().manual_seed(1)
    for ids in torch.randint(backend.vocab_size(), (50, 20), generator=generator).tolist():
        assert tokenizer.decode(ids) == backend.decode(ids)
    first, second = backend.encode("What"), backend.encode("gold")
    assert tokenizer.decode([*first, 1000, *second, 1001]) == "What<think> gold"
    assert tokenizer.specials["<unk>"] == 0  # as in a tokenizer.json of it


def test_words_start_with_a_space_only_at_the_start_of_the_text(tmp_path: Path) -> None:
    """Metaspace with prepend_scheme "first", as Mistral's newer files have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], show_progress=False
    )
    backend.train_from_iterator(TEXTS[: len(RECORDS)], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs, ours = (
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
        Tokenizer(tmp_path),
    )
    for text in ("<s>[INST]What is gold?[/INST]A metal</s>", "What[INST] is", "gold", "[INST]"):
        assert (
            ours.encode(text, bos=False, special=True)
            == theirs(text, add_special_tokens=False).input_ids
        )
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=False) == expected
