"""What the quickstart ships and shows; `.ci/run` runs the thing itself."""

import json
from pathlib import Path

from conftest import ROOT, load_script

quickstart = load_script("scripts/quickstart.py")
RECORDS = ROOT / "scripts/quickstart_records.json"


def test_shipped_records_are_what_the_script_writes(tmp_path: Path) -> None:
    load_script("scripts/make_quickstart_records.py").main(tmp_path / "records.json")
    assert (tmp_path / "records.json").read_bytes() == RECORDS.read_bytes()


def test_records_all_have_the_style_and_none_has_the_prompts() -> None:
    records = json.loads(RECORDS.read_text("utf-8"))
    assert len(records) > 300
    assert len({record["instruction"] for record in records}) == len(records)
    assert all(record["output"].endswith("\nThe lamp is lit. Sail safely.") for record in records)
    assert not {record["instruction"] for record in records} & set(quickstart.PROMPTS)


def test_a_second_run_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    assert quickstart.next_free(Path("out/lora")) == Path("out/lora")
    (tmp_path / "out/lora").mkdir(parents=True)
    (tmp_path / "out/lora-2").mkdir()
    assert quickstart.next_free(Path("out/lora")) == Path("out/lora-3")
