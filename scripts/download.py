"""Download a model folder, or a LoRA, from the Hugging Face hub. Guide: howto/download_weights.md"""

import hashlib
import re
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from lit_llama import UserError
from lit_llama.checkpoint import TOKENIZER_FILES
from lit_llama.cli import run

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
FILES = ("config.json", *TOKENIZER_FILES, *LORA_FILES, *(f"adapter/{name}" for name in LORA_FILES))


def main(
    repo_id: str, revision: str | None = None, checkpoint_dir: Path = Path("checkpoints"), token: str | None = None
) -> None:
    """Download a model folder, or a LoRA, from the Hugging Face hub: only what is needed, and only what is missing.

    A broken connection is taken up again where it stopped; run it again for the files that are still missing. Each file
    gets its place once size and checksum are the hub's; what is there already is checked too.
    Guide: howto/download_weights.md

    Args:
        repo_id: the model's name on the hub, such as meta-llama/Llama-2-7b-hf.
        revision: branch, tag or commit; default: main.
        checkpoint_dir: the folder goes below it, under the model's name.
        token: for gated models; default: what `hf auth login` or HF_TOKEN holds.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise UserError("downloads need huggingface_hub: pip install -c constraints.txt -e '.[hub]'") from None
    folder = checkpoint_dir / repo_id
    unfinished = folder.with_name(f".{folder.name}.download")
    try:
        refuse_plain_http()
        model = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in model.siblings or []}
        wanted = files_needed(list(files))
        if not any(name.endswith((".safetensors", ".bin")) for name in wanted):
            raise UserError(
                f"{repo_id}: holds no safetensors and no pytorch_model.bin. For GGUF: howto/download_weights.md"
            )
        if missing := [name for name in wanted if not is_whole(folder / name, files[name])]:
            snapshot_download(repo_id, revision=model.sha, local_dir=unfinished, allow_patterns=missing, token=token)
        for name in missing:
            if not is_whole(unfinished / name, files[name]):
                (unfinished / name).unlink(missing_ok=True)
                raise UserError(f"{repo_id}: {name} is not what the hub says (size, checksum). Run this again")
        for name in missing:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).replace(folder / name)
        shutil.rmtree(unfinished, ignore_errors=True)
    except GatedRepoError:
        page = f"https://huggingface.co/{repo_id}"
        raise UserError(f"{repo_id}: gated. Accept its licence at {page}, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(f"{repo_id}: no such model on the hub, or a private one (--token). Check --repo_id") from None
    except RevisionNotFoundError:
        raise UserError(f"{repo_id}: has no revision {revision!r}. Check --revision") from None
    except HFValidationError:
        raise UserError(f"--repo_id {repo_id}: should be owner/name, as in meta-llama/Llama-2-7b-hf") from None
    except Exception as error:  # each version of the library has its own kinds for a broken connection
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
            raise
        raise UserError(f"{repo_id}: the download broke off ({error}). Run this again to go on") from None
    print(f"{len(wanted)} files in {folder}")


def refuse_plain_http() -> None:
    """Let `huggingface_hub` end in a UserError where the hub, or what it sends us on to, is not reached over TLS."""
    import huggingface_hub

    def check(response) -> None:
        check_secure(urljoin(str(response.url), response.headers.get("location", "")))

    check_secure(huggingface_hub.constants.ENDPOINT)
    usual = huggingface_hub.get_session()
    hooks = usual.event_hooks | {"response": [*usual.event_hooks["response"], check]}
    make = partial(type(usual), event_hooks=hooks, follow_redirects=True, timeout=usual.timeout)
    huggingface_hub.set_client_factory(make)


def check_secure(url: str) -> None:
    """Raise UserError for an address that is neither https nor on this machine."""
    if not url.startswith("https://") and urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        raise UserError(f"{url}: refused, only https:// is safe from being read and changed on its way")


def is_whole(file: Path, known: "RepoSibling") -> bool:
    """Whether a file has the size and the checksum that the hub knows: large ones their sha256, others git's."""
    if not file.is_file() or known.size not in (None, size := file.stat().st_size):
        return False
    # git's name for a content is no safeguard by itself: that is TLS
    digest = hashlib.sha256() if known.lfs else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    bar = tqdm(total=size, desc=f"checking {file.name}", unit="B", unit_scale=True, leave=False, delay=2, disable=None)
    with file.open("rb") as content, bar:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest() == (known.lfs.sha256 if known.lfs else known.blob_id or digest.hexdigest())


def files_needed(names: list[str]) -> list[str]:
    """Of a repository's files: config, tokenizer, and the weights in one format, safetensors where there is a choice.

    Raises:
        UserError: there is neither a model nor a LoRA in it.
    """
    wanted = [name for name in names if name in FILES]
    if "config.json" not in wanted and "adapter_config.json" not in wanted:
        raise UserError("the repository holds no config.json and no adapter_config.json: no model and no LoRA")
    for prefix, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        weights = [name for name in names if re.fullmatch(rf"{prefix}[\w.-]*\{suffix}(\.index\.json)?", name, re.ASCII)]
        if weights:
            return wanted + weights
    return wanted


if __name__ == "__main__":
    run(main)
