"""`scripts/upload.py` against a small hub on this machine."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import ROOT, load_script, save_checkpoint_folder
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lit_llama import load_model
from lit_llama.adapter import AdapterConfig
from lit_llama.lora import load_lora
from lit_llama.runtime import cli
from lit_llama.storage.methods import METHODS, SaveInfo

upload = load_script("scripts/upload.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {"good": 200, "read-only": 403}
LORA_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.yaml",
    "metrics.csv",
}


at_a_hub_of_ones_own = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2,
    reason="this huggingface_hub has its cards checked elsewhere",
)


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of `huggingface_hub` for a new repository and a commit, weights by git LFS."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] | None  # of me/tiny, None: there is no such repository
    private: bool
    stored: dict[str, bytes]  # by sha256
    requests: list[str]

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path, body = type(self), self.path.split("?")[0], self.body()
        hub.requests.append(path)
        if path == "/api/validate-yaml":
            known = "license: unheard-of" not in json.loads(body)["content"]
            return (
                self.send({"errors": [], "warnings": []})
                if known
                else self.send(b'"license" must be one of', 400)
            )
        if path.startswith("/stored/"):
            hub.stored[path.rpartition("/")[2]] = body
            return self.send({})
        if (
            status := TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "), 401)
        ) != 200:
            return self.send({"error": "no"}, status)
        if path == "/api/repos/create":
            assert json.loads(body)["organization"] == "me"
            if hub.files is not None:
                return self.send({"url": f"{self.address}/me/tiny"}, 409)
            hub.files, hub.private = {}, json.loads(body)["visibility"] == "private"
            return self.send({"url": f"{self.address}/me/tiny"})
        if path == "/api/models/me/tiny":
            names = [{"rfilename": name} for name in hub.files]
            return self.send(
                {"id": "me/tiny", "sha": COMMIT, "private": hub.private, "siblings": names}
            )
        if path == "/api/models/me/tiny/preupload/main":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if "safetensors" in f["path"] else "regular",
                }
                for f in json.loads(body)["files"]
            ]
            return self.send({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if path == "/me/tiny.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for wanted in objects:
                if wanted["oid"] not in hub.stored:
                    wanted["actions"] = {
                        "upload": {"href": f"{self.address}/stored/{wanted['oid']}"}
                    }
            return self.send({"objects": objects})
        assert path == "/api/models/me/tiny/commit/main"
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content = hub.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                hub.files[value["path"]] = content
            elif operation["key"] == "deletedFile":
                del hub.files[value["path"]]
        return self.send(
            {"commitUrl": f"{self.address}/me/tiny/commit/{COMMIT}", "commitOid": COMMIT}
        )

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, body: dict | bytes, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files, Hub.private, Hub.stored, Hub.requests = None, True, {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_data: Path
) -> Path:
    """A folder with checkpoints/owner/tiny, data/tiny and finetuned out/lora and out/full."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_checkpoint, place / "checkpoints/owner/tiny")
    shutil.copytree(tiny_data, place / "data/tiny")
    common = "--checkpoint_dir checkpoints/owner/tiny --precision 32-true"
    common += " --train.max_steps 2 --train.batch_size 4"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for method, data in (("lora", place / "data/tiny"), ("full", "data/tiny")):
            script = f"finetune/{method}.py"
            flags = f"{common} --data_dir {data} --out_dir out/{method} --train.learning_rate 1e-2"
            patch.setattr(sys, "argv", [script, *flags.split()])
            cli.run(load_script(script).main)
    for name in (".config.yaml.tmp-123", "notes.txt", "step-000002/mine.safetensors"):
        (place / "out/lora" / name).write_text("not for others")
    return place


@pytest.fixture
def place(tmp_path: Path, trained: Path, monkeypatch) -> Path:
    """A copy of it, to be changed, and the folder that we are in."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def call(hub: str, place: Path, monkeypatch, capsys) -> Callable:
    """Runs the script with the hub of this machine: exit status, stdout, stderr."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place / "home/token"))

    def call(*flags: str, address: str = hub, token: str | None = "good") -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", token or "")
        monkeypatch.setattr(sys, "argv", ["scripts/upload.py", "--repo_id", "me/tiny", *flags])
        capsys.readouterr()
        status = 0
        try:
            cli.run(upload.main)
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def collected(path: str, **flags) -> tuple[dict[str, bytes], ModelCard]:
    """What would go up: file contents by name, and the card."""
    result = upload.read_result(Path(path), flags.get("base_model"))
    files = upload.collect_files(result)
    whole = {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in files.items()
    }
    return whole, upload.make_card(result, "me/tiny", flags.get("license"))


