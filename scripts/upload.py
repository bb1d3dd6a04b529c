"""Upload a LoRA, an adapter or a model folder to the Hugging Face hub, with a model card.

Guide: howto/export.md
"""

import csv
import hashlib
import json
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from hub import files_needed, refuse_plain_http

from lit_llama import UserError
from lit_llama.config import read_json
from lit_llama.prompts import TEMPLATES
from lit_llama.runtime.cli import run
from lit_llama.storage.methods import METHODS, training_template
from lit_llama.storage.peft import CONFIG_FILE, WEIGHTS_FILE
from lit_llama.storage.run_folder import checkpoints, flatten, read_flags

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD, FLAGS, METRICS = "README.md", "config.yaml", "metrics.csv"
INSTALL = "pip install -c constraints.txt -e '.[hub]'"
TOKEN_PAGE = "https://huggingface.co/settings/tokens"  # noqa: S105, not a token
TOKEN_HINT = f"Make one that may write at {TOKEN_PAGE}, then run: hf auth login"
# in a flag: a path that is absolute or leads out of the folder, or an address. They name users,
# disks and servers
LOCAL_PATH = re.compile(r"(^|[:=\s])[/~]|(^|/)\.\.(/|$)")
# flags that do not change what is learned
NOT_THE_RECIPE = re.compile(
    r".*_dir|devices|num_nodes|resume|config|train\.(micro_batch_tokens|recompute"
    r"|activation_checkpointing|fast_paths|eval_.*|save_.*|keep_last|log_interval)"
)
DESCRIPTIONS = {
    "LORA": "A LoRA in the format of PEFT",
    "full": "A model in the format of `transformers`",
    "llama_adapter": "A LLaMA-Adapter",
    "llama_adapter_v2": "A LLaMA-Adapter v2",
}


class Result(NamedTuple):
    """What a folder holds."""

    path: Path
    method: str  # its name in METHODS; "full" for each model folder
    base: str | None  # owner/model on the hub
    flags: dict[str, Any]  # config.yaml, empty if it is missing
    template: str | None  # prompt template of the training


def main(
    path: Path,
    repo_id: str,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
) -> None:
    """Upload a LoRA, an adapter or a model folder to the Hugging Face hub, with a model card.

    Uploads the files of the result in one commit, without step-* folders. A README.md in the
    folder is the card; if it is missing, one is written from the other files.
    Guide: howto/export.md

    Args:
        path: Folder that finetune/*.py, scripts/merge_lora.py or PEFT wrote.
        repo_id: Name on the hub, such as me/my-lora; created if it does not exist.
        base_model: Name of the base on the hub; default: as in checkpoints/owner/model.
        license: As the hub spells it, such as apache-2.0; the base's license limits the choice.
        private: Visible for you alone; false: for everybody.
        token: Token that may write; default: that of `hf auth login` or HF_TOKEN.
        dry_run: Print the card and the files, and send nothing.
    """
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise UserError(f"uploads need huggingface_hub: {INSTALL}") from None
    check_name("--repo_id", repo_id)
    if base_model is not None:
        check_name("--base_model", base_model)
    result = read_result(path, base_model)
    files = collect_files(result)
    if CARD in files:
        if license is not None:
            problem = f"{path / CARD} is the card and stays unmodified"
            raise UserError(f"--license {license}: {problem}. Write it there")
        card = read_card(path / CARD)
    else:
        card = make_card(result, repo_id, license)
        files[CARD] = card.content.encode()
    changed = [name for name, content in files.items() if isinstance(content, bytes)]
    if changed := sorted(set(changed) - {CARD}):
        what = "(the base's name, paths of this machine)"
        print(f"changed for the hub, not on disk {what}: {', '.join(changed)}")
    if dry_run:
        print(f"\n{card.content}")
        for name, content in sorted(files.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>14,} bytes  {name}")
        print(f"dry run: nothing was sent to {repo_id}")
        return
    if token is None and get_token() is None:
        raise UserError(f"{repo_id}: there is no token. {TOKEN_HINT}")
    push(result, repo_id, card, files, private, token)


def check_name(flag: str, name: str) -> None:
    """Raise UserError unless a flag is owner/model."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        is_valid = "/" in name
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{flag} {name}: should be owner/name, as in meta-llama/Llama-2-7b-hf")


def push(
    result: Result,
    repo_id: str,
    card: "ModelCard",
    files: dict[str, Path | bytes],
    private: bool,
    token: str | None,
) -> None:
    """Create the repository if it does not exist, and commit the files."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    refuse_plain_http()
    api = HfApi(token=token)
    try:
        card.validate()  # before the repository is created
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        existing = api.model_info(repo_id)
        if private and not existing.private:
            problem = f"{repo_id} is there already, for everybody"
            raise UserError(f"--private true: {problem}. Pass --private false")
        names = {sibling.rfilename for sibling in existing.siblings or ()}
        if CARD in names and not (result.path / CARD).is_file():  # it may have been edited there
            print(f"the {CARD} that is there stays; one in {result.path} would replace it")
            del files[CARD]
        commit = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        if result.method == "full":  # weights of an earlier upload would be loaded instead
            for name in names - files.keys():
                if re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name):
                    commit.append(CommitOperationDelete(name))
        kind = {"LORA": "LoRA", "full": "model"}.get(result.method, result.method)
        api.create_commit(repo_id, commit, commit_message=f"Upload {kind}")
    except ValueError as error:
        problem = f"the hub refuses this ({error})"
        raise UserError(f"{repo_id}: {problem}. Check --license and {CARD}") from None
    except Exception as error:  # each version of the library has its own types for lost connections
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            problem = f"refused ({status}), the token may not write there"
            raise UserError(f"{repo_id}: {problem}. {TOKEN_HINT}") from None
        raise UserError(f"{repo_id}: the upload broke off ({error}). Run this again") from None
    visible = "for you alone" if existing.private else "for everybody"
    print(f"{len(files)} files in {url}, {visible}")


