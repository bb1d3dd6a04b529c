"""Put a LoRA, an adapter or a model folder on the Hugging Face hub, with a model card. Guide: howto/export.md"""

import csv
import json
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from download import files_needed, refuse_plain_http

from lit_llama import UserError
from lit_llama.adapter import V1, V2
from lit_llama.checkpoint import checkpoint_template
from lit_llama.cli import run
from lit_llama.config import read_json
from lit_llama.methods import CONFIG_FILE, WEIGHTS_FILE, training_template
from lit_llama.prompts import TEMPLATES
from lit_llama.run_folder import checkpoints, data_sha256, flatten, read_flags

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD, FLAGS, METRICS = "README.md", "config.yaml", "metrics.csv"
TOKEN_HINT = "Make one that may write at https://huggingface.co/settings/tokens, then run: hf auth login"  # noqa: S105 it is none
LOCAL_PATH = re.compile(r"(^|[:=\s])[/~]|(^|/)\.\.(/|$)")
"""In a flag: a path that is absolute or leaves the folder, or an address. They name users, disks and servers."""
NOT_THE_RECIPE = re.compile(
    r".*_dir|devices|num_nodes|resume|config|train\.(micro_batch_tokens|activation_checkpointing|fast_paths|eval_.*|"
    r"save_.*|keep_last|log_interval)"
)


class Result(NamedTuple):
    """What a folder holds."""

    path: Path
    kind: str  # "LoRA", an adapter's V1 or V2, or "model"
    base: str | None  # owner/model on the hub
    flags: dict[str, Any]  # config.yaml, empty where there is none
    template: str | None  # of the prompts that it was trained with


def main(
    path: Path,
    repo_id: str,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
) -> None:
    """Put a LoRA, an adapter or a model folder on the Hugging Face hub, with a model card. Guide: howto/export.md

    Only what belongs to the result goes up, in one commit: no step-* folders. A README.md in the folder is the card;
    where there is none, one is written from what the folder tells.

    Args:
        path: the folder that finetune/*.py, scripts/merge_lora.py or PEFT wrote.
        repo_id: what it is to be called on the hub, such as me/my-lora; made where there is no such model yet.
        base_model: the base's name on the hub; default: owner/model where the base is checkpoints/owner/model.
        license: as the hub spells it, such as apache-2.0; that of the base binds what is made from it.
        private: for you alone; false: for everybody.
        token: one that may write; default: what `hf auth login` or HF_TOKEN holds.
        dry_run: print the card and the files, and send nothing.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UserError("uploads need huggingface_hub: pip install -c constraints.txt -e '.[hub]'") from None
    for flag, name in (("repo_id", repo_id), ("base_model", base_model)):
        try:
            if good := name is None or "/" in name:
                validate_repo_id(name or "any/name")
        except HFValidationError:
            good = False
        if not good:
            raise UserError(f"--{flag} {name}: should be owner/name, as in meta-llama/Llama-2-7b-hf")
    result = read_result(path, base_model)
    files = files_of(result)
    if CARD in files:
        if license is not None:
            raise UserError(f"--license {license}: {path / CARD} is the card and stays as it is. Say it there")
        try:
            card = ModelCard((path / CARD).read_text("utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path / CARD}: not a model card ({error})") from None
        bases = card.data.get("base_model") or []
        local = [name for name in ([bases] if isinstance(bases, str) else bases) if hub_name(name) != name]
        if local or f"{Path.home()}/" in card.content:  # PEFT's own card names the folder that it has read
            raise UserError(
                f"{path / CARD}: names {(local or [Path.home()])[0]}, a folder here. Mend or remove that file"
            )
    else:
        card = make_card(result, repo_id, license)
        files[CARD] = card.content.encode()
    if changed := sorted(name for name, content in files.items() if isinstance(content, bytes) and name != CARD):
        print(f"changed for the hub, not on disk (the base's name, paths of this machine): {', '.join(changed)}")
    if dry_run:
        print(f"\n{card.content}")
        for name, content in sorted(files.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>14,} bytes  {name}")
        print(f"dry run: nothing was sent to {repo_id}")
        return
    if token is None and get_token() is None:
        raise UserError(f"{repo_id}: there is no token. {TOKEN_HINT}")
    refuse_plain_http()
    api = HfApi(token=token)
    try:
        card.validate()  # before there is a repository
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if private and not there.private:
            raise UserError(f"--private true: {repo_id} is there already, for everybody. Give --private false")
        names = {sibling.rfilename for sibling in there.siblings or ()}
        if CARD in names and not (path / CARD).is_file():  # somebody may have edited it there
            print(f"the {CARD} that is there stays; one in {path} would replace it")
            del files[CARD]
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        if result.kind == "model":  # weights of an earlier upload would be read instead of these
            stale = [
                name for name in names - files.keys() if re.fullmatch(r"model.*\.safetensors(\.index\.json)?", name)
            ]
            operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(repo_id, operations, commit_message=f"Upload {result.kind}")
    except ValueError as error:
        raise UserError(f"{repo_id}: the hub refuses this ({error}). Check --license and {CARD}") from None
    except Exception as error:  # each version of the library has its own kinds for a broken connection
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"{repo_id}: refused ({status}), the token may not write there. {TOKEN_HINT}") from None
        raise UserError(f"{repo_id}: the upload broke off ({error}). Run this again") from None
    print(f"{len(files)} files in {url}, {'for you alone' if there.private else 'for everybody'}")


def read_result(path: Path, base_model: str | None) -> Result:
    """What the folder holds. Raises UserError where that is no result, or an adapter's base has no name on the hub."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder. Check --path")
    settings = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    kind = "LoRA" if settings.get("peft_type") == "LORA" else settings.get("method", "model")
    needed = ("config.json", "model.safetensors*") if kind == "model" else (CONFIG_FILE, WEIGHTS_FILE)
    if kind not in ("LoRA", V1, V2, "model") or not all(any(path.glob(pattern)) for pattern in needed):
        raise UserError(f"{path}: holds no LoRA, adapter or model; a run leaves its result there at its end")
    flags = read_flags(path / FLAGS) if (path / FLAGS).exists() else {}
    recorded = settings.get("base_model_name_or_path") or flags.get("checkpoint_dir")
    base = base_model or hub_name(recorded)
    if settings and base is None:
        raise UserError(
            f"--base_model: {path} calls its base {recorded!r}. Give the base's name on the hub, owner/model"
        )
    template = checkpoint_template(path) if kind == "model" else training_template(path)
    return Result(path, kind, base, flags, template)


