"""No code from data: pickles, chat templates, configs and paths in files that somebody else has made, made to attack.

Each attack is tried on a reader without care too: one that does nothing there would prove nothing here.
"""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import pytest
import torch
import yaml
from bad_input import peak_bytes, reset_peak
from conftest import ROOT, load_script, save_checkpoint_folder, save_tokenizer
from safetensors.torch import save_file
from test_convert import byte_level_bpe, noisy, save_gguf

from lit_llama import Tokenizer, UserError, cli, load_model, prompts
from lit_llama.lora import LoRAConfig, apply_lora, save_lora
from lit_llama.prompts import get_template

MARKER = "/MARKER/"  # in an attack: stands for a path that must not come into being
BASE, LORA = "generate/base.py", "generate/lora.py"


@cache
def script(name: str) -> Callable:
    return load_script(name).main


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a script in here: the one line that it ends with, or "" where nothing is wrong."""

    def run(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        try:
            cli.run(script(name))
        except SystemExit as ended:
            assert ended.code in (1, 2)  # noqa: PT017
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1
            return lines[0]
        return ""

    return run


# --- pickles: an attack in opcodes, as it would come, whatever this machine's Python can pickle by itself


class Global(NamedTuple):
    """A function by name, as a pickle refers to it."""

    module: str
    name: str


class Call:
    """What a pickle has called while it is read."""

    def __init__(self, function: "str | Global | Call", *arguments: object) -> None:
        self.function = Global(*function.split(":")) if isinstance(function, str) else function
        self.arguments = arguments


def opcodes(value: object) -> bytes:
    """Pickle's protocol 2, without head and end."""
    if isinstance(value, Global):
        return b"c%s\n%s\n" % (value.module.encode(), value.name.encode())
    if isinstance(value, Call):
        return opcodes(value.function) + opcodes(value.arguments) + b"R"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
    if isinstance(value, bytes):
        return opcodes(Call("_codecs:encode", value.decode("latin1"), "latin1"))
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little")
    if value is None:
        return b"N"
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def pickled(value: object) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


def of_module(module: str, name: str) -> Call:
    return Call("builtins:getattr", Call("importlib:import_module", module), name)


