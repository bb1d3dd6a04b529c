"""No code from data: pickles, chat templates, configs and paths in files that strangers have made.

Each attack is tried on a careless reader, too: one that does nothing there proves nothing here.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import pytest
import torch
import yaml
from conftest import ROOT, load_script, save_checkpoint_folder, save_tokenizer
from safetensors.torch import save_file
from test_convert import byte_level_bpe, noisy, save_gguf

from lit_llama import Tokenizer, UserError, load_model
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.prompts import get_template
from lit_llama.runtime.cli import run
from lit_llama.storage.run_folder import read_flags

MARKER = "/MARKER/"  # in an attack: a path that must not come into being
BASE, LORA, UPLOAD = "generate/base.py", "generate/lora.py", "scripts/upload.py"
script = cache(lambda name: load_script(name).main)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a script in this process; return its error line, "" if there is none."""

    def call(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        try:
            run(script(name))
        except SystemExit as ended:
            assert ended.code in (1, 2)  # noqa: PT017
            lines = capsys.readouterr().err.splitlines()
            (line,) = [line for line in lines if line.startswith("error: ")]
            return line
        return ""

    return call


# --- pickles: attacks in opcodes, as a file from the hub would hold them


class Call(NamedTuple):
    """A call of "module:function" in a pickle."""

    function: "str | Call"
    arguments: tuple = ()


def opcodes(value: object) -> bytes:
    """Pickle's protocol 2, without head and end."""
    if isinstance(value, Call):
        name = value.function
        if isinstance(name, str):
            function = "c{}\n{}\n".format(*name.split(":")).encode()
        else:
            function = opcodes(name)
        return function + opcodes(value.arguments) + b"R"
    if isinstance(value, tuple | list):
        start, end = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
        return start + b"".join(map(opcodes, value)) + end
    if isinstance(value, dict):
        pairs = (opcodes(key) + opcodes(item) for key, item in value.items())
        return b"}(" + b"".join(pairs) + b"u"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little")
    text = str(value).encode()
    return b"X" + len(text).to_bytes(4, "little") + text


def pickled(value: object) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def ways(marker: Path) -> dict[str, Call]:
    """Attacks, each of which makes `marker`."""
    touch, write, path = f"touch {marker}", f"open({str(marker)!r}, 'w').close()", str(marker)
    system = Call("os:system", (touch,))
    module = Call("importlib:import_module", ("os",))
    method = Call("operator:methodcaller", ("system", touch))
    posix = Call("pathlib:PosixPath", (path,))
    write_text = Call("builtins:getattr", (posix, "write_text"))
    return {
        "os.system": system,
        "posix.system": Call("posix:system", (touch,)),
        "exec": Call("builtins:exec", (write,)),
        "eval": Call("builtins:eval", (write,)),
        "eval of Python 2": Call("__builtin__:eval", (write,)),
        "open": Call("builtins:open", (path, "w")),
        "importlib": Call(Call("builtins:getattr", (module, "system")), (touch,)),
        "subprocess": Call("subprocess:check_output", (["touch", path],)),
        "methodcaller": Call(method, (module,)),
        "pathlib": Call(write_text, ("x",)),
        "numpy.f2py": Call("numpy.f2py.crackfortran:myeval", (write,)),
        "torch.utils.collect_env": Call("torch.utils.collect_env:run", (touch,)),
        "in an allowed call": Call("collections:OrderedDict", ([["w", system]],)),
    }


def in_zip(value: object) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        parts = {"data.pkl": pickled(value), "byteorder": b"little", "version": b"3\n"}
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def old_torch(value: object) -> bytes:
    """The format before torch 1.6: pickles one after the other."""
    out = io.BytesIO()
    torch.save({}, out, _use_new_zipfile_serialization=False)
    head = out.getvalue()[: out.getvalue().rindex(b"\x80\x02}q\x00.")]
    return head + pickled(value) + pickled([])


FORMS = {"zip": in_zip, "old torch": old_torch, "a pickle alone": pickled}
WAYS = tuple(ways(Path("none")))
PLACES = {  # where the pickle is, and who reads it
    "bin/pytorch_model.bin": (BASE, "--checkpoint_dir={}/bin", "--prompt=Hi"),
    "shards/model-1.bin": (BASE, "--checkpoint_dir={}/shards", "--prompt=Hi"),
    "meta/consolidated.00.pth": (
        *("scripts/convert_meta_checkpoint.py", "--source={}/meta", "--out_dir={}/out"),
    ),
    "lit.pth": ("scripts/convert_lit_checkpoint.py", "--source={}/lit.pth", "--out_dir={}/out"),
    "lora/adapter_model.bin": (LORA, "--lora_path={}/lora", "--prompt=Hi"),
    "lora/adapter_model.safetensors": (LORA, "--lora_path={}/lora", "--prompt=Hi"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders in which one file is missing: the pickle."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("bin", "shards", "base"):
        save_checkpoint_folder(folder / name)
    (folder / "bin/model.safetensors").unlink()
    (folder / "shards/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-1.bin"}}
    (folder / "shards/pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "meta").mkdir()
    (folder / "meta/params.json").write_text("{}")
    (folder / "lora").mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    settings["base_model_name_or_path"] = str(folder / "base")
    (folder / "lora/adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_no_pickle_runs_code(
    tmp_path: Path, places: Path, refused: Callable, monkeypatch, way: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a switch that must not matter
    marker = tmp_path / "marker"
    attack, forms = ways(marker)[way], list(FORMS.values())
    for number, (place, words) in enumerate(PLACES.items(), start=WAYS.index(way)):
        (places / place).write_bytes(forms[number % len(forms)](attack))
        line = refused(*(word.replace("{}", str(places)) for word in words))
        assert str(places) in line, place
        assert not marker.exists(), place
        (places / place).unlink()
    assert not (places / "out").exists()


CARELESS = """
import pathlib, sys, torch
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        torch.load(file, weights_only=False)
    except BaseException:
        pass  # once it has run it may fail
"""


def test_a_careless_reader_runs_these_pickles(tmp_path: Path) -> None:
    files, expected = tmp_path / "files", set()
    files.mkdir()
    for way in WAYS:
        for number, make in enumerate(FORMS.values()):
            marker = tmp_path / f"{WAYS.index(way)}-{number}"
            if make is not pickled:  # torch itself refuses a pickle alone
                (files / marker.name).write_bytes(make(ways(marker)[way]))
                expected.add(marker)
    subprocess.run([sys.executable, "-c", CARELESS, files], check=True, capture_output=True)
    assert {path for path in tmp_path.iterdir() if path != files} == expected


def test_checkpoints_are_read_as_safetensors_only(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, refused: Callable
) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    flags = ["finetune/lora.py", f"--checkpoint_dir={tiny_checkpoint}", f"--data_dir={tiny_data}"]
    flags += [f"--out_dir={out}", "--train.batch_size=2"]
    assert refused(*flags, "--train.max_steps=1") == ""
    attack = in_zip({"w": ways(marker)["os.system"]})
    for name in ("state.pt", "optimizer.bin", "rng_state.pth"):  # never read
        (out / "step-000001" / name).write_bytes(attack)
    assert refused(*flags, "--train.max_steps=2", "--resume") == ""
    shutil.rmtree(out / "step-000001")
    (file,) = (out / "step-000002").glob("state-*.safetensors")
    (out / "step-000002/checksums.txt").unlink()
    file.write_bytes(attack)
    assert str(out) in refused(*flags, "--train.max_steps=3", "--resume")
    assert not marker.exists()


# --- chat templates


def render(folder: Path, template: str, turns: list[dict[str, str]]) -> str:
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return get_template("chat", Tokenizer(folder)).render(turns)


RUN = f".__globals__['__builtins__']['__import__']('os').system('touch {MARKER}')"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ()['__cla' ~ 'ss__'].__base__ }}",
    "{{ ''|attr('__cla' ~ 'ss__')|attr('__mro__') }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ [{}]|map('attr', '__class__')|list }}",
    "{{ ['']|groupby('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__" + RUN + " }}",
    "{{ lipsum['__glo' ~ 'bals__']['os'].system('touch " + MARKER + "') }}",
    "{{ (lipsum|attr('__globals__'))['os'].system('touch " + MARKER + "') }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception" + RUN + " }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{% macro m() %}{% endmacro %}{{ m._func" + RUN + " }}",
    "{{ nothing.__init__" + RUN + " }}",
    "{% for x in [1] %}{{ loop.__init__" + RUN + " }}{% endfor %}",
    "{{ ([1]|map('int')).gi_frame.f_globals }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "{{ messages[0].update(content='other') }}",
    "{% include '/etc/passwd' %}",
    "{% from 'tokenizer.json' import x %}",
    "{% extends '/etc/passwd' %}",
    "{{ raise_exception('\\x1b[2J line one \\n line two') }}",
]
LEAK = re.compile(r"<class|<module|<frame|<bound|<code|root:|\"added_tokens\"|environ\(|<jinja2")
TURNS = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_chat_template_escapes(tmp_path: Path, escape: str) -> None:
    marker, turns = tmp_path / "marker", [dict(turn) for turn in TURNS]
    line, text = str(tmp_path), ""
    try:
        text = render(tmp_path, escape.replace(MARKER, str(marker)), turns)
    except UserError as error:
        line = str(error)
    assert line.isprintable()  # one line, and nothing that a terminal obeys
    assert str(tmp_path) in line
    assert not LEAK.search(text)
    assert re.sub(r"None|Undefined|''|[\[\](), ]", "", text).strip() == ""
    assert not marker.exists()
    assert turns == TURNS


def test_most_of_these_escape_from_plain_jinja(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('"added_tokens"')
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader([tmp_path, "/"]))
    escaped = 0
    for number, escape in enumerate(ESCAPES):
        marker, turns = tmp_path / f"marker{number}", [dict(turn) for turn in TURNS]
        values = dict(raise_exception=lambda reason: None, strftime_now=lambda form: "")
        text = ""
        try:
            template = environment.from_string(escape.replace(MARKER, str(marker)))
            text = template.render(messages=turns, **values)
        except Exception:
            text = ""
        escaped += text.strip() not in ("", "None") or marker.exists() or turns != TURNS
    assert escaped > 0.8 * len(ESCAPES)


def test_messages_are_not_templates(tmp_path: Path) -> None:
    text = "{{ 7 * 7 }}{% for x in range(3) %}a{% endfor %}{# #}"
    turns = [{"role": "user", "content": text}]
    assert render(tmp_path, "{{ messages[0].content }}", turns) == text


# --- code and paths in configs


def test_code_in_a_model_folder_is_not_run(tmp_path: Path, refused: Callable, monkeypatch) -> None:
    folder, marker, lora = tmp_path / "model", tmp_path / "marker", tmp_path / "lora"
    save_checkpoint_folder(folder)
    for name in ("modeling_x", "tokenization_x", "sitecustomize", "jinja2", "torch", "__init__"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values |= {"auto_map": {"AutoConfig": "modeling_x.X"}, "trust_remote_code": True}
        (folder / name).write_text(json.dumps(values))
    model, config = load_model(folder), LoRAConfig()
    apply_lora(model, config)
    save_lora(dict(model.named_parameters()), lora, config, base_model=str(folder))
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["auto_mapping"] = {"base_model_class": "X", "parent_library": "modeling_x"}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(folder)
    ask = ("--prompt=Hi", "--max_new_tokens=2")
    assert refused(BASE, f"--checkpoint_dir={folder}", *ask) == ""
    assert refused(LORA, f"--lora_path={lora}", *ask) == ""
    assert not marker.exists()


def test_no_yaml_runs_code(tmp_path: Path, refused: Callable) -> None:
    marker, config = tmp_path / "marker", tmp_path / "config.yaml"
    attack = f"!!python/object/apply:os.mkdir ['{marker}']"
    yaml.unsafe_load(attack)
    marker.rmdir()
    for text in (attack, f"prompt: {attack}", f"lora_path: [{attack}]"):
        config.write_text(text)
        assert refused(LORA, "--config", config)  # as text at most, for which there is no LoRA
        assert not marker.exists()
        with pytest.raises(UserError, match=str(config)):
            read_flags(tmp_path)
        assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "{}/x.safetensors", "a/../../x.safetensors", "..", ".", ""]
)
def test_no_index_leads_out_of_its_folder(tmp_path: Path, refused: Callable, name: str) -> None:
    folder = tmp_path / "model"
    save_checkpoint_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = {"weight_map": {"model.norm.weight": name.replace("{}", str(tmp_path))}}
        (folder / f"{kind}.index.json").write_text(json.dumps(index))
        line = refused(BASE, f"--checkpoint_dir={folder}", "--prompt=Hi")
        assert str(folder) in line
        (folder / f"{kind}.index.json").unlink()


