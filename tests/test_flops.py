"""Operations of a step, worked out by hand for the tiny model."""

from __future__ import annotations

import pytest

from fedtailor import preparing
from fedtailor.study import flops
from tiny_runs import asked


@pytest.mark.parametrize("method", ["prefix", "lora", "full", "soft_prompt"])
def test_the_estimate_is_near_what_is_counted(method: str) -> None:
    one = asked(f"method.name={method}", "rounds=3")
    told = flops.of(one, *preparing.prepare(one))
    assert told["steps"] == 3 * 3 * 2, "rounds, silos, local steps"
    assert 0.95 < told["estimated_step"] / told["measured_step"] < 1.1


def test_all_weights_cost_half_as_much_again_as_an_adapter() -> None:
    """A frozen weight has no gradient of its own: 4 N T instead of 6 N T."""
    prefix, full = (flops.of(one, *preparing.prepare(one)) for one in (asked(), asked("method.name=full")))
    assert full["estimated_step"] / prefix["estimated_step"] == pytest.approx(1.5, abs=0.3)
    assert full["measured_step"] > 1.2 * prefix["measured_step"]


def test_a_method_without_local_steps_says_nothing() -> None:
    one = asked("method.name=search", "method.calls=100")
    assert flops.of(one, *preparing.prepare(one)) == {}