def ways(marker: Path) -> dict[str, Call]:
    """Attacks, each of which makes `marker`."""
    touch, write, system = (
        f"touch {marker}",
        f"open({str(marker)!r}, 'w').close()",
        Call("os:system", f"touch {marker}"),
    )
    inner, path = pickled(system), str(marker)
    Path(f"{marker}.py").write_text(f"{write}\ndef f(): pass\n")
    state = {"x": Call("builtins:list", [system])}
    return {
        "torch.utils.cpp_extension": Call(
            Call("builtins:getattr", of_module("torch.utils.cpp_extension", "subprocess"), "getoutput"), touch
        ),
        "os.system": system,
        "posix.system": Call("posix:system", touch),
        "os.popen": Call("os:popen", touch),
        "os.mkdir": Call("os:mkdir", path),
        "os.spawnlp": Call("os:spawnlp", 0, "touch", "touch", path),
        "builtins.exec": Call("builtins:exec", write),
        "builtins.eval": Call("builtins:eval", write),
        "__builtin__.eval of Python 2": Call("__builtin__:eval", write),
        "builtins.open": Call("builtins:open", path, "w"),
        "builtins.__import__": Call(Call("builtins:getattr", Call("builtins:__import__", "os"), "system"), touch),
        "importlib": Call(of_module("os", "system"), touch),
        "subprocess.Popen": Call("subprocess:Popen", ["touch", path]),
        "subprocess.check_output": Call("subprocess:check_output", ["touch", path]),
        "subprocess.getoutput": Call("subprocess:getoutput", touch),
        "functools.partial": Call(Call("functools:partial", Global("os", "system")), touch),
        "operator.methodcaller": Call(
            Call("operator:methodcaller", "system", touch), Call("importlib:import_module", "os")
        ),
        "types.FunctionType": Call(
            Call("types:FunctionType", Call("builtins:compile", f"__import__('os').system({touch!r})", "f", "exec"), {})
        ),
        "runpy": Call("runpy:run_path", f"{marker}.py"),
        "pathlib": Call(Call("builtins:getattr", Call("pathlib:PosixPath", path), "write_text"), "x"),
        "shutil.copy": Call("shutil:copy", os.devnull, path),
        "logging.FileHandler": Call("logging:FileHandler", path),
        "sqlite3.connect": Call(
            Call("builtins:getattr", Call("sqlite3:connect", path), "execute"), "create table t (x int)"
        ),
        "zipfile.ZipFile": Call("zipfile:ZipFile", path, "w"),
        "urllib.request": Call("urllib.request:urlretrieve", "data:,x", path),
        "webbrowser": Call(Call("builtins:getattr", Call("webbrowser:GenericBrowser", ["touch", "%s"]), "open"), path),
        "pip.main": Call("pip:main", ["--quiet", "--log", path, "config", "list"]),
        "pty.spawn": Call("pty:spawn", ["touch", path]),
        "timeit.timeit": Call("timeit:timeit", write, "pass", Global("time", "perf_counter"), 1),
        "cProfile.run": Call("cProfile:run", write, os.devnull),
        "pickle.loads": Call("pickle:loads", inner),
        "numpy.load": Call("numpy:load", Call("io:BytesIO", inner), None, Global("builtins", "True")),
        "numpy object array": Call("numpy:array", [system], "O"),
        "numpy.f2py": Call("numpy.f2py.crackfortran:myeval", f"__import__('os').system({touch!r})"),
        "torch.load": Call("torch:load", Call("io:BytesIO", inner), None, Call("importlib:import_module", "pickle")),
        "torch.storage._load_from_bytes": Call("torch.storage:_load_from_bytes", inner),
        "torch.hub": Call("torch.hub:_import_module", "hubconf", f"{marker}.py"),
        "torch.utils.collect_env": Call("torch.utils.collect_env:run", touch),
        "torch.jit execWrapper": Call("torch.jit.unsupported_tensor_ops:execWrapper", write, {}, {}),
        "torch datapipes": Call("torch.utils.data.datapipes.utils.decoder:basichandlers", "pickle", inner),
        "beside an allowed call": Call("collections:OrderedDict", [["w", system]]),
        "in an allowed call's state": Call("torch._utils:_rebuild_parameter_with_state", system, 0, {}, state),
    }


def in_zip(value: object, more: dict[str, bytes] = {}, top: str = "archive") -> bytes:  # noqa: B006
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        files = {"data.pkl": pickled(value), "byteorder": b"little", "version": b"3\n"} | more
        for name, content in files.items():
            archive.writestr(f"{top}/{name}", content)
    return out.getvalue()


def old_torch(value: object) -> bytes:
    """The format before torch 1.6: pickles one after the other."""
    out = io.BytesIO()
    torch.save({}, out, _use_new_zipfile_serialization=False)
    head = out.getvalue()[: out.getvalue().rindex(b"\x80\x02}q\x00.")]
    return head + pickled(value) + pickled([])


def in_tar(value: object) -> bytes:
    """The format before torch 0.1.10."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in (("storages", pickled(0) + pickled([])), ("tensors", pickled(0)), ("pickle", pickled(value))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def by_persistent_id(value: object) -> bytes:
    """The attack where the name of a tensor's storage is due."""
    data = b"\x80\x02" + opcodes(("storage", value, "0", "cpu", 1)) + b"Q."
    return in_zip(0, {"data.pkl": data, "data/0": bytes(4)})


def by_memo(value: object) -> bytes:
    """The attack in protocol 5, with frames, memo and names from the stack."""
    body = b"\x80\x05\x95" + (len(opcodes(value)) + 4).to_bytes(8, "little") + opcodes(value) + b"\x94h\x00."
    return in_zip(0, {"data.pkl": body})