def test_gguf_metadata_names_no_path(tmp_path: Path, refused: Callable) -> None:
    outside, out = tmp_path / "outside", tmp_path / "sub/out"

    def add(writer) -> None:
        byte_level_bpe(tmp_path)(writer)
        for key in ("general.basename", "split.path", "tokenizer.huggingface.json"):
            writer.add_string(key, str(outside))

    save_gguf(noisy(vocab_size=300), tmp_path / "model.gguf", add)
    before = set(tmp_path.iterdir())
    source = tmp_path / "model.gguf"
    convert = "scripts/convert_gguf_checkpoint.py"
    assert refused(convert, f"--source={source}", f"--out_dir={out}") == ""
    assert set(tmp_path.iterdir()) - before == {tmp_path / "sub"}
    names = {file.name for file in out.iterdir()}
    assert names <= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "adapter"])
def test_no_link_uploads_what_is_outside(tmp_path: Path, refused: Callable, name: str) -> None:
    lora, outside = tmp_path / "lora", tmp_path / "outside"
    lora.mkdir()
    settings = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}'
    (lora / "adapter_config.json").write_text(settings)
    save_file({}, lora / "adapter_model.safetensors")
    flags = (f"--path={lora}", "--repo_id=me/x", "--base_model=a/b", "--dry_run")
    assert refused(UPLOAD, *flags) == ""
    if name == "adapter":
        shutil.copytree(lora, outside)
    else:
        (lora / name).touch()
        (lora / name).rename(outside)
    (lora / name).symlink_to(outside)
    assert re.search(rf"{lora}/{name}.* is a link out of this folder", refused(UPLOAD, *flags))
    if name != "adapter":  # a link within the folder is fine
        (lora / name).unlink()
        outside.rename(lora / "kept")
        (lora / name).symlink_to("kept")
        assert refused(UPLOAD, *flags) == ""


