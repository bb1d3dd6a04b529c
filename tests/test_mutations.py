"""The table of `mutations.py` fits the code, and names tests that exist."""

import re

import pytest
from mutations import MUTATIONS, ROOT, Mutation, mutated


def test_there_are_forty() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) == 40


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_changes_one_place_and_names_its_tests(mutation: Mutation) -> None:
    compile(mutated(mutation), mutation.file, "exec")  # raises unless the place occurs once
    file, _, name = mutation.tests.partition("::")
    source = (ROOT / "tests" / file).read_text("utf-8")
    assert re.search(rf"^def {name.partition('[')[0]}\(", source, re.MULTILINE), mutation.tests
