"""What is built from the repo, and the versions that it names."""

import email
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lit_llama

NOT_THE_REPO = (
    ".git",
    ".venv*",
    "checkpoints",
    "data",
    "out",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".coverage*",
)


@pytest.fixture(scope="module")
def settings() -> dict:
    """What setup.py says."""
    said, original = {}, setuptools.setup
    setuptools.setup = lambda **settings: said.update(settings)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return said


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], Path]:
    """Run `python -m build` in a copy of the repo: the copy, the sdist's files, and the wheel."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(
        ROOT, folder / "repo", ignore=shutil.ignore_patterns(*NOT_THE_REPO), symlinks=True
    )
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        folder / "dist",
        folder / "repo",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    name = f"lit_llama-{lit_llama.__version__}"
    assert {file.name for file in (folder / "dist").iterdir()} == {
        f"{name}.tar.gz",
        f"{name}-py3-none-any.whl",
    }
    with tarfile.open(folder / "dist" / f"{name}.tar.gz") as archive:
        members = {member.name: member for member in archive.getmembers() if not member.isdir()}
        assert all(
            member.isfile() and path.startswith(f"{name}/") for path, member in members.items()
        )
        files = {
            path.removeprefix(f"{name}/"): archive.extractfile(path).read() for path in members
        }
    return folder / "repo", files, folder / "dist" / f"{name}-py3-none-any.whl"


def files_below(folder: Path) -> dict[str, bytes]:
    paths = {path for path in folder.rglob("*") if path.is_file()}
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return {
        path: content
        for path, content in found.items()
        if not path.startswith(("build/", "lit_llama.egg-info/"))
    }


def test_the_sdist_is_the_whole_repo(built) -> None:
    repo, files, _ = built
    made = {
        "PKG-INFO",
        "setup.cfg",
        *(path for path in files if path.startswith("lit_llama.egg-info/")),
    }
    assert {path: content for path, content in files.items() if path not in made} == files_below(
        repo
    )


def test_the_wheel_is_the_library_and_nothing_else(built) -> None:
    repo, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        files = {path: archive.read(path) for path in archive.namelist()}
    info = f"lit_llama-{lit_llama.__version__}.dist-info/"
    library = {path: content for path, content in files.items() if not path.startswith(info)}
    assert library == {
        f"lit_llama/{path}": content for path, content in files_below(repo / "lit_llama").items()
    }
    about = {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    assert {path.removeprefix(info) for path in files.keys() - library.keys()} == about
    assert files[f"{info}licenses/LICENSE"] == (repo / "LICENSE").read_bytes()


def test_the_wheel_says_what_setup_py_says(built, settings: dict) -> None:
    repo, _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        said = email.message_from_bytes(
            archive.read(f"lit_llama-{lit_llama.__version__}.dist-info/METADATA")
        )
    assert (said["Name"], said["Version"]) == ("lit-llama", lit_llama.__version__)
    assert said["Requires-Python"] == ">=3.10"
    assert (said["License-Expression"], said.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert (
        said.get_payload(decode=True).decode().strip()
        == (repo / "README.md").read_text("utf-8").strip()
    )
    needed = [Requirement(text) for text in settings["install_requires"]]
    needed += [
        Requirement(f'{text}; extra == "{extra}"')
        for extra, requirements in settings["extras_require"].items()
        for text in requirements
    ]
    assert {Requirement(text) for text in said.get_all("Requires-Dist")} == set(needed)
    assert set(said.get_all("Provides-Extra")) == settings["extras_require"].keys()


def test_the_scripts_run_with_the_wheel_alone(built, tmp_path: Path) -> None:
    """In a clone without lit_llama/, with the wheel unpacked elsewhere."""
    repo, _, wheel = built
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shutil.copytree(repo, tmp_path / "clone", ignore=shutil.ignore_patterns("lit_llama"))
    code = """
import importlib, pathlib, runpy, sys
site = pathlib.Path(sys.argv[1])
for file in sorted((site / "lit_llama").rglob("*.py")):
    name = ".".join(file.relative_to(site).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert module.__file__ == str(file), module.__file__
sys.argv = [sys.argv[2], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, tmp_path / "site", tmp_path / "clone/finetune/lora.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--lora.r INT" in done.stdout


def pins(name: str) -> dict[str, list[Version]]:
    """Versions in a file of constraints: several if they depend on Python's."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==", line
            found.setdefault(canonicalize_name(requirement.name), []).append(Version(only.version))
    return found


def test_constraints_are_the_lowest_and_the_newest_versions_that_setup_py_admits(
    settings: dict,
) -> None:
    lowest, newest = pins("constraints-lowest.txt"), pins("constraints.txt")
    tested = [
        Requirement(text)
        for text in (*settings["install_requires"], *settings["extras_require"]["test"])
    ]
    every = tested + [
        Requirement(text) for texts in settings["extras_require"].values() for text in texts
    ]
    for requirement in every:
        name = canonicalize_name(requirement.name)
        (bound,) = (
            Version(part.version) for part in requirement.specifier if part.operator == ">="
        )
        assert lowest[name] == [bound], requirement
        assert all(version in requirement.specifier for version in newest[name]), requirement
    assert {requirement.name for requirement in every} == {
        requirement.name for requirement in tested
    }