BAD_NAMES = [
    *("../model.safetensors", "/model.safetensors", "a/model.safetensors", "..\\model.safetensors"),
    *("model\0.safetensors", "model*.safetensors", "model?.safetensors", "model\n.safetensors"),
    *("model .safetensors", "model.safetensors/", "", ".", "..", "../config.json", "/etc/passwd"),
    *("./config.json", "adapter/../config.json", "model.safetensors.py", "pytorch_model.bin.exe"),
    *("modeling.py", "tokenizer.model/../x", "~/config.json", "model:x.safetensors"),
]


def test_only_proper_names_are_downloaded() -> None:
    needed = load_script("scripts/hub.py").files_needed
    good = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert needed([*BAD_NAMES, *good]) == good


# --- the source and SECURITY.md

FOLDERS = ("lit_llama", "finetune", "generate", "scripts", "evaluate", "benchmarks")


def test_sources_ask_for_safe_readers_and_explain_exceptions() -> None:
    """ruff's rules S find pickle, eval, yaml.load and the like; these it does not know."""
    for file in [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]:
        text = file.read_text("utf-8")
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, file
        assert "trust_remote_code=True" not in text, file
        lines = text.splitlines()
        for before, line in zip(["", *lines], lines, strict=False):
            if rule := re.search(r"# noqa: S\d+(.*)", line):
                assert rule[1].strip() or before.lstrip().startswith("#"), f"{file}: {line}"


def test_security_md_names_what_is_tested() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    for name in (".bin", ".pth", "chat_template", "config.yaml", "index.json", "GGUF", "auto_map"):
        assert name in text
    for path in re.findall(r"`((?:lit_llama|scripts|evaluate|generate|tests)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