FORMS: dict[str, Callable[[object], bytes]] = {
    "zip": lambda attack: in_zip({"w": attack}),
    "old torch": lambda attack: old_torch({"w": attack}),
    "a pickle alone": pickled,
    "tar": in_tar,
    "persistent id": by_persistent_id,
    "protocol 5": by_memo,
    "TorchScript": lambda attack: in_zip(attack, {"constants.pkl": pickled((attack,))}),
    "two tops": lambda attack: in_zip({}) + in_zip(attack, top="other"),
}
WAYS = tuple(ways(Path(os.devnull)))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders in which one file is missing: that with the pickle."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("bin", "shards", "lora", "adapter"):
        save_checkpoint_folder(folder / name)
    (folder / "bin/model.safetensors").unlink()
    (folder / "shards/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "shards/pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "meta").mkdir()
    (folder / "meta/params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}')
    (folder / "peft").mkdir()
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": str(folder / "lora")}
    (folder / "peft/adapter_config.json").write_text(json.dumps(settings))
    return folder


PLACES = {  # where the pickle lies, and who reads it
    "bin/pytorch_model.bin": (BASE, "--checkpoint_dir", "{}/bin", "--prompt", "Hi"),
    "shards/pytorch_model-00001-of-00001.bin": (BASE, "--checkpoint_dir", "{}/shards", "--prompt", "Hi"),
    "meta/consolidated.00.pth": ("scripts/convert_meta_checkpoint.py", "--source", "{}/meta", "--out_dir", "{}/out"),
    "lit.pth": ("scripts/convert_lit_checkpoint.py", "--source", "{}/lit.pth", "--out_dir", "{}/out"),
    "peft/adapter_model.bin": (LORA, "--lora_path", "{}/peft", "--prompt", "Hi"),
    "peft/adapter_model.safetensors": (LORA, "--lora_path", "{}/peft", "--prompt", "Hi"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_no_pickle_runs_code(tmp_path: Path, places: Path, refused: Callable, way: str) -> None:
    marker = tmp_path / "marker"
    attack = ways(marker)[way]
    turn = WAYS.index(way)  # each way in every form and in every place, and all of these with each other in turn
    for number, (form, make) in enumerate(FORMS.items(), start=turn):
        place, words = list(PLACES.items())[number % len(PLACES)]
        (places / place).write_bytes(make(attack))
        line = refused(*(word.replace("{}", str(places)) for word in words))
        assert str(places) in line, (place, form)
        assert not marker.exists(), (place, form)
        (places / place).unlink()
    assert not (places / "out").exists()


CARELESS = """
import importlib, pathlib, pickle, sys, time, warnings
import torch
warnings.simplefilter("ignore")
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    marker = pathlib.Path(sys.argv[2], file.name.rpartition("-")[0])
    load = pickle.load if file.suffix == ".pkl" else lambda f: torch.load(f, weights_only=False)
    try:
        with file.open("rb") as handle:
            load(handle)
    except BaseException:
        pass  # once it has run it may fail
time.sleep(0.5)  # for those that do not wait for what they start
"""


def test_these_pickles_run_code_where_one_reads_without_care(tmp_path: Path) -> None:
    files, markers = tmp_path / "files", tmp_path / "markers"
    files.mkdir()
    markers.mkdir()
    expected = set()
    for number, way in enumerate(WAYS):
        marker = markers / f"way{number:02}"
        (files / f"way{number:02}-.pkl").write_bytes(pickled(ways(marker)[way]))
        expected.add(marker.name)
    for number, (form, make) in enumerate(FORMS.items()):
        if form not in ("TorchScript", "two tops"):  # torch goes to other readers with these
            marker = markers / f"form{number}"
            (files / f"form{number}-.pt").write_bytes(make(ways(marker)["os.system"]))
            expected.add(marker.name)
    subprocess.run([sys.executable, "-c", CARELESS, files, markers], cwd=tmp_path, check=True, capture_output=True)
    assert {path.name for path in markers.iterdir()} - {"__pycache__"} - {f"{name}.py" for name in expected} == expected


def test_torchs_own_switch_for_careless_reading_changes_nothing(
    tmp_path: Path, places: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (places / "bin/pytorch_model.bin").write_bytes(in_zip({"w": ways(tmp_path / "marker")["os.system"]}))
    assert "refused" in refused(BASE, "--checkpoint_dir", places / "bin", "--prompt", "Hi")
    assert not (tmp_path / "marker").exists()


def test_training_states_are_read_as_safetensors_alone(
    tmp_path: Path, tiny_checkpoint: Path, tiny_data: Path, refused: Callable
) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    flags = ["finetune/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data_dir", tiny_data, "--out_dir", out]
    flags += ["--train.batch_size", 2, "--train.save_interval", 1]
    assert refused(*flags, "--train.max_steps", 1) == ""
    step = out / "step-000001"
    attack = in_zip({"w": ways(marker)["os.system"]})
    names = ("state.pt", "state.pth", "state.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "state.ckpt")
    for name in names:
        (step / name).write_bytes(attack)
        (out / name).write_bytes(attack)
    assert refused(*flags, "--train.max_steps", 2, "--resume") == ""  # they are not read at all
    assert not marker.exists()
    (file,) = (out / "step-000002").glob("state-*.safetensors")
    for make in FORMS.values():
        shutil.rmtree(step, ignore_errors=True)
        file.write_bytes(make(ways(marker)["os.system"]))
        assert str(out) in refused(*flags, "--train.max_steps", 3, "--resume")
        assert not marker.exists()


# --- chat templates


def render(folder: Path, template: str, turns: list[dict[str, str]] | None = None) -> str:
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    return get_template("chat", Tokenizer(folder)).render(turns or [{"role": "user", "content": "Hi"}])


OS = "__globals__['__builtins__']['__import__']('os')"
RUN = f".{OS}.system('touch {MARKER}')"
ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ()['__cla' ~ 'ss__'].__base__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' ~ 'ss__')|attr('__mro__') }}",
    "{{ ''|attr(['__class', '__']|join) }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ [{}]|map('attr', '__class__')|list }}",
    "{{ ['']|groupby('__class__') }}",
    "{{ ['']|map(attribute='__class__.__mro__')|list }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ('{0.__class__}'['format'])('') }}",
    "{{ '%s' % ''.__class__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].keys.__self__.__class__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch " + MARKER + "') }}",
    "{{ joiner.__init__.__globals__.os.system('touch " + MARKER + "') }}",
    "{{ namespace.__init__.__globals__.os.system('touch " + MARKER + "') }}",
    "{{ lipsum.__globals__.os.system('touch " + MARKER + "') }}",
    "{{ lipsum['__glo' ~ 'bals__']['os'].popen('touch " + MARKER + "').read() }}",
    "{{ (lipsum|attr('__globals__'))['os'].system('touch " + MARKER + "') }}",
    "{{ self.__init__" + RUN + " }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception" + RUN + " }}",
    "{{ strftime_now" + RUN + " }}",
    "{{ raise_exception.__closure__ }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ cycler('a').next.__func__" + RUN + " }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ range.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__" + RUN + " }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% set n = namespace() %}{{ n._Namespace__attrs.__class__ }}",
    "{{ nothing.__init__" + RUN + " }}",
    "{{ (nothing|attr('_fail_with_undefined_error')).__globals__ }}",
    "{% for x in [1] %}{{ loop._iterator.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop.__init__" + RUN + " }}{% endfor %}",
    "{% for x in (1, 2)|batch(1) %}{{ x.__class__ }}{% endfor %}",
    "{{ [1]|map('int')|attr('gi_frame') }}",
    "{{ ([1]|map('int')).gi_frame.f_globals }}",
    "{{ ([1]|map('int')).gi_code.co_consts }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ caller.__class__ }}",
    "{{ messages.append({'role': 'user', 'content': 'more'}) }}",
    "{{ messages.clear() }}",
    "{{ messages.pop() }}",
    "{{ messages[0].update(content='other') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{{ messages[0].pop('content') }}",
    "{% set _ = messages.__setitem__(0, 1) %}",
    "{{ (messages|attr('append'))(1) }}",
    "{% include '/etc/passwd' %}",
    "{% include 'tokenizer.json' %}",
    "{% import '/etc/passwd' as x %}",
    "{% from 'tokenizer.json' import x %}",
    "{% extends '/etc/passwd' %}",
    "{% do messages.append(1) %}",
    "{{ raise_exception('\\x1b[2J line one \\n line two') }}",
]
LEAK = re.compile(
    r"<class|<module|<frame|<bound|<code|__main__|root:|\"added_tokens\"|co_|environ\(|<jinja2|<list_iterator"
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_chat_template_gets_out(tmp_path: Path, escape: str) -> None:
    marker, turns = tmp_path / "marker", [{"role": "user", "content": "Hi"}]
    line = ""
    try:
        text = render(tmp_path, escape.replace(MARKER, str(marker)), turns)
    except UserError as error:
        line = str(error)
    if line:
        assert line.isprintable()  # one line, and nothing that a terminal obeys
        assert len(line) < 1000
        assert str(tmp_path / "chat_template.jinja") in line
    else:
        assert not LEAK.search(text)
        assert re.sub(r"None|Undefined|''|[\[\](), ]", "", text).strip() == ""
    assert not marker.exists()
    assert turns == [{"role": "user", "content": "Hi"}]


def test_most_of_these_get_out_of_plain_jinja(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('"added_tokens"')
    loader = jinja2.FileSystemLoader([tmp_path, "/"])
    environment = jinja2.Environment(loader=loader, extensions=["jinja2.ext.do"])
    out = 0
    for number, escape in enumerate(ESCAPES):
        marker, turns = tmp_path / f"marker{number}", [{"role": "user", "content": "Hi"}]
        given = dict(messages=turns, raise_exception=lambda reason: None, strftime_now=lambda form: "")
        try:
            text = environment.from_string(escape.replace(MARKER, str(marker))).render(given)
        except Exception:
            text = ""
        out += bool(text.strip() not in ("", "None") or marker.exists() or turns != [{"role": "user", "content": "Hi"}])
    assert out > 0.8 * len(ESCAPES)


BOMBS = [
    "{{ 'a' * 10**10 }}",
    "{{ ('a' * 10**10)|length }}",
    "{% set x = ['a'] * 10**10 %}",
    "{{ 10**(10**10) }}",
    "{% set ns = namespace(x=9**9999) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 64,
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaa{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '\\t'.expandtabs(10**10) }}",
    "{{ 'a'|indent(10**10, true) }}",
    "{{ ('a' * 10**5).replace('', 'a' * 10**5) }}",
    "{{ ('a' * 10**5)|replace('', 'a' * 10**5)|length }}",
    "{{ ('a' * 10**5).join(['a'] * 10**5) }}",
    "{{ [1]|batch(10**10, 'a')|list }}",
    "{{ [1]|slice(10**10)|list }}",
    "{{ lipsum(n=10**9) }}",
    "{{ [[1]]|tojson(indent=10**10) }}",
    "{{ strftime_now('%c' * 10**9) }}",
    "{{ raise_exception('a' * 10**7) }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "not " * 50000 + "1 }}",
    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "{{ " + " + ".join("1" * 50000) + " }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{% for x in [1] %}" * 30 + "{% endfor %}" * 30,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb[:40])
def test_no_chat_template_takes_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bomb: str) -> None:
    monkeypatch.setattr(prompts, "MAX_SECONDS", 0.3)
    held = reset_peak()
    with pytest.raises(UserError, match="chat template failed") as error:
        render(tmp_path, bomb)
    assert str(error.value).isprintable()
    assert str(tmp_path / "chat_template.jinja") in str(error.value)
    assert peak_bytes() - held < 2 * prompts.MAX_BYTES
    assert render(tmp_path, "{{ messages[0].content }}") == "Hi"  # and the next one is as good as ever


def test_messages_are_no_templates(tmp_path: Path) -> None:
    text = "{{ 7 * 7 }}{% for x in range(3) %}a{% endfor %}{# #}"
    shown = render(tmp_path, "{{ messages[0].content }}", [{"role": "user", "content": text}])
    assert shown == text


# --- code and paths in configs


def test_code_that_lies_in_a_model_folder_is_not_run(tmp_path: Path, refused: Callable, monkeypatch) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    save_checkpoint_folder(folder)
    (folder / "custom_generate").mkdir()
    names = ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "sitecustomize.py", "jinja2.py", "torch.py")
    for name in (*names, "custom_generate/generate.py", "__init__.py", "hubconf.py", "setup.py", "conftest.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    for name, kind in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((folder / name).read_text())
        own = {"auto_map": {kind: "modeling_x.X", "AutoConfig": "configuration_x.X"}, "trust_remote_code": True}
        (folder / name).write_text(json.dumps(values | own))
    model, config = load_model(folder), LoRAConfig()
    apply_lora(model, config)
    save_lora(dict(model.named_parameters()), tmp_path / "lora", config, base_model=str(folder))
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    own = {"auto_mapping": {"base_model_class": "X", "parent_library": "modeling_x"}, "runtime_config": {"x": "y"}}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(settings | own))
    monkeypatch.chdir(folder)
    assert refused(BASE, "--checkpoint_dir", folder, "--prompt", "Hi", "--max_new_tokens", 2) == ""
    assert refused(LORA, "--lora_path", tmp_path / "lora", "--prompt", "Hi", "--max_new_tokens", 2) == ""
    assert not marker.exists()


YAML = [
    "!!python/object/apply:os.system ['touch " + MARKER + "']",
    "!!python/object/apply:subprocess.check_output [[touch, " + MARKER + "]]",
    "!!python/object/new:os.system ['touch " + MARKER + "']",
    "!!python/object/apply:builtins.eval [\"open('" + MARKER + "', 'w')\"]",
    "!!python/object/apply:builtins.open ['" + MARKER + "', 'w']",
    "!!python/object/apply:os.mkdir ['" + MARKER + "']",
    "!!python/name:os.system",
    "!!python/module:os",
]


@pytest.mark.parametrize("attack", YAML)
def test_no_yaml_runs_code(tmp_path: Path, tiny_checkpoint: Path, refused: Callable, attack: str) -> None:
    careless, marker = tmp_path / "careless", tmp_path / "marker"
    loaded = yaml.unsafe_load(attack.replace(MARKER, str(careless)))
    assert careless.exists() or callable(loaded) or loaded is os
    attack, config = attack.replace(MARKER, str(marker)), tmp_path / "config.yaml"
    for text in (attack, f"prompt: {attack}", f"lora_path: [{attack}]", f"{attack}: 1"):
        config.write_text(text)
        assert f"--config {config}" in refused(LORA, "--config", config)
    for flag in ("--lora_path", "--prompt"):
        line = refused(LORA, flag, f"[{attack}]", "--checkpoint_dir", tiny_checkpoint, "--max_new_tokens", "2")
        assert line
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file({}, tmp_path / "lora/adapter_model.safetensors")
    upload = ("scripts/upload.py", "--path", tmp_path / "lora", "--repo_id", "me/x", "--base_model", "a/b", "--dry_run")
    (tmp_path / "lora/config.yaml").write_text(f"seed: {attack}")
    assert str(tmp_path / "lora/config.yaml") in refused(*upload)
    (tmp_path / "lora/config.yaml").unlink()
    (tmp_path / "lora/README.md").write_text(f"---\ntags: {attack}\n---\n")
    assert str(tmp_path / "lora/README.md") in refused(*upload)
    (tmp_path / "lora/README.md").unlink()
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
     "../x.safetensors", "{}/x.safetensors", "a/../../x.safetensors", "sub/x.safetensors", "..", ".", "",
     "x\0.safetensors", "~/x.safetensors", "$HOME/x.safetensors", "..\\x.safetensors", "file:///x.safetensors",
     "%2e%2e/x.safetensors"],
)  # fmt: skip
def test_no_index_leads_out_of_its_folder(tmp_path: Path, refused: Callable, name: str) -> None:
    folder = tmp_path / "model"
    save_checkpoint_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(tmp_path / "x.safetensors", folder / "sub")
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = {"weight_map": {"model.norm.weight": name.replace("{}", str(tmp_path))}}
        (folder / f"{kind}.index.json").write_text(json.dumps(index))
        line = refused(BASE, "--checkpoint_dir", folder, "--prompt", "Hi")
        assert str(folder / f"{kind}.index.json") in line
        assert line.isprintable()
        (folder / f"{kind}.index.json").unlink()