def read_result(path: Path, base_model: str | None) -> Result:
    """Find out what a folder holds."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder. Check --path")
    settings = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    method = settings.get("method") or settings.get("peft_type") if settings else "full"
    files = ("config.json", "model.safetensors*") if method == "full" else ("adapter_model.*",)
    if method not in METHODS or not all(any(path.glob(pattern)) for pattern in files):
        problem = "holds no LoRA, adapter or model"
        raise UserError(f"{path}: {problem}; a run leaves its result there at its end")
    flags = read_flags(path) if (path / FLAGS).exists() else {}
    recorded = settings.get("base_model_name_or_path") or flags.get("checkpoint_dir")
    base = base_model or hub_name(recorded)
    if settings and base is None:
        problem = f"{path} calls its base {recorded!r}"
        raise UserError(f"--base_model: {problem}. Pass the base's name on the hub, owner/model")
    return Result(path, method, base, flags, training_template(path))


def hub_name(recorded: str | None) -> str | None:
    """Return owner/model of a base recorded by that name, or as .../checkpoints/owner/model."""
    parts = PurePath(recorded or "").parts
    if parts[-3:-2] == ("checkpoints",):
        return "/".join(parts[-2:])
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", recorded or "") and parts[0] != "checkpoints"
    return recorded if is_name and not Path(recorded).is_dir() else None


def collect_files(result: Result) -> dict[str, Path | bytes]:
    """Return what to upload by name: files, or their content without what names this machine."""
    path = result.path
    own = [file.name for file in path.iterdir() if file.is_file()]
    names = [*files_needed(own), *(name for name in (CARD, FLAGS, METRICS) if name in own)]
    if (path / "adapter").is_dir() and result.method != "full":  # trained beside a LoRA
        names += [f"adapter/{CONFIG_FILE}", f"adapter/{WEIGHTS_FILE}"]
    home = path.resolve()
    if home.parent.name == "snapshots":  # the hub's cache, with links to ../../blobs
        home = home.parents[1]
    for name in names:
        if not (path / name).resolve().is_relative_to(home):
            problem = "is a link out of this folder"
            raise UserError(f"{path / name}: {problem}. Copy the file itself there, or remove it")
    files: dict[str, Path | bytes] = {name: path / name for name in names}
    for name in names:
        if name.endswith("config.json"):
            before = read_json(path / name)
            after = {key: public_value(key, value, result.base) for key, value in before.items()}
            if after != before:
                files[name] = f"{json.dumps(after, indent=2, ensure_ascii=False)}\n".encode()
    if FLAGS in files:
        flags = without_local_paths(result.flags)
        if result.base:
            flags["checkpoint_dir"] = f"checkpoints/{result.base}"  # as scripts/download.py does
        if flags != result.flags:
            files[FLAGS] = yaml.safe_dump(flags, sort_keys=False).encode()
    return files


def public_value(key: str, value: Any, base: str | None) -> Any:
    """Return a value of a `*config.json`, with the base's name on the hub instead of its folder."""
    if key.endswith("name_or_path"):
        return value if hub_name(value) == value else base or ""
    return without_local_paths(value) if key.endswith("_file") else value


def without_local_paths(value: Any) -> Any:
    """Return flags with only the last part of each path that tells about this machine."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    is_local = isinstance(value, str) and LOCAL_PATH.search(value)
    return PurePath(value).name if is_local else value


def read_card(file: Path) -> "ModelCard":
    """Load a model card. Raises UserError if it names folders of this machine."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(file.read_text("utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not a model card ({error})") from None
    bases = card.data.get("base_model") or []
    local = [name for name in ([bases] if isinstance(bases, str) else bases) if is_local(name)]
    if f"{Path.home()}/" in card.content:  # PEFT's own card names the folder that it has read
        local.append(str(Path.home()))
    if local:
        raise UserError(f"{file}: names {local[0]}, a folder here. Fix or remove that file")
    return card


def is_local(name: str) -> bool:
    """Whether a base is not a name on the hub."""
    return hub_name(name) != name


