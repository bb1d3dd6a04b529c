"""Download a model folder or a LoRA from the Hugging Face hub. Guide: howto/download_weights.md"""

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hub import files_needed, hub_errors
from tqdm import tqdm

from lit_llama.errors import UserError
from lit_llama.runtime.cli import run

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


def main(
    repo_id: str,
    revision: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    token: str | None = None,
) -> None:
    """Download a model folder, or a LoRA, from the Hugging Face hub: only files that are missing.

    Run it again after a lost connection: it resumes where it stopped. Files get their names once
    size and checksum are the hub's; existing ones are checked, too.
    Guide: howto/download_weights.md

    Args:
        repo_id: Name on the hub, such as meta-llama/Llama-2-7b-hf.
        revision: Branch, tag or commit; default: main.
        checkpoint_dir: Parent of the output folder, which has the model's name.
        token: Token for gated models; default: that of `hf auth login` or HF_TOKEN.
    """
    folder = checkpoint_dir / repo_id
    unfinished = folder.with_name(f".{folder.name}.download")
    with hub_errors(repo_id, "model", revision):
        from huggingface_hub import HfApi, snapshot_download

        model = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in model.siblings or []}
        wanted = files_needed(list(files))
        if not any(name.endswith((".safetensors", ".bin")) for name in wanted):
            problem = "holds no safetensors and no .bin of a model or LoRA"
            raise UserError(f"{repo_id}: {problem}. For GGUF: howto/download_weights.md")
        missing = [name for name in wanted if not is_complete(folder / name, files[name])]
        if missing:
            options = dict(local_dir=unfinished, allow_patterns=missing, token=token)
            snapshot_download(repo_id, revision=model.sha, **options)
        for name in missing:
            if not is_complete(unfinished / name, files[name]):
                (unfinished / name).unlink(missing_ok=True)
                problem = f"{name} is not what the hub says (size, checksum)"
                raise UserError(f"{repo_id}: {problem}. Run this again")
        for name in missing:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).replace(folder / name)
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{len(wanted)} files in {folder}")


def is_complete(file: Path, known: "RepoSibling") -> bool:
    """Compare size and checksum with the hub's: sha256 for large files, git's hash for others."""
    if not file.is_file() or known.size not in (None, size := file.stat().st_size):
        return False
    # git's hash protects against mistakes only; TLS protects against attacks
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if known.lfs:
        digest = hashlib.sha256()
    bar = dict(total=size, desc=f"checking {file.name}", unit="B", unit_scale=True, leave=False)
    with file.open("rb") as content, tqdm(**bar, delay=2, disable=None) as progress:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
            progress.update(len(chunk))
    expected = known.lfs.sha256 if known.lfs else known.blob_id
    return expected in (None, digest.hexdigest())


if __name__ == "__main__":
    run(main)
