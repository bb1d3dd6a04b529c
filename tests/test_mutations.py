"""The table of `mutations.py` fits the code: it changes what it means to, and names tests that are there."""

import re

import pytest
from mutations import MUTATIONS, ROOT, Mutation, mutated


def test_there_are_forty_in_six_files() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) == 40
    assert {mutation.file.removesuffix(".py") for mutation in MUTATIONS} == {
        *("lora", "adapter", "attention", "training", "generation", "checkpoint"),
    }


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_changes_one_place_and_names_its_tests(mutation: Mutation) -> None:
    compile(mutated(mutation), mutation.file, "exec")  # raises where the place is not there once
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert re.search(rf"^def {name.partition('[')[0]}\(", source, re.MULTILINE), test