def test_gguf_metadata_names_no_path(tmp_path: Path, refused: Callable) -> None:
    outside = tmp_path / "outside"
    names = ("general.name", "general.basename", "general.source.url", "split.path", "tokenizer.huggingface.json")

    def add(writer) -> None:
        byte_level_bpe(tmp_path)(writer)
        for key in names:
            writer.add_string(key, str(outside))
        writer.add_chat_template("{% include '" + str(outside) + "' %}")

    save_gguf(noisy(vocab_size=300), tmp_path / "model.gguf", add)
    out = tmp_path / "sub/out"
    before = set(tmp_path.iterdir())
    line = refused("scripts/convert_gguf_checkpoint.py", "--source", tmp_path / "model.gguf", "--out_dir", out)
    assert line == ""
    assert set(tmp_path.iterdir()) - before == {tmp_path / "sub"}
    assert {file.name for file in out.iterdir()} <= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"
    }  # fmt: skip
    with pytest.raises(UserError, match="chat template failed"):
        get_template("chat", Tokenizer(out))


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "metrics.csv", "adapter_model.safetensors", "adapter"])
def test_nothing_from_outside_is_uploaded_through_a_link(tmp_path: Path, refused: Callable, name: str) -> None:
    lora, outside = tmp_path / "lora", tmp_path / "outside"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file({}, lora / "adapter_model.safetensors")
    upload = ("scripts/upload.py", "--path", lora, "--repo_id", "me/x", "--base_model", "a/b", "--dry_run")
    assert refused(*upload) == ""
    if name == "adapter":
        shutil.copytree(lora, outside)
    elif name == "adapter_model.safetensors":
        (lora / name).rename(outside)
    else:
        outside.write_text("secret: 1")
    (lora / name).symlink_to(outside)
    assert re.search(rf"{lora}/{name}.* is a link out of this folder", refused(*upload))
    # nor does the hub's cache, whose folders are links to what lies beside them
    cached = tmp_path / "models--me--x/snapshots/0123abc"
    cached.mkdir(parents=True)
    (tmp_path / "models--me--x/blobs").mkdir()
    for number, file in enumerate(file for file in lora.iterdir() if file.name != name):
        (tmp_path / f"models--me--x/blobs/{number}").write_bytes(file.read_bytes())
        (cached / file.name).symlink_to(f"../../blobs/{number}")
    if name not in ("adapter_model.safetensors", "adapter_config.json"):
        assert refused(*(cached if word == lora else word for word in upload)) == ""
        (cached / name).symlink_to(outside)
        assert re.search(
            rf"{name}.* is a link out of this folder", refused(*(cached if w == lora else w for w in upload))
        )
    # a link within it, or a folder that is one itself, is fine
    if name != "adapter":
        (lora / name).unlink()
        outside.rename(lora / "kept")
        (lora / name).symlink_to("kept")
        if name in ("config.yaml", "adapter_model.safetensors"):
            (tmp_path / "link").symlink_to(lora)
            assert refused(*(tmp_path / "link" if word == lora else word for word in upload)) == ""


