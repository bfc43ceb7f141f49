"""Every mutation still finds the code that it is to break."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.chaos.cases import CASES
from tests.chaos.faults.cluster import ROOT
from tests.chaos.faults.plan import only
from tests.chaos.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_the_code_of_today(mutation: Mutation, tmp_path: Path) -> None:
    target = tmp_path / mutation.file
    target.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.file, target)
    mutation.apply(tmp_path)
    assert target.read_text() != (ROOT / mutation.file).read_text()


@pytest.mark.parametrize(
    "mutation", [one for one in MUTATIONS if "/migrations/" in one.file], ids=lambda mutation: mutation.name
)
def test_no_later_migration_puts_a_broken_function_right_again(mutation: Mutation) -> None:
    path = ROOT / mutation.file
    before = path.read_text().partition(mutation.old)[0]
    name = re.findall(r"CREATE (?:OR REPLACE )?FUNCTION (session\.\w+)", before)[-1]
    later = [other for other in path.parent.glob("*.sql") if other.name > path.name]
    again = re.compile(rf"CREATE OR REPLACE FUNCTION {re.escape(name)}\(|DROP FUNCTION {re.escape(name)}\(")
    assert [other.name for other in later if again.search(other.read_text())] == []


def test_there_are_a_dozen_with_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 12


def test_every_case_names_faults_that_there_are() -> None:
    assert all(only(*case.faults) or case.theme for case in CASES)
    assert len({case.name for case in CASES}) == len({case.seed for case in CASES}) == len(CASES)
