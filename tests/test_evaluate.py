"""Metrics by hand, and against the libraries that define them; silos together as silos apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtailor import wire
from fedtailor.answering import fresh
from fedtailor.baselines import Bare
from fedtailor.core import Silo
from fedtailor.data import SiloData
from fedtailor.engines.in_process import InProcess
from fedtailor.evaluate import (
    Counts,
    Evaluate,
    ask_all,
    better,
    bleu,
    evaluate,
    evaluate_many,
    macro_f1,
    metrics,
    rouge_l,
    success,
    summary,
)
from fedtailor.models import Resident

Silos = Mapping[str, SiloData]
WORDS = st.lists(st.sampled_from(["a", "b", "the", "cat", "sat", "."]), max_size=8).map(" ".join)


def silos_of(base: Resident, data: Silos) -> list[Silo]:
    return [Silo(n, d, {"base": base}, 0) for n, d in data.items()]


def test_accuracy_and_macro_f1_by_hand() -> None:
    """True a: 3 told a, 1 told b. True b: 2 told a, 4 told b. F1 of a: 2*3/(2*3+2+1); of b: 2*4/(2*4+1+2)."""
    found = metrics(Counts(10, 20, 5.0, ((3, 1), (2, 4))))
    assert found == pytest.approx({"loss": 0.25, "accuracy": 0.7, "macro_f1": (6 / 9 + 8 / 11) / 2})


def test_the_success_of_a_backdoor_by_hand() -> None:
    """Told as the target, which is the answer of all these rows: 3 of 4, 1 of 10; one silo has no such row."""
    counts = {"a": Counts(4, 4, 1.0, ((3, 1), (0, 0))), "b": Counts(10, 10, 1.0, ((1, 9), (0, 0))), "c": Counts(0, 0, 0.0)}
    found = success(counts)["attack_success"]
    assert found.pop("per_silo") == {"a": 0.75, "b": 0.1}
    assert found == pytest.approx({"mean": 0.425, "worst": 0.75, "pooled": 4 / 14})
    assert success({"c": counts["c"]}) == {}


def test_a_label_that_never_occurs_does_not_count() -> None:
    assert macro_f1(((3, 1, 0), (2, 4, 0), (0, 0, 0))) == pytest.approx(macro_f1(((3, 1), (2, 4))))
    # told once, and wrongly: its F1 is 0, and it is in the mean
    assert macro_f1(((1, 0, 1), (0, 2, 0), (0, 0, 0))) == pytest.approx((2 / 3 + 1 + 0) / 3)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_classification_equals_sklearn_on_the_rows(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    true, told = zip(*pairs, strict=True)
    confusion = tuple(tuple(pairs.count((t, p)) for p in range(4)) for t in range(4))
    found = metrics(Counts(len(pairs), len(pairs), 1.0, confusion))
    assert found["accuracy"] == pytest.approx(accuracy_score(true, told))
    assert found["macro_f1"] == pytest.approx(f1_score(true, told, average="macro", zero_division=0))


def test_rouge_l_by_hand() -> None:
    """Longest common subsequence "the cat on": 3 of 5 told words, 3 of 4 in the reference."""
    assert rouge_l("the big cat on it", "the cat sat on") == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75))
    assert rouge_l("same", "same") == 1.0
    assert rouge_l("", "same") == 0.0


@given(WORDS, WORDS)
def test_rouge_l_is_the_librarys(told: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rougeL"]).score(target=reference, prediction=told)["rougeL"].fmeasure
    assert rouge_l(told, reference) == pytest.approx(expected)


@given(st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=6))
def test_bleu_of_pooled_sums_is_that_of_the_whole_corpus(pairs: list[tuple[str, str]]) -> None:
    from sacrebleu import corpus_bleu

    sums = tuple(map(sum, zip(*(bleu(told, reference) for told, reference in pairs), strict=True)))
    found = metrics(Counts(len(pairs), 1, 1.0, bleu=sums, told=True))
    expected = corpus_bleu([told for told, _ in pairs], [[reference for _, reference in pairs]]).score / 100
    assert found["bleu"] == pytest.approx(expected, abs=1e-9)


def test_bleu_of_a_perfect_corpus() -> None:
    text = "the cat sat on the mat today"
    sums = tuple(2 * n for n in bleu(text, text))
    assert sums == (14, 12, 10, 8, 14, 12, 10, 8, 14, 14)
    assert metrics(Counts(2, 1, 1.0, bleu=sums, told=True))["bleu"] == pytest.approx(1)


def test_metrics_of_texts_by_hand() -> None:
    found = metrics(Counts(4, 10, 5.0, exact=1, rouge_l=3.0, bleu=bleu("a b c d", "a b c d"), told=True))
    assert found == pytest.approx({"loss": 0.5, "exact_match": 0.25, "rouge_l": 0.75, "bleu": 1.0})
    assert metrics(Counts(4, 10, 5.0)) == {"loss": 0.5}
    assert metrics(Counts(0, 0, 0.0)) == {}


def test_summary_by_hand() -> None:
    """Silo x: 1 of 2 right, 2 nats in 2 places. Silo y: 9 of 10 right, 30 nats in 10. Together 10 of 12, 32 nats in 12."""
    found = summary(
        {"x": Counts(2, 2, 2.0, ((1, 1), (0, 0))), "y": Counts(10, 10, 30.0, ((4, 0), (1, 5))), "z": Counts(0, 0, 0.0)}
    )
    assert found["loss"] == {
        "mean": 2.0, "worst": 3.0, "per_silo": {"x": 1.0, "y": 3.0}, "pooled": pytest.approx(32 / 12),
    }  # fmt: skip
    assert found["accuracy"] == {
        "mean": pytest.approx(0.7), "worst": 0.5, "per_silo": {"x": 0.5, "y": 0.9}, "pooled": pytest.approx(10 / 12),
    }  # fmt: skip
    assert found["macro_f1"]["pooled"] == metrics(Counts(12, 12, 32.0, ((5, 1), (1, 5))))["macro_f1"]
    assert summary({}) == {}
    assert summary({"x": Counts(0, 0, 0.0)}) == {}


def test_nothing_is_pooled_over_different_questions() -> None:
    three = Counts(1, 1, 1.0, ((1, 0, 0), (0, 0, 0), (0, 0, 0)))
    assert "pooled" not in summary({"x": Counts(1, 1, 1.0, ((1, 0), (0, 0))), "y": three})["accuracy"]


def test_better() -> None:
    assert better("loss", 1.0, 2.0)
    assert not better("loss", 2.0, 1.0)
    assert better("accuracy", 2.0, 1.0)
    assert not better("accuracy", 1.0, 1.0)


def test_a_classifying_silo_by_hand(causal: Resident, rated: Silos) -> None:
    rows, labels = rated["shop"].test, rated["shop"].labels
    scores = fresh(causal).scores(rows, labels)
    counts = evaluate(silos_of(causal, rated)[1], Evaluate(Bare(), "test", 4))
    expected = [[0, 0], [0, 0]]
    nll = 0.0
    for row, score in zip(rows, scores.tolist(), strict=True):
        expected[labels.index(row.answer)][score.index(max(score))] += 1
        nll -= score[labels.index(row.answer)]
    assert counts.confusion == tuple(map(tuple, expected))
    assert counts.nll == pytest.approx(nll, rel=1e-5)
    assert counts.rows == 3
    assert counts.places == sum(len(f" {row.answer}") for row in rows)  # a byte is a token
    assert not counts.told


def test_an_encoder_counts_rows_as_places(bert: Resident, rated: Silos) -> None:
    counts = evaluate(silos_of(bert, rated)[0], Evaluate(Bare(labels=2), "test", 4))
    assert (counts.rows, counts.places) == (3, 3)
    assert counts.nll == pytest.approx(3 * math.log(2), rel=1e-5)


def test_a_writing_silo_by_hand(causal: Resident, written: Silos) -> None:
    rows = written["zoo"].test
    model = fresh(causal)
    told = model.generate(rows, max_new_tokens=6)
    right = replace(written["zoo"], test=(*rows, replace(rows[0], answer=told[0])))
    counts = evaluate(Silo("zoo", right, {"base": causal}, 0), Evaluate(Bare(), "test", 6))
    likely = model.logprobs(right.test)
    assert counts.nll == pytest.approx(-sum(total for total, _ in likely), rel=1e-6)
    assert counts.places == sum(count for _, count in likely)
    assert counts.exact == 1
    assert counts.told
    expected = sum(rouge_l(text, row.answer) for text, row in zip([*told, told[0]], right.test, strict=True))
    assert counts.rouge_l == pytest.approx(expected)
    quick = evaluate(Silo("zoo", right, {"base": causal}, 0), Evaluate(Bare(), "test", 6, generate=False))
    assert (quick.nll, quick.places, quick.told) == (counts.nll, counts.places, False)
    assert metrics(quick).keys() == {"loss"}


@pytest.mark.parametrize("task", ["rated", "written"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_together_as_apart(causal: Resident, task: str, split: str, request: pytest.FixtureRequest) -> None:
    silos = silos_of(causal, request.getfixturevalue(task))
    body = Evaluate(Bare("A few words in front of every row. "), split, 4)
    for one, other in zip(evaluate_many(silos, body), [evaluate(silo, body) for silo in silos], strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
        assert replace(one, nll=0) == replace(other, nll=0, rouge_l=pytest.approx(other.rouge_l))


def test_an_encoder_together_as_apart(bert: Resident, rated: Silos) -> None:
    silos, body = silos_of(bert, rated), Evaluate(Bare(labels=2), "test", 4)
    assert evaluate_many(silos, body) == [evaluate(silo, body) for silo in silos]


def test_silos_that_ask_different_questions(causal: Resident, rated: Silos, written: Silos) -> None:
    """[silo.NAME] may give one silo answers to write where the others have labels."""
    silos = [*silos_of(causal, {"rates": rated["zoo"]}), *silos_of(causal, {"writes": written["zoo"]})]
    body = Evaluate(Bare(), "test", 4)
    rates, writes = evaluate_many(silos, body)
    assert rates == evaluate(silos[0], body)
    assert writes == evaluate(silos[1], body)
    assert writes.told
    assert rates.confusion


@pytest.mark.parametrize("labels", [(), ("bad", "good")])
def test_an_empty_silo(any_resident: Resident, labels: tuple[str, ...], rated: Silos) -> None:
    if any_resident.classifier and not labels:
        labels = ("one", "other")
    empty = SiloData((), (), (), labels)
    body = Evaluate(Bare(labels=len(labels)), "val", 4)
    counts = evaluate(Silo("empty", empty, {"base": any_resident}, 0), body)
    assert (counts.rows, counts.places, counts.nll) == (0, 0, 0)
    assert metrics(counts) == {}
    if labels == ("bad", "good"):
        full = Silo("zoo", rated["zoo"], {"base": any_resident}, 0)
        first, second = evaluate_many([Silo("empty", empty, {"base": any_resident}, 0), full], body)
        assert (first.rows, second.rows) == (0, 3)


def test_nothing_of_a_row_leaves(llama: Resident, written: Silos) -> None:
    """The packed reply holds no text of the silo's, and has one number per field."""
    packed = wire.pack(evaluate(silos_of(llama, written)[2], Evaluate(Bare(), "test", 4)))
    assert b"bear" not in packed
    assert wire.tensors_of(wire.unpack(packed)) == {}
    assert wire.unpack(packed) == evaluate(silos_of(llama, written)[2], Evaluate(Bare(), "test", 4))


def test_ask_all_is_per_silo(llama: Resident, rated: Silos) -> None:
    body = Evaluate(Bare(), "test", 4)
    found = ask_all(InProcess(rated, {"base": llama}).reach(0), body)
    assert list(found) == list(rated)
    for silo in silos_of(llama, rated):
        assert metrics(found[silo.name]) == pytest.approx(metrics(evaluate(silo, body)), rel=1e-5)


@pytest.mark.parametrize("bad", [Counts(-1, 1, 1.0), Counts(1, -1, 1.0), Counts(1, 1, -1.0), Counts(1, 1, math.inf)])
def test_counts_out_of_bounds(bad: Counts) -> None:
    body = Evaluate(Bare(), "test", 4)
    assert "out of bounds" in str(bad.problem(body))
    assert Counts(1, 1, math.nan).problem(body) == "the loss is nan: lower method.lr or method.server_lr"
    assert Counts(1, 1, 1.0).problem(body) is None
