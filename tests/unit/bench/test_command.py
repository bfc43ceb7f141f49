"""What the bench's command line refuses, before it starts a mesh."""

import pytest

from bench.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "clients_1", "--write", "--replicas", "agent=1"), "--write takes no --replicas"),
        (("--runs", "0"), "argument --runs: must be at least 1, not 0"),
        (("--runs", "some"), "argument --runs: 'some' is no whole number"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_scenario_that_is_none_is_refused(capsys):
    assert main(["--only", "clients_33"]) == 2
    assert "'clients_33' is no scenario; there are clients_1," in capsys.readouterr().err
