import pytest

from bench.arrivals import Shape, arrivals

SHAPE = Shape(agents=4, slots=2, short=0.05, long=1.0, long_share=0.05, load=0.7, seconds=20)


def test_a_load_is_a_share_of_what_the_slots_can_do() -> None:
    assert SHAPE.mean == pytest.approx(0.0975)
    assert SHAPE.capacity == pytest.approx(8 / 0.0975)
    assert SHAPE.rate == pytest.approx(0.7 * SHAPE.capacity)


def test_every_policy_gets_the_same_runs() -> None:
    assert arrivals(SHAPE, 1) == arrivals(SHAPE, 1)
    assert arrivals(SHAPE, 1) != arrivals(SHAPE, 2)


def test_runs_come_in_order_and_exactly_the_share_of_them_is_long() -> None:
    plan = arrivals(SHAPE, 3)
    assert [one.at for one in plan] == sorted(one.at for one in plan)
    assert plan[0].at >= 0
    assert plan[-1].at <= SHAPE.seconds
    assert len(plan) == round(SHAPE.rate * SHAPE.seconds)
    assert sum(one.service == SHAPE.long for one in plan) == round(len(plan) * SHAPE.long_share)


def test_the_model_is_told_how_long_a_run_takes() -> None:
    assert {one.prompt for one in arrivals(SHAPE, 1)} == {
        "[[tokens=5 delay=0.05]]",
        "[[tokens=5 delay=1]]",
    }
