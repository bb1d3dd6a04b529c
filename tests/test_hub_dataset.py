"""`--source owner/name` of scripts/prepare_json.py against a small hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import test_download
from conftest import ROOT
from test_download import COMMIT


def rows(count: int, name: str = "a") -> list[dict[str, str]]:
    return [{"instruction": f"{name} {n}", "output": "b" * n} for n in range(1, count + 1)]


def parquet(records: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def jsonl(records: list) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


REPOSITORIES = {
    "owner/shards": {
        "README.md": b"# Data",
        "data/train-00000-of-00002.parquet": parquet(rows(3)),
        "data/train-00001-of-00002.parquet": parquet(rows(4, "c")),
        "data/test-00000-of-00001.parquet": parquet(rows(9, "d")),
    },
    "owner/one": {
        "dataset_infos.json": b"{}",
        "records.jsonl": jsonl(rows(5)),
        "valid.jsonl": jsonl(rows(2)),
    },
    "owner/two": {"main/train.jsonl": jsonl(rows(6)), "other/train.jsonl": jsonl(rows(7))},
    "owner/long": {
        "my_training_set.jsonl": jsonl(rows(8)),
        "testing.jsonl": jsonl(rows(3)),
        "evaluation.jsonl": jsonl(rows(2)),
    },
    "owner/none": {"README.md": b"# Nothing"},
}


class Hub(test_download.Hub):
    """The requests of `huggingface_hub` for a dataset: its files, and the content of each."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].lstrip("/").removeprefix("api/").removeprefix("datasets/")
        repo_id = "/".join(path.split("/")[:2])
        files = REPOSITORIES.get(repo_id)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in files]
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ]
            info = {"id": repo_id, "sha": COMMIT, "siblings": siblings}
            body = json.dumps(tree if "/tree/" in self.path else info).encode()
            return self.send(200, body, {"Content-Type": "application/json"})
        content = files[path.removeprefix(f"{repo_id}/resolve/{COMMIT}/")]
        tag = hashlib.sha256(content).hexdigest()
        return self.send(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})


@pytest.fixture
def prepare(python: str, tmp_path: Path, tiny_checkpoint: Path) -> Iterator[Callable]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        names = [name for name in os.environ if not name.startswith("HF_")]
        environment = {name: os.environ[name] for name in names}
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{httpd.server_port}"
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}

        def run(source: str) -> subprocess.CompletedProcess:
            command = [python, "scripts/prepare_json.py", "--source", source]
            command += ["--checkpoint_dir", str(tiny_checkpoint), "--val_size", "1"]
            command += ["--data_dir", str(tmp_path / "data/mine")]
            return subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True
            )

        yield run
        httpd.shutdown()


@pytest.mark.parametrize(
    ("source", "count", "files"),
    [
        ("owner/shards", 7, "data/train-00000-of-00002.parquet, data/train-00001"),
        ("owner/one", 5, "records.jsonl"),
        ("owner/long", 8, "my_training_set.jsonl\n"),
        ("owner/two/other", 7, "other/train.jsonl"),
    ],
)
def test_the_training_files_are_downloaded_and_prepared(
    tmp_path: Path, prepare: Callable, source: str, count: int, files: str
) -> None:
    for _ in range(2):
        done = prepare(source)
        assert done.returncode == 0, done.stderr
        assert f"{source}: {files}" in done.stdout
        meta = json.loads((tmp_path / "data/mine/meta.json").read_text())
        assert meta["train_samples"] == count - 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/two", "owner/two: its records are in several places: main/*.jsonl, other/*.jsonl."),
        ("owner/none", "owner/none: its records are nowhere."),
        ("owner/secret", "owner/secret: no such dataset on the hub"),
        ("data/missing.json", "missing.json: cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(
    tmp_path: Path, prepare: Callable, source: str, message: str
) -> None:
    done = prepare(source)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "data/mine").exists()
