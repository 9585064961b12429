"""Two models on the same rows: the difference of their accuracies and its interval, by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedtailor.core import Silo
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import SiloError
from fedtailor.evaluate import Evaluate, evaluate, evaluate_many
from fedtailor.limits import Limits
from fedtailor.models import Resident
from fedtailor.paired import Discordant, Pair, ask_all, compare, difference, over_seeds
from fedtailor.prompts import Prompt, Prompted
from judged import LABELS, judged

Z = 1.959964


def test_a_difference_by_hand() -> None:
    """10 rows: 4 right with one alone, 1 with the other: 0.3, variance (0.5 - 0.09) / 10."""
    found = difference([Discordant(10, ((0, 0), (4, 1))), Discordant(0, ((0, 0), (0, 0)))], 1)
    half = Z * math.sqrt(0.41 / 10)
    assert found == pytest.approx({"mean": 0.3, "low": 0.3 - half, "high": 0.3 + half})


def test_silos_weigh_the_same() -> None:
    found = difference([Discordant(10, ((4, 0),)), Discordant(1000, ((0, 0),))])
    assert found["mean"] == pytest.approx(0.2)
    assert found["high"] - found["mean"] == pytest.approx(Z * math.sqrt((0.4 - 0.16) / 10) / 2)
    assert difference([Discordant(0, ((0, 0),))]) == {}


def test_seeds_add_their_own_variance() -> None:
    one = {"mean": 0.1, "low": 0.1 - Z * 0.02, "high": 0.1 + Z * 0.02}
    other = {"mean": 0.2, "low": 0.2 - Z * 0.02, "high": 0.2 + Z * 0.02}
    found = over_seeds({0: one, 1: other})
    assert found["mean"] == pytest.approx(0.15)
    assert found["high"] - found["mean"] == pytest.approx(Z * math.sqrt(0.02**2 + 0.005 / 2))
    assert found["by_seed"] == {"0": 0.1, "1": 0.2}


@dataclass(frozen=True)
class Told:
    """Whoever is right: these of the rows."""

    right: tuple[int, ...]

    def open(self, models: Any, ask: Any = None) -> Any:
        import torch

        class Answering:
            def scores(_, rows: Any, labels: Any) -> torch.Tensor:
                true = torch.tensor([labels.index(row.answer) for row in rows])
                told = torch.tensor([t if i in self.right else 1 - t for i, t in enumerate(true.tolist())])
                return torch.nn.functional.one_hot(told, 2).float()

        return Answering()


def test_only_where_they_differ_is_counted() -> None:
    silo = Silo("silo-0", judged(silos=1)["silo-0"], {}, 0)
    found = compare(silo, Pair(Told((0, 1, 2)), (Told((2, 3)), Told((0, 1, 2)))))
    assert found == Discordant(12, ((2, 1), (0, 0)))


def test_a_prompt_differs_nowhere_from_itself(llama: Resident) -> None:
    ask = InProcess(judged(rows=6), {"base": llama}).reach(0)
    same, other = Prompted(Prompt("{input}"), LABELS), Prompted(Prompt("{input}", LABELS[::-1]), LABELS)
    found = ask_all(ask, same, {"itself": same, "turned": other})
    assert found["itself"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert found["turned"]["mean"] != 0  # the words exchanged: whoever is right is wrong with the other


@pytest.mark.parametrize("apart", [((8, 3),), ((-1, 0),)])
def test_counts_that_cannot_be_are_refused(apart: tuple[tuple[int, int], ...]) -> None:
    asked = Pair(None, (None,))
    assert Discordant(10, apart).problem(asked) == "more rows apart than there are rows"
    assert Discordant(10, ((4, 6),)).problem(asked) is None
    assert Discordant(10, ((4, 6), (0, 0))).problem(asked) == "compared with 2, asked 1"


def test_a_silo_with_fewer_rows_than_its_minimum_counts_none(llama: Resident) -> None:
    rows = judged(silos=1)["silo-0"]
    few = Silo("silo-0", replace(rows, limits=Limits(minimum=13)), {"base": llama}, 0)
    enough = Silo("silo-0", replace(rows, settings={"minimum": 12}), {"base": llama}, 0)
    asked = Pair(Told((0,)), (Told((1,)),))
    assert compare(few, asked) == Discordant(0, ((0, 0),))
    assert compare(enough, asked) == Discordant(12, ((1, 1),))
    body = Evaluate(Prompted(Prompt("{input}"), LABELS), "val", 4)
    assert [one.rows for one in evaluate_many([few, enough], body)] == [0, 12]
    with pytest.raises(SiloError, match="not those of train: ask for val or test"):
        evaluate(few, replace(body, split="train"))
