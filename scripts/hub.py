"""What the scripts for the Hugging Face hub share: the files of a model, and TLS only."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from lit_llama.errors import UserError
from lit_llama.storage.model_folder import TOKENIZER_FILES
from lit_llama.storage.records import is_records_file, source_files

# the part of a dataset that a file's name tells
SPLIT = r"(?<![a-z])(train(ing)?|test(ing)?|validation|valid|val|dev|eval(uation)?)(?![a-z])"
SPLIT = re.compile(SPLIT, re.IGNORECASE)
PICKLED_FILE = "adapter_model.bin"  # of PEFT before 0.7
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
FILES = ["config.json", *TOKENIZER_FILES, *ADAPTER_FILES]
FILES += [f"adapter/{name}" for name in ADAPTER_FILES]  # of an adapter beside a LoRA


def files_needed(names: list[str]) -> list[str]:
    """Return the files to load a model or LoRA from, among those of a repository.

    These are config, tokenizer, and the weights in one format, preferably safetensors. Raises
    UserError if there is neither a model nor a LoRA.
    """
    wanted = [name for name in names if name in FILES]
    if not {"config.json", "adapter_config.json"} & set(wanted):
        problem = "holds no config.json and no adapter_config.json: no model and no LoRA"
        raise UserError(f"the repository {problem}")
    if PICKLED_FILE in names and "adapter_model.safetensors" not in names:
        wanted.append(PICKLED_FILE)
    for pattern in (r"model[\w.-]*\.safetensors", r"pytorch_model[\w.-]*\.bin"):
        pattern = re.compile(rf"{pattern}(\.index\.json)?", re.ASCII)
        if weights := [name for name in names if pattern.fullmatch(name)]:
            return wanted + weights
    return wanted


@contextmanager
def hub_errors(repo_id: str, kind: str, revision: str | None = None) -> Iterator[None]:
    """Explain what goes wrong with `huggingface_hub` inside the block in a line; require TLS."""
    try:
        from huggingface_hub import errors
    except ImportError:
        fix = "pip install -c constraints.txt -e '.[hub]'"
        raise UserError(f"downloads need huggingface_hub: {fix}") from None
    try:
        refuse_plain_http()
        yield
    except errors.GatedRepoError:
        path = repo_id if kind == "model" else f"{kind}s/{repo_id}"
        hint = f"Accept its licence at https://huggingface.co/{path}, then run: hf auth login"
        raise UserError(f"{repo_id}: gated. {hint}") from None
    except errors.RepositoryNotFoundError:
        problem = f"no such {kind} on the hub, or a private one (--token, or hf auth login)"
        raise UserError(f"{repo_id}: {problem}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{repo_id}: has no revision {revision!r}. Check --revision") from None
    except errors.HFValidationError:
        hint = "should be owner/name, as in meta-llama/Llama-2-7b-hf"
        raise UserError(f"--repo_id {repo_id}: {hint}") from None
    except Exception as error:  # each version of the library has its own types for lost connections
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
            raise
        problem = f"the download broke off ({error})"
        raise UserError(f"{repo_id}: {problem}. Run this again to resume it") from None


def download_dataset(source: str, parent: Path) -> Path:
    """Download the records of a dataset, `owner/name` or `owner/name/folder`, to train on.

    Only files of the split "train" if names tell. Returns the folder of the files. Raises
    UserError if there are none, or if they are in several folders or formats.
    """
    owner, name, *subfolder = source.split("/")
    repo_id, prefix = f"{owner}/{name}", "/".join([*subfolder, ""])
    folder = parent / source.replace("/", "--")
    with hub_errors(repo_id, "dataset"):
        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().dataset_info(repo_id)
        names = [file.rfilename for file in info.siblings or []]
        names = [file for file in names if file.startswith(prefix) and is_records_file(file)]
        if splits := [file for file in names if SPLIT.search(file)]:
            train = [file for file in splits if "train" in SPLIT.search(file)[0]]
            names = train or [file for file in names if file not in splits]
        places = sorted({f"{Path(file).parent}/*{Path(file).suffix}" for file in names})
        if len(places) != 1:
            found = f"in several places: {', '.join(places)}" if places else "nowhere"
            hint = "Pass --source owner/name/folder, or download one file by hand"
            raise UserError(f"{source}: its records are {found}. {hint}")
        if folder.exists():  # an earlier version may have had other files
            for file in source_files(folder):
                if str(file.relative_to(folder)) not in names:
                    file.unlink()
        snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=info.sha,
            local_dir=folder,
            allow_patterns=names,
        )
    print(f"{source}: {', '.join(names)}")
    return folder / Path(names[0]).parent


def refuse_plain_http() -> None:
    """Let `huggingface_hub` raise UserError if the hub, or a redirect, is not reached over TLS."""
    import huggingface_hub
    from huggingface_hub import constants

    def check(response: Any) -> None:
        check_secure(urljoin(str(response.url), response.headers.get("location", "")))

    check_secure(constants.ENDPOINT)
    usual = huggingface_hub.get_session()
    hooks = usual.event_hooks | {"response": [*usual.event_hooks["response"], check]}
    options = dict(event_hooks=hooks, follow_redirects=True, timeout=usual.timeout)
    huggingface_hub.set_client_factory(partial(type(usual), **options))


def check_secure(url: str) -> None:
    """Raise UserError if an address is neither https nor on this machine."""
    is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    if not url.startswith("https://") and not is_local:
        reason = "only https:// is safe from being read and changed on its way"
        raise UserError(f"{url}: refused, {reason}")
