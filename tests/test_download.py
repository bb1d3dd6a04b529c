"""`scripts/download.py` against a small hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, save_checkpoint_folder
from hub import files_needed

from lit_llama import UserError, load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of `huggingface_hub`: a list of files, then head and content of each one."""

    protocol_version = "HTTP/1.1"
    repo_id = "owner/tiny"
    folder: Path
    gets: list[tuple[str, str | None]]
    break_off_at: int
    break_offs: int  # how many more times
    tamper: Callable[[bytes], bytes] = staticmethod(
        lambda content: content
    )  # what happens to weights on their way
    sent_on_to = ""  # where requests for weights go instead
    more_names: tuple[str, ...] = ()  # in the list of files

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            names = sorted(file.name for file in self.folder.iterdir())
            if self.repo_id not in path:
                return self.send(
                    404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
                )
            if "/tree/" in path:
                sizes = {name: (self.folder / name).stat().st_size for name in names}
                body = [
                    {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                    for name, size in sizes.items()
                ]
            else:
                siblings = [
                    *map(self.sibling, names),
                    *({"rfilename": name, "size": 1} for name in self.more_names),
                ]
                body = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        file = self.folder / path.rpartition("/")[2]
        if not file.is_file():
            return self.send(404, b"", {})
        if self.sent_on_to and file.suffix == ".safetensors":
            return self.send(302, b"", {"Location": self.sent_on_to})
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if head:
            return self.send(200, b"", headers | {"Content-Length": str(len(content))})
        span = self.headers.get("Range")
        self.gets.append((file.name, span))
        if file.suffix == ".safetensors":
            content = self.tamper(content)
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.break_offs and file.suffix == ".safetensors":
            type(self).break_offs -= 1
            self.send_response(206 if span else 200)
            for name, value in (headers | {"Content-Length": str(len(content) - start)}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[start : self.break_off_at])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(2)
        return self.send(206 if span else 200, content[start:], headers)

    def sibling(self, name: str) -> dict:
        """What the hub knows of a file: git's name for it, or where it is large its sha256."""
        content = (self.folder / name).read_bytes()
        known = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            return known | {"lfs": {"sha256": digest, "size": len(content), "pointerSize": 130}}
        git = subprocess.run(
            ["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True
        )
        return known | {"blobId": git.stdout.decode().strip()}

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    Hub.folder, Hub.gets, Hub.break_offs = tmp_path / "hub", [], 0
    Hub.tamper, Hub.sent_on_to, Hub.more_names = staticmethod(lambda content: content), "", ()
    save_checkpoint_folder(Hub.folder)
    (Hub.folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (Hub.folder / "README.md").write_text("# Tiny")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def download(python: str) -> Callable[..., subprocess.CompletedProcess]:
    return partial(run, python)


def run(
    python: str, hub: str, folder: Path, repo_id: str = "owner/tiny"
) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [python, "scripts/download.py", "--repo_id", repo_id, "--checkpoint_dir", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_only_what_is_needed_comes_and_only_once(tmp_path: Path, hub: str, download) -> None:
    done = download(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {name for name, _ in Hub.gets} == wanted
    for name in wanted:
        assert (tmp_path / "owner/tiny" / name).read_bytes() == (Hub.folder / name).read_bytes()
    load_model(tmp_path / "owner/tiny")
    assert str(tmp_path / "owner/tiny") in done.stdout
    Hub.gets.clear()
    assert download(hub, tmp_path).returncode == 0
    assert Hub.gets == []


def test_a_broken_connection_is_taken_up_where_it_stopped(
    tmp_path: Path, hub: str, download
) -> None:
    weights = Hub.folder / "model.safetensors"
    weights.write_bytes(os.urandom(24_000_000))  # the library writes pieces of 10 MB
    Hub.break_off_at, Hub.break_offs = 15_000_000, 1
    assert download(hub, tmp_path).returncode == 0
    spans = [span for name, span in Hub.gets if name == "model.safetensors"]
    assert spans == [None, "bytes=10485760-"]
    assert (tmp_path / "owner/tiny/model.safetensors").read_bytes() == weights.read_bytes()


def test_what_is_missing_after_a_failure_comes_with_the_next_run(
    tmp_path: Path, hub: str, download
) -> None:
    Hub.break_off_at, Hub.break_offs = 30_000, 100
    broken = download(hub, tmp_path)
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    assert [
        "Run this again" in line
        for line in broken.stderr.splitlines()
        if line.startswith("error: ")
    ] == [True]
    assert not (tmp_path / "owner/tiny/model.safetensors").exists()
    Hub.break_offs = 0
    Hub.gets.clear()
    assert download(hub, tmp_path).returncode == 0
    assert "model.safetensors" in {name for name, _ in Hub.gets}
    assert len({name for name, _ in Hub.gets}) < 5  # some of the five had come before
    load_model(tmp_path / "owner/tiny")


def test_unknown_repositories_and_no_connection_are_one_line(
    tmp_path: Path, hub: str, download
) -> None:
    for address, repo_id, message, status in (
        (hub, "owner/unknown", "no such model on the hub", 1),
        (hub, "a/b/c", "should be owner/name", 2),
        ("http://127.0.0.1:9", "owner/tiny", "broke off", 1),
    ):
        done = download(address, tmp_path, repo_id)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert [
            message in line for line in done.stderr.splitlines() if line.startswith("error: ")
        ] == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tamper": lambda content: content[:-1] + bytes([content[-1] ^ 1])},
            "is not what the hub says",
        ),
        ({"tamper": lambda content: content[:-100]}, "broke off"),
        (
            {"sent_on_to": "http://192.0.2.1/model.safetensors"},
            "http://192.0.2.1/model.safetensors: refused, only https",
        ),
    ],
    ids=["one bit", "cut off", "sent on to http"],
)
def test_what_is_not_the_hubs_own_gets_no_place(
    tmp_path: Path, hub: str, change: dict, message: str, download
) -> None:
    for name, value in change.items():
        setattr(Hub, name, staticmethod(value) if callable(value) else value)
    folder = tmp_path / "owner/tiny"
    done = download(hub, tmp_path)
    assert done.returncode == 1
    assert [message in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        True
    ], done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_a_file_that_has_changed_since_is_fetched_again(tmp_path: Path, hub: str, download) -> None:
    assert download(hub, tmp_path).returncode == 0
    for name in ("config.json", "model.safetensors"):  # one that git checks, one with a sha256
        file = tmp_path / "owner/tiny" / name
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    Hub.gets.clear()
    assert download(hub, tmp_path).returncode == 0
    assert sorted(name for name, _ in Hub.gets) == ["config.json", "model.safetensors"]
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "owner/tiny" / name).read_bytes() == (Hub.folder / name).read_bytes()
    assert [path.name for path in (tmp_path / "owner").iterdir()] == [
        "tiny"
    ]  # nothing temporary stays


def test_a_hub_without_tls_is_refused_unless_it_is_here(tmp_path: Path, download) -> None:
    done = download("http://hub.example.com", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: http://hub.example.com: refused, only https"
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "x.gguf"],
            ["config.json", "model.safetensors"],
        ),
        (
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "original/a.pth",
            ],
            ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ),
        (
            [
                "config.json",
                "pytorch_model-00001-of-00001.bin",
                "pytorch_model.bin.index.json",
                "tokenizer.model",
            ],
            [
                "config.json",
                "tokenizer.model",
                "pytorch_model-00001-of-00001.bin",
                "pytorch_model.bin.index.json",
            ],
        ),
        (
            [
                "adapter_config.json",
                "adapter_model.safetensors",
                "optimizer.pt",
                "adapter/adapter_config.json",
            ],
            ["adapter_config.json", "adapter_model.safetensors", "adapter/adapter_config.json"],
        ),
        (
            ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"],
            ["adapter_config.json", "adapter_model.safetensors"],
        ),
        (
            [
                *("README.md", "adapter_config.json", "adapter_model.bin", "added_tokens.json"),
                *("chat_template.jinja", "special_tokens_map.json", "tokenizer.model"),
                *("tokenizer_config.json", "training_args.bin"),
            ],
            [
                *("adapter_config.json", "added_tokens.json", "chat_template.jinja"),
                *("special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"),
                "adapter_model.bin",
            ],
        ),
    ],
    ids=["one format", "shards", "bin", "LoRA", "LoRA in two formats", "LoRA of old PEFT"],
)
def test_files_needed(names: list[str], expected: list[str]) -> None:
    assert files_needed(names) == expected


def test_a_repository_without_a_model_is_refused() -> None:
    with pytest.raises(UserError, match="no model and no LoRA"):
        files_needed(["README.md", "data.csv"])