def hub_name(recorded: str | None) -> str | None:
    """owner/model of a base that is noted as checkpoints/owner/model, wherever that is, or by its name on the hub."""
    parts = PurePath(recorded or "").parts
    if parts[-3:-2] == ("checkpoints",):
        return "/".join(parts[-2:])
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", recorded or "") and parts[0] != "checkpoints"
    return recorded if is_name and not Path(recorded).is_dir() else None


def files_of(result: Result) -> dict[str, Path | bytes]:
    """What goes up, by name there: a file of the folder, or its content without what names this machine."""
    path = result.path
    own = [file.name for file in path.iterdir() if file.is_file()]
    names = [*files_needed(own), *(name for name in (CARD, FLAGS, METRICS) if name in own)]
    if result.kind == "LoRA" and (path / "adapter").is_dir():  # that was trained with it
        names += [f"adapter/{CONFIG_FILE}", f"adapter/{WEIGHTS_FILE}"]
    home = path.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home  # the hub's cache: links to ../../blobs
    for name in names:
        if not (path / name).resolve().is_relative_to(home):
            raise UserError(f"{path / name}: is a link out of this folder. Put the file itself there, or remove it")
    files: dict[str, Path | bytes] = {name: path / name for name in names}
    for name in names:
        if name.endswith("config.json"):
            before = read_json(path / name)
            after = {key: public_value(key, value, result.base) for key, value in before.items()}
            if after != before:
                files[name] = (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()
    if FLAGS in files:
        flags = without_local_paths(result.flags)
        if result.base:
            flags["checkpoint_dir"] = f"checkpoints/{result.base}"  # where scripts/download.py puts it
        if flags != result.flags:
            files[FLAGS] = yaml.safe_dump(flags, sort_keys=False).encode()
    return files


def public_value(key: str, value: Any, base: str | None) -> Any:
    """A value of a `*config.json`, with the base's name on the hub in place of its folder here."""
    if key.endswith("name_or_path"):
        return value if hub_name(value) == value else base or ""
    return without_local_paths(value) if key.endswith("_file") else value


def without_local_paths(value: Any) -> Any:
    """Flags, with the last part alone of each path that says something about this machine or its user."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and LOCAL_PATH.search(value) else value


def make_card(result: Result, repo_id: str, license: str | None) -> "ModelCard":
    """A model card from what the folder tells. What it does not tell is left out."""
    from huggingface_hub import ModelCard, ModelCardData

    kind, base = result.kind, result.base
    data = ModelCardData(
        base_model=base,
        library_name={"LoRA": "peft", "model": "transformers"}.get(kind),
        license=license,
        pipeline_tag="text-generation",
        tags=["lit-llama"] * bool(result.flags) + [kind.lower().replace("_", "-")] * (kind != "model") or None,
    )
    what = {"LoRA": "A LoRA in the format of PEFT", "model": "A model in the format of `transformers`"}
    what |= {V1: "A LLaMA-Adapter", V2: "A LLaMA-Adapter v2"}
    of = f" for [{base}](https://huggingface.co/{base})".replace(" for", " made from" if kind == "model" else " for")
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.partition('/')[2]}",
        what[kind] + (of if base else "") + (", trained with Lit-LLaMA." if result.flags else "."),
        *usage(result, repo_id),
        *prompt_format(result),
        *training(result),
        "## Licence",
        f"{license}." if license else "None is given here. That of the base binds what is made from it.",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def usage(result: Result, repo_id: str) -> list[str]:
    """How to let it answer."""
    folder, base = f"checkpoints/{repo_id}", result.base
    script = {
        "LoRA": f"lora.py --lora_path {folder}",
        V1: f"adapter.py --adapter_path {folder}",
        V2: f"adapter_v2.py --adapter_path {folder}",
        "model": f"{'full' if result.template else 'base'}.py --checkpoint_dir {folder}",
    }[result.kind]
    downloads = [base, repo_id] if result.kind != "model" else [repo_id]
    commands = [f"python scripts/download.py --repo_id {name}" for name in downloads]
    commands.append(f'python generate/{script} --prompt "..."')
    parts = ["## Use", "With Lit-LLaMA:", "\n".join(["```", *commands, "```"])]
    if result.kind not in ("LoRA", "model"):
        return parts
    whole = base if result.kind == "LoRA" else repo_id
    code = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{whole}")',
        f'model = AutoModelForCausalLM.from_pretrained("{whole}")',
    ]
    if result.kind == "LoRA":
        code = ["from peft import PeftModel", *code, f'model = PeftModel.from_pretrained(model, "{repo_id}")']
    alone = " (without the adapter that was trained beside it)" if (result.path / "adapter").is_dir() else ""
    library = "PEFT" if result.kind == "LoRA" else "`transformers`"
    return [*parts, f"With {library}{alone}:", "\n".join(["```python", *code, "```"])]


def prompt_format(result: Result) -> list[str]:
    """How a prompt is put, nothing where the weights do not say it."""
    if result.template is None:
        return []
    if result.template not in TEMPLATES:
        return ["## Prompt", "The chat template of the base, as `tokenizer.apply_chat_template` puts it."]
    template = TEMPLATES[result.template]
    text = template.render([{"role": "user", "content": "{instruction}"}])
    end = f"`{template.end}`" if template.end else "the tokenizer's EOS token"
    return ["## Prompt", f"Template `{result.template}`, an answer ends with {end}:", f"```\n{text}\n```"]


def training(result: Result) -> list[str]:
    """Recipe, losses and data, nothing where there is no config.yaml."""
    if not result.flags:
        return []
    recipe = {name: value for name, value in flatten(result.flags).items() if not NOT_THE_RECIPE.fullmatch(name)}
    rows = [f"| {name} | {value} |" for name, value in without_local_paths(recipe).items() if value is not None]
    parts = ["## Training", "\n".join(["| flag | value |", "| --- | --- |", *rows])]
    saved = checkpoints(result.path)
    state = read_json(saved[-1] / "state.json") if saved else {}
    if (result.path / METRICS).is_file():
        with (result.path / METRICS).open(newline="", encoding="utf-8") as file:
            steps = list(csv.DictReader(file))
        samples, tokens = (sum(int(step[column]) for step in steps) for column in ("samples", "tokens"))
        losses = [float(step["val_loss"]) for step in steps if step["val_loss"]]
        before = state.get("first_val_loss")
        line = f"{len(steps):,} steps, {samples:,} samples, {tokens:,} tokens."
        line += f" Validation loss before: {before:.4f}." if before else ""
        parts.append(line + (f" After: {losses[-1]:.4f}." if losses else ""))
    data_dir = Path(result.flags.get("data_dir") or "")
    # only if it has not been prepared anew since
    try:
        meta = read_json(data_dir / "meta.json")
    except UserError:  # gone or damaged: the card does without
        meta = {}
    if meta and state.get("data_sha256") == data_sha256(meta):
        source = f"`{PurePath(meta['source']).name}` (sha256 `{meta['sha256']}`), {meta['records']:,} records"
        counts = f"{meta['train_samples']:,} samples to train, {meta['val_samples']:,} to validate"
        parts.append(f"Data: {source}: {counts}, of at most {meta['max_seq_length']:,} tokens.")
    return parts


if __name__ == "__main__":
    run(main)
