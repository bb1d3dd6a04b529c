"""Download a model folder, or a LoRA, from the Hugging Face hub. Guide: howto/download_weights.md"""

from pathlib import Path

from lit_llama import UserError
from lit_llama.checkpoint import TOKENIZER_FILES
from lit_llama.cli import run

LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
FILES = ("config.json", *TOKENIZER_FILES, *LORA_FILES, *(f"adapter/{name}" for name in LORA_FILES))


def main(
    repo_id: str, revision: str | None = None, checkpoint_dir: Path = Path("checkpoints"), token: str | None = None
) -> None:
    """Download a model folder, or a LoRA, from the Hugging Face hub: only what is needed, and only what is missing.

    A broken connection is taken up again where it stopped; run it again for the files that are still missing.
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
    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
        wanted = files_needed(names)
        if not any(name.endswith((".safetensors", ".bin")) for name in wanted):
            raise UserError(
                f"{repo_id}: holds no safetensors and no pytorch_model.bin. For GGUF: howto/download_weights.md"
            )
        snapshot_download(repo_id, revision=revision, local_dir=folder, allow_patterns=wanted, token=token)
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
        reason = " ".join(str(error).split())
        raise UserError(f"{repo_id}: the download broke off ({reason}). Run this again to go on") from None
    print(f"{len(wanted)} files in {folder}")


def files_needed(names: list[str]) -> list[str]:
    """Of a repository's files: config, tokenizer, and the weights in one format, safetensors where there is a choice.

    Raises:
        UserError: there is neither a model nor a LoRA in it.
    """
    top = [name for name in names if "/" not in name]
    wanted = [name for name in names if name in FILES]
    if "config.json" not in wanted and "adapter_config.json" not in wanted:
        raise UserError("the repository holds no config.json and no adapter_config.json: no model and no LoRA")
    for prefix, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        weights = [name for name in top if name.startswith(prefix) and name.endswith((suffix, f"{suffix}.index.json"))]
        if weights:
            return wanted + weights
    return wanted


if __name__ == "__main__":
    run(main)