def make_card(result: Result, repo_id: str, license: str | None) -> "ModelCard":
    """Write a model card from what the folder tells."""
    from huggingface_hub import ModelCard, ModelCardData

    method, base = result.method, result.base
    tags = ["lit-llama"] if result.flags else []
    if method != "full":
        tags.append(method.lower().replace("_", "-"))
    data = ModelCardData(
        base_model=base,
        library_name={"LORA": "peft", "full": "transformers"}.get(method),
        license=license,
        pipeline_tag="text-generation",
        tags=tags or None,
    )
    about = DESCRIPTIONS.get(method, f"The result of the method {method}")
    if base:
        relation = "made from" if method == "full" else "for"
        about += f" {relation} [{base}](https://huggingface.co/{base})"
    about += ", trained with Lit-LLaMA." if result.flags else "."
    no_license = "None is given here. That of the base binds what is made from it."
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.partition('/')[2]}",
        about,
        *usage(result, repo_id),
        *prompt_format(result),
        *training(result),
        "## Licence",
        f"{license}." if license else no_license,
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def usage(result: Result, repo_id: str) -> list[str]:
    """Return how to run inference."""
    folder, base = f"checkpoints/{repo_id}", result.base
    if result.method == "full":
        script = "full.py" if result.template else "base.py"
        flags, downloads = f"--checkpoint_dir {folder}", [repo_id]
    else:
        # generate/adapter.py loads the result of any method
        known = result.method in DESCRIPTIONS
        script = f"{METHODS[result.method].script if known else 'adapter'}.py"
        flag = "--lora_path" if result.method == "LORA" else "--adapter_path"
        flags, downloads = f"{flag} {folder}", [base, repo_id]
    commands = [f"python scripts/download.py --repo_id {name}" for name in downloads]
    commands.append(f'python generate/{script} {flags} --prompt "..."')
    parts = ["## Use", "With Lit-LLaMA:", "\n".join(["```", *commands, "```"])]
    if result.method not in ("LORA", "full"):
        return parts
    library, model = "`transformers`", repo_id
    if result.method == "LORA":
        library, model = "PEFT", base
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{model}")',
        f'model = AutoModelForCausalLM.from_pretrained("{model}")',
    ]
    if result.method == "LORA":
        code = ["from peft import PeftModel", *code]
        code.append(f'model = PeftModel.from_pretrained(model, "{repo_id}")')
    if (result.path / "adapter").is_dir():
        library += " (without the adapter that was trained beside it)"
    return [*parts, f"With {library}:", "\n".join(["```python", *code, "```"])]


def prompt_format(result: Result) -> list[str]:
    """Return the format of a prompt, nothing if the weights do not record it."""
    if result.template is None:
        return []
    if result.template not in TEMPLATES:
        use = "as `tokenizer.apply_chat_template` renders it"
        return ["## Prompt", f"The chat template of the base, {use}."]
    template = TEMPLATES[result.template]
    text = template.render([{"role": "user", "content": "{instruction}"}])
    end = f"`{template.end}`" if template.end else "the tokenizer's EOS token"
    about = f"Template `{result.template}`, an answer ends with {end}:"
    return ["## Prompt", about, f"```\n{text}\n```"]


def training(result: Result) -> list[str]:
    """Return recipe, losses and data, nothing if there is no config.yaml."""
    if not result.flags:
        return []
    recipe = without_local_paths(flatten(result.flags))
    rows = [
        f"| {name} | {value} |"
        for name, value in recipe.items()
        if value is not None and not NOT_THE_RECIPE.fullmatch(name)
    ]
    parts = ["## Training", "\n".join(["| flag | value |", "| --- | --- |", *rows])]
    saved = checkpoints(result.path)
    state = read_json(saved[-1] / "state.json") if saved else {}
    if (result.path / METRICS).is_file():
        with (result.path / METRICS).open(newline="", encoding="utf-8") as file:
            steps = list(csv.DictReader(file))
        samples, tokens = (sum(int(step[key]) for step in steps) for key in ("samples", "tokens"))
        line = f"{len(steps):,} steps, {samples:,} samples, {tokens:,} tokens."
        if before := state.get("first_val_loss"):
            line += f" Validation loss before: {before:.4f}."
        if losses := [float(step["val_loss"]) for step in steps if step["val_loss"]]:
            line += f" After: {losses[-1]:.4f}."
        parts.append(line)
    file = Path(result.flags.get("data_dir") or "") / "meta.json"
    # the dataset may be gone, or another one by now
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == state.get("data_sha256"):
        meta = read_json(file)
        hashes = [meta["sha256"]] if isinstance(meta["sha256"], str) else meta["sha256"]
        source = f"`{PurePath(meta['source']).name}` (sha256 `{', '.join(hashes)}`)"
        counts = f"{meta['train_samples']:,} samples to train, {meta['val_samples']:,} to validate"
        longest = f"of at most {meta['max_seq_length']:,} tokens"
        parts.append(f"Data: {source}, {meta['records']:,} records: {counts}, {longest}.")
    return parts


if __name__ == "__main__":
    run(main)