@at_a_hub_of_ones_own
def test_a_lora_arrives_whole_and_works_there(hub: str, place: Path, tmp_path: Path) -> None:
    before = contents(place)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "good",
    }
    flags = ["--repo_id", "me/tiny", "--path", "out/lora", "--license", "mit"]
    command = [sys.executable, ROOT / "scripts/upload.py", *flags]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"5 files in {hub}/me/tiny, for you alone" in done.stdout
    assert Hub.private
    assert Hub.files.keys() == LORA_FILES
    weights = (place / "out/lora/adapter_model.safetensors").read_bytes()
    assert [*Hub.stored.values()] == [weights]
    assert Hub.files["adapter_model.safetensors"] == weights
    assert str(place).encode() not in b"".join(Hub.files.values())
    assert contents(place) == before
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in Hub.files.items():
        (arrived / name).write_bytes(content)
    assert ModelCard.load(arrived / "README.md").data.to_dict() == {
        "base_model": "owner/tiny",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lit-llama", "lora"],
    }
    base = place / "checkpoints/owner/tiny"
    ours, ids = load_model(base, dtype=torch.float32), torch.arange(5, 30)[None]
    load_lora(ours, place / "out/lora")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), arrived
    )
    assert theirs.peft_config["default"].base_model_name_or_path == "owner/tiny"
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)  # fp32


@at_a_hub_of_ones_own
def test_a_second_upload_keeps_the_card_and_sends_no_weights_twice(
    call: Callable, place: Path
) -> None:
    assert call("--path", "out/lora")[0] == 0
    Hub.files["README.md"] = b"edited there"
    Hub.requests.clear()
    (place / "out/lora/metrics.csv").write_text(
        (place / "out/lora/metrics.csv").read_text().replace("0.01", "0.02")
    )
    status, out, _ = call("--path", "out/lora")
    assert status == 0
    assert "README.md that is there stays" in out
    assert Hub.files["README.md"] == b"edited there"
    assert b"0.02" in Hub.files["metrics.csv"]
    assert not [path for path in Hub.requests if path.startswith("/stored/")]


@at_a_hub_of_ones_own
def test_a_model_takes_the_place_of_another_ones_weights(call: Callable, place: Path) -> None:
    Hub.files, Hub.private = (
        {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""},
        False,
    )
    Hub.files |= {"notes.md": b"mine", "README.md": b"older"}
    (place / "out/full/README.md").write_text("---\nlicense: mit\n---\n\n# By hand")
    status, out, _ = call("--path", "out/full", "--private", "false")
    assert status == 0
    assert "for everybody" in out
    own = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }
    assert Hub.files.keys() == own | {"README.md", "config.yaml", "metrics.csv", "notes.md"}
    assert Hub.files["README.md"] == (place / "out/full/README.md").read_bytes()
    assert Hub.files["model.safetensors"] == (place / "out/full/model.safetensors").read_bytes()


REFUSALS = {
    "no token": (dict(token=None), "", 1, r"me/tiny: there is no token\. Make one"),
    "unknown token": (
        dict(token="bad"),
        "",
        1,
        r"me/tiny: refused \(401\), the token may not write there\. Make one",
    ),
    "token that may not write": (dict(token="read-only"), "", 1, r"me/tiny: refused \(403\)"),
    "unknown licence": (
        {},
        "--license unheard-of",
        1,
        r'refuses this \("license" must be one of\)\. Check --license',
    ),
    "a public one": ({}, "", 2, r"--private true: me/tiny is there already, for everybody"),
    "no connection": (
        dict(address="http://127.0.0.1:9"),
        "",
        1,
        r"me/tiny: the upload broke off \(.*\)\. Run this again",
    ),
}


@at_a_hub_of_ones_own
@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_and_nothing_arrives(call: Callable, case: tuple, request) -> None:
    settings, flags, status, message = case
    Hub.files, Hub.private = ({}, False) if "public" in request.node.name else (None, True)
    ended, _, err = call("--path", "out/lora", *flags.split(), **settings)
    assert ended == status
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not Hub.files
    assert not Hub.stored