BAD_NAMES = [
    "../model.safetensors", "/model.safetensors", "a/model.safetensors", "..\\model.safetensors", "model\0.safetensors",
    "model*.safetensors", "model[a-z]*.safetensors", "model?.safetensors", "model/../../x.safetensors",
    "model\n.safetensors", "model .safetensors", "modelé.safetensors", "model.safetensors/", "", ".", "..",
    "../config.json", "./config.json", "/etc/passwd", "adapter/../config.json", "config.json/", "CON",
    "model:x.safetensors", "model.safetensors.py", "pytorch_model.bin.exe", "modeling.py",
    "tokenizer.model/../x", "~/config.json",
]  # fmt: skip


def test_only_names_as_they_should_be_are_fetched() -> None:
    needed = load_script("scripts/download.py").files_needed
    good = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert needed([*BAD_NAMES, *good]) == good
    with pytest.raises(UserError, match="no model and no LoRA"):
        needed(BAD_NAMES)


# --- the source itself

SOURCES = [
    file for folder in ("lit_llama", "finetune", "generate", "scripts", "evaluate", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
]  # fmt: skip
NEVER = re.compile(
    r"eval|exec|compile|__import__|input|pickle\.(load|loads|Unpickler)|marshal\.\w+|shelve\.\w+|dill\.\w+|joblib\.\w+|"
    r"cloudpickle\.\w+|os\.(system|popen|spawn\w*|exec\w*)|tempfile\.mktemp|yaml\.(unsafe_load|full_load)(_all)?|"
    r"(np|numpy)\.load|torch\.(jit|hub)\.load|torch\.package\.\w+|runpy\.\w+|code\.\w+|"
    r"\w*\.extractall|shutil\.unpack_archive|ssl\._create_unverified_context|(.*\.)?(Environment|Template)\.from_string"
)
SAFE_LOADERS = ("yaml.BaseLoader", "yaml.SafeLoader", "_Words", "_Values")  # flags.py's own are made from these
EXPLAINED = {
    # its template is the page.html beside it, and what it shows is escaped
    ("evaluate/compare.py", "Environment"),
    # reads a terminal: no code in Python 3
    ("lit_llama/chat.py", "input"),
    ("generate/chat.py", "input"),
    # other projects' own loader, beside which ours is measured
    ("benchmarks/prepare.py", "load"),
}


def faults(tree: ast.AST) -> list[str]:
    """What is called there and may run what data says."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if NEVER.fullmatch(name) or given.get("trust_remote_code", "False") != "False":
            found.append(name)
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            found.append(name)
        if given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            found.append(name)
        if given.get("verify", "True") != "True":
            found.append(name)
        if name == "yaml.load" and ast.unparse(call.args[1]) not in SAFE_LOADERS:
            found.append(name)
        if name.rpartition(".")[2] == "Environment":
            found.append(name)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_here_runs_what_data_says(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    assert [fault for fault in faults(ast.parse(file.read_text("utf-8"))) if (name, fault) not in EXPLAINED] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)", "exec(x)", "compile(x, '', 'exec')", "pickle.load(f)", "pickle.loads(b)", "torch.load(f)",
        "torch.load(f, weights_only=False)", "torch.load(f, weights_only=careless)", "subprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "yaml.load(x, yaml.Loader)", "yaml.unsafe_load(x)",
        "marshal.loads(x)", "__import__(x)", "os.system(x)", "tempfile.mktemp()", "jinja2.Environment()",
        "np.load(f, allow_pickle=True)", "requests.get(x, verify=False)", "torch.hub.load(x)", "archive.extractall()",
    ],
)  # fmt: skip
def test_this_is_what_it_would_find(line: str) -> None:
    assert faults(ast.parse(line))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_exception_to_a_safety_rule_is_explained(file: Path) -> None:
    lines = file.read_text("utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if rule := re.search(r"# noqa: S\d+(.*)", line):
            assert rule[1].strip() or before.lstrip().startswith("# "), line


# --- what SECURITY.md says

TABLES = {  # a format that it names -> what tests it here
    ".bin": "PLACES", ".pth": "PLACES", "adapter_model.bin": "PLACES", "chat_template": "ESCAPES",
    "config.yaml": "YAML", "index.json": "test_no_index_leads_out_of_its_folder",
    "GGUF": "test_gguf_metadata_names_no_path",
    "auto_map": "test_code_that_lies_in_a_model_folder_is_not_run", "step-": "test_training_states_are_read",
    "link": "test_nothing_from_outside_is_uploaded", "README.md": "YAML",
}  # fmt: skip


def test_security_md_claims_what_is_tested() -> None:
    text, own = (ROOT / "SECURITY.md").read_text("utf-8"), Path(__file__).read_text("utf-8")
    for name, test in TABLES.items():
        assert name in text
        assert test in own.partition("TABLES = {")[0]
    for figure in (f"{prompts.MAX_SECONDS:g} seconds", f"{prompts.MAX_BYTES >> 20} MiB", f"{prompts.MAX_TEXT:,} char"):
        assert figure in text
    for word in re.findall(r"`((?:lit_llama|scripts|evaluate|generate|tests)/[\w/.]+)`", text):
        assert (ROOT / word).exists(), word