def save_untrained(method: str, out: Path, base: Path, template: str = "") -> None:
    """Save an adapter as it is initialized."""
    model, config = load_model(base), AdapterConfig(start_layer=1)
    METHODS[method].apply(model, config)
    info = SaveInfo(model, str(base), template)
    METHODS[method].save(out, model.named_parameters(), config, info)


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# what is wrong: (what breaks it, further flags, what the line says, the exit status)
MISTAKES = {
    "no folder": (None, "--path out/none", r"out/none: no such folder", 1),
    "no result": (None, "--path out", r"out: holds no LoRA, adapter or model", 1),
    "a run without its end": (
        lambda p: (p / "out/lora/adapter_model.safetensors").unlink(),
        *("", r"out/lora: holds no LoRA.*at its end", 1),
    ),
    "another kind of PEFT": (
        lambda p: edit_json(p / "out/lora/adapter_config.json", peft_type="IA3"),
        *("", r"out/lora: holds no LoRA", 1),
    ),
    "an unknown method": (
        lambda p: edit_json(p / "out/lora/adapter_config.json", peft_type=None, method="other"),
        *("", r"out/lora: holds no LoRA", 1),
    ),
    "no owner": (None, "--repo_id tiny", r"--repo_id tiny: should be owner/name", 2),
    "bad name": (None, "--repo_id me/a--b", r"--repo_id me/a--b: should be owner/name", 2),
    "bad base": (None, "--base_model x", r"--base_model x: should be owner/name", 2),
    "base without an owner": (
        lambda p: edit_json(
            p / "out/lora/adapter_config.json", base_model_name_or_path="checkpoints/tiny"
        ),
        *("", r"--base_model: out/lora calls its base 'checkpoints/tiny'", 2),
    ),
    "a card of this machine": (
        lambda p: (p / "out/lora/README.md").write_text(f"Trained in {Path.home()}/runs"),
        *("", rf"out/lora/README.md: names {Path.home()}, a folder here", 1),
    ),
    "a card that names the base's folder": (
        lambda p: (p / "out/lora/README.md").write_text("---\nbase_model: /models/tiny\n---\n"),
        *("", r"out/lora/README.md: names /models/tiny, a folder here", 1),
    ),
    "a licence for a card that is there": (
        lambda p: (p / "out/lora/README.md").write_text("# Mine"),
        *("--license mit", r"--license mit: out/lora/README.md is the card", 2),
    ),
    "a card with a broken header": (
        lambda p: (p / "out/lora/README.md").write_text("---\na: [\n---\n"),
        *("", r"out/lora/README.md: not a model card", 1),
    ),
    "the package is missing": (None, "", r"uploads need huggingface_hub: pip install", 1),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(
    call: Callable, place: Path, case: tuple, monkeypatch, request
) -> None:
    breaks, flags, message, status = case
    if breaks is not None:
        breaks(place)
    if "package" in request.node.name:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    path = [] if "--path" in flags else ["--path", "out/lora"]
    ended, _, err = call(*path, *flags.split())
    assert ended == status
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert re.search(f"^error: {message}", lines[0]), lines[0]
    assert Hub.requests == []


def test_a_dry_run_shows_the_card_and_sends_nothing(call: Callable, place: Path) -> None:
    status, out, _ = call("--path", "out/lora", "--dry_run", token=None)
    assert status == 0
    assert collected("out/lora")[1].content in out
    size = (place / "out/lora/adapter_model.safetensors").stat().st_size
    assert re.search(rf"^ +{size:,} bytes  adapter_model.safetensors$", out, re.MULTILINE)
    assert "mine.safetensors" not in out
    assert Hub.requests == []


def test_the_card_tells_recipe_losses_and_data(place: Path) -> None:
    flags = place / "out/lora/config.yaml"
    flags.write_text(re.sub("data_dir: .*", "data_dir: data/tiny", flags.read_text()))
    text = collected("out/lora")[1].content
    state = json.loads((place / "out/lora/step-000002/state.json").read_text())
    meta = json.loads((place / "data/tiny/meta.json").read_text())
    last = (place / "out/lora/metrics.csv").read_text().splitlines()[-1].split(",")
    after = float(last[4])
    assert f"Validation loss before: {state['first_val_loss']:.4f}. After: {after:.4f}." in text
    assert (
        f"`records.json` (sha256 `{meta['sha256'][0]}`), 60 records: "
        f"{meta['train_samples']} samples to train, {meta['val_samples']} to validate" in text
    )
    for line in (
        "| lora.r | 8 |",
        "| lora.alpha | 16",
        "| train.learning_rate | 0.01 |",
        "| train.batch_size | 4 |",
    ):
        assert line in text
    assert "micro_batch_tokens" not in text
    assert "Template `alpaca`" in text
    assert "### Instruction:\n{instruction}\n\n### Response:" in text
    assert "generate/lora.py --lora_path checkpoints/me/tiny" in text
    assert "None is given here" in text
    edit_json(place / "data/tiny/meta.json", sha256="of another source")
    assert "records.json" not in collected("out/lora")[1].content


def test_a_model_without_a_run_claims_no_training(place: Path) -> None:
    (place / "out/full/config.yaml").unlink()
    files, card = collected("out/full")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "config.yaml" not in files
    assert "Training" not in card.content
    assert 'AutoModelForCausalLM.from_pretrained("me/tiny")' in card.content
    assert collected("out/full", base_model="owner/other")[1].data.base_model == "owner/other"


def test_adapters_go_up(place: Path) -> None:
    base = place / "checkpoints/owner/tiny"
    save_untrained("llama_adapter", place / "out/lora/adapter", base)
    files, card = collected("out/lora")
    assert files.keys() == LORA_FILES - {"README.md"} | {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert (
        json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == "owner/tiny"
    )
    assert "without the adapter" in card.content
    save_untrained("llama_adapter_v2", place / "out/v2", base, "chat")
    files, card = collected("out/v2")
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert card.data.tags == ["llama-adapter-v2"]
    assert "generate/adapter_v2.py --adapter_path checkpoints/me/tiny" in card.content
    assert "apply_chat_template" in card.content


def test_no_path_of_this_machine_goes_up(place: Path) -> None:
    flags = yaml.safe_load((place / "out/lora/config.yaml").read_text())
    assert flags["data_dir"] == str(Path(flags["data_dir"]).absolute())  # as it was typed
    flags |= {
        "out_dir": "~/runs/secret",
        "logs": ["../mike/logs", "file:///home/mike/runs", "out/logs"],
    }
    flags["checkpoint_dir"] = "/home/mike/checkpoints/owner/tiny"
    (place / "out/lora/config.yaml").write_text(yaml.safe_dump(flags))
    edit_json(
        place / "out/lora/adapter_config.json",
        base_model_name_or_path="/home/mike/checkpoints/owner/tiny",
    )
    files, card = collected("out/lora")
    expected = {"data_dir": "tiny", "out_dir": "secret", "logs": ["logs", "runs", "out/logs"]}
    expected["checkpoint_dir"] = "checkpoints/owner/tiny"
    assert yaml.safe_load(files["config.yaml"]) == flags | expected
    assert b"mike" not in b"".join(files.values()) + card.content.encode()
    save_checkpoint_folder(place / "model")
    edit_json(place / "model/config.json", _name_or_path="/home/mike/tiny", vocab_size=384)
    edit_json(
        place / "model/tokenizer_config.json",
        tokenizer_file="/home/mike/a.json",
        chat_template="{{ a }} /b",
    )
    files, _ = collected("model")
    assert json.loads(files["config.json"])["_name_or_path"] == ""
    assert json.loads(files["tokenizer_config.json"])["tokenizer_file"] == "a.json"
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ a }} /b"
    load = AutoModelForCausalLM.from_pretrained
    for name, content in files.items():
        (place / "model" / name).write_bytes(content)
    assert load(place / "model").config.vocab_size == 384


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ("checkpoints/owner/model-7b.v1", "owner/model-7b.v1"),
        ("/home/me/checkpoints/owner/model/", "owner/model"),
        ("owner/model", "owner/model"),
        ("checkpoints/model", None),
        ("models/owner/model", None),
        ("/models/model", None),
        ("../model", None),
        ("", None),
        (None, None),
    ],
)
def test_hub_name(recorded: str | None, name: str | None) -> None:
    assert upload.hub_name(recorded) == name


def test_a_folder_is_no_name_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/model").mkdir(parents=True)
    assert upload.hub_name("models/model") is None
