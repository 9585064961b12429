"""Prompt search as a whole, over silos of a tiny model: against centralized search, against trying everything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chat_server import serving
from fedtailor import bandits, wire
from fedtailor.baselines import pooled
from fedtailor.core import Silo
from fedtailor.data import Row, SiloData
from fedtailor.endpoint import Endpoint
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, UserError
from fedtailor.methods.search import Search, State
from fedtailor.models import Resident
from fedtailor.prefixes import Prefixes
from fedtailor.privacy import noise
from fedtailor.prompts import Prompt, Prompted
from fedtailor.trying import scored
from judged import LABELS, PROMPTS, judged, searched, sharpened

EXAMPLES = (("The tea was warm.", "good"), ("The lamp was dull.", "poor"))


@pytest.fixture(scope="module")
def sharp() -> Resident:
    return sharpened()


def still(**more: Any) -> Search:
    """The hand-written pool alone."""
    return Search(prompts=PROMPTS, proposals=0, **more)


def scores_of(base: Resident, data: Mapping[str, SiloData], prompt: Prompt) -> torch.Tensor:
    """(rows,) of all silos together."""
    rows = [row for silo in data.values() for row in silo.train]
    return scored(base, prompt, LABELS, rows, "probability", Prefixes())


def within(apart: torch.Tensor) -> bool:
    """Whether the mean of paired differences is no more than its 95 % interval is wide."""
    return float(apart.mean()) <= 1.96 * float(apart.std()) / len(apart) ** 0.5


def test_exhaustive_search_is_centralized_search(sharp: Resident) -> None:
    """The same sums to the last bit, and so the same prompt."""
    data = judged()
    federated = searched(sharp, data, still(bandit="exhaustive"))
    centralized = searched(sharp, pooled(data), still(bandit="exhaustive").pooled(3))
    assert torch.equal(federated.known.sums.sum(1), centralized.known.sums[:, 0])
    assert torch.equal(federated.known.squares.sum(1), centralized.known.squares[:, 0])
    assert torch.equal(federated.known.counts.sum(1), centralized.known.counts[:, 0])
    assert federated.known.counts.tolist() == [[60, 60, 60]] * len(PROMPTS)
    assert federated.best == centralized.best


@pytest.mark.parametrize("bandit", ["halving", "ucb"])
def test_a_bandit_finds_what_trying_everything_finds(sharp: Resident, bandit: str) -> None:
    """With a third of the calls: the same winner, or one within the paired interval of it on all rows."""
    data = judged()
    everything = searched(sharp, data, still(bandit="exhaustive"))
    calls = bandits.spent(everything.known)
    assert calls == 60 * len(PROMPTS)
    for seed in range(3):
        few = searched(sharp, data, still(bandit=bandit, calls=calls // 3), seed=seed)
        assert bandits.spent(few.known) <= calls // 3
        best, found = everything.pool[everything.best], few.pool[few.best]
        assert within(scores_of(sharp, data, best) - scores_of(sharp, data, found)), (seed, best, found)


@pytest.mark.parametrize("bandit", ["halving", "ucb"])
def test_a_bandit_over_silos_finds_what_it_finds_in_one_place(sharp: Resident, bandit: str) -> None:
    """At the same number of model calls, all silos together."""
    data = judged()
    for seed in range(3):
        method = still(bandit=bandit, calls=20 * len(PROMPTS))  # a third of all there are
        federated = searched(sharp, data, method, seed=seed)
        centralized = searched(sharp, pooled(data), method.pooled(3), seed=seed)
        calls = [int(state.known.counts.sum()) for state in (federated, centralized)]
        assert calls[0] == pytest.approx(calls[1], rel=0.1)
        one, other = (scores_of(sharp, data, state.pool[state.best]) for state in (centralized, federated))
        assert within(one - other), (seed, centralized.best, federated.best)


def test_rounds_propose_and_go_on(llama: Resident) -> None:
    method = Search(prompts=PROMPTS[:4], calls=60, proposals=6, examples=EXAMPLES, shots=2, keep=3)
    state = searched(llama, judged(), method, rounds=3)
    assert state.pool[:4] == tuple(map(Prompt, PROMPTS[:4]))
    assert len(set(state.pool)) == len(state.pool) > 4
    assert {"hand", "cross", "examples"} <= set(state.origins)
    assert 3 <= len(state.running) <= 4
    assert state.best in state.running
    assert state.notes["calls"] <= 3 * 60
    assert state.notes["model_calls"] == int(state.known.counts.sum())
    assert state.notes["candidates"] == len(state.pool)
    assert all(pair in EXAMPLES for prompt in state.pool for pair in prompt.examples)
    assert method.serve(state) == Prompted(state.pool[state.best], LABELS)
    again = searched(llama, judged(), method, rounds=3)
    assert wire.pack(again) == wire.pack(state)


def test_silos_that_miss_a_round_are_taken_again(llama: Resident) -> None:
    data = judged()
    engine = InProcess(data, {"base": llama}, rounds=2)
    method = still(calls=60)
    state = method.round(method.begin(engine.reach(0)), engine.reach(1, ["silo-0", "silo-2"]))
    assert state.known.counts.sum(0).tolist()[1] == 0
    assert state.known.error().isfinite().any()
    state = method.round(state, engine.reach(2, ["silo-1"]))
    assert state.known.counts.sum(0).tolist()[1] > 0


def test_a_silo_with_too_few_rows_is_named_and_left_out(llama: Resident) -> None:
    data = judged()
    data["silo-1"] = SiloData(data["silo-1"].train[:3], (), (), LABELS)
    engine = InProcess(data, {"base": llama})
    method = still(calls=90, minimum=5)
    state = method.round(method.begin(engine.reach(0)), engine.reach(1))
    assert {(silo, why) for _, silo, why in engine.rejected} == {
        ("silo-1", "fewer rows than the minimum of 5: it says nothing of so few")
    }
    assert state.known.counts.sum(0).tolist()[1] == 0


def test_noise_is_accounted_and_within_what_was_asked(llama: Resident) -> None:
    method = Search(prompts=PROMPTS, noise="gaussian", epsilon=2.0, calls=60, proposals=2, noise_seed="experiment")
    state = searched(llama, judged(), method, rounds=2)
    assert 0 < state.notes["epsilon"] <= 2.0
    how = noise("gaussian", 2.0, 1e-5, len(PROMPTS) + 2 * 2)
    assert state.known.noise == how.variance
    clear = searched(llama, judged(), still(calls=60))
    assert float(state.known.error().min()) > float(clear.known.error().min())
    assert method.noiseless() == replace(method, noise="none")
    assert clear.notes.get("epsilon") is None
    assert still().noiseless() is None


def test_a_proposal_with_a_secret_goes_nowhere(llama: Resident, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets.txt"
    secrets.write_text("Project Zinc\n\n")
    seen: list[bytes] = []
    with serving(lambda messages: "Judge it as project  zinc would.\nJudge it with care.") as server:
        method = Search(
            prompts=PROMPTS[:2], calls=40, proposals=2, proposers=("endpoint",), secrets=str(secrets),
            endpoint=Endpoint(server.url, "m"),
        )  # fmt: skip
        engine = InProcess(
            judged(), {"base": llama}, record=lambda silo, way, message: seen.append(bytes(message))  # type: ignore[arg-type]
        )
        state = method.round(method.begin(engine.reach(0)), engine.reach(1))
        assert "zinc" not in json.dumps(server.asked).casefold()
    assert [p.template for p in state.pool[2:] if "Judge it with care." in p.template]
    assert state.skipped == 1
    assert seen
    assert all(b"zinc" not in message.lower() for message in seen)


@pytest.mark.parametrize(
    "more", [{"prompts": ("For Project Zinc: {input}",)}, {"examples": (("It was project zinc.", "good"),)}]
)
def test_a_secret_of_the_users_own_is_told(llama: Resident, tmp_path: Path, more: Any) -> None:
    secrets = tmp_path / "secrets.txt"
    secrets.write_text("project zinc")
    method = Search(**{"prompts": PROMPTS, **more}, secrets=str(secrets))
    with pytest.raises(UserError, match=r"holds a string of .*secrets\.txt"):
        method.ready(llama, judged())
    with pytest.raises(UserError, match="holds a string"):
        method.begin(InProcess(judged(), {"base": llama}).reach(0))
    with pytest.raises(UserError, match="cannot be read"):
        Search(secrets=str(tmp_path / "none")).ready(llama, judged())


@pytest.mark.parametrize("fault", ["down", "rubbish", "refused"])
def test_an_endpoint_that_fails_is_skipped_and_counted(llama: Resident, fault: str) -> None:
    with serving(lambda messages: "!!!\n\n", *([(401, b"no")] if fault == "refused" else [])) as server:
        url = server.url
        if fault != "down":
            state = endpoint_round(llama, url)
    if fault == "down":
        state = endpoint_round(llama, url)
    assert state.skipped == 3
    assert len(state.pool) == 2
    assert state.known.counts.sum() > 0  # the round went on


def endpoint_round(base: Resident, url: str) -> State:
    endpoint = Endpoint(url, "m", timeout=2, tries=1)
    method = Search(prompts=PROMPTS[:2], calls=24, proposals=3, proposers=("endpoint",), endpoint=endpoint)
    return searched(base, judged(rows=12), method)


def test_an_endpoint_is_told_no_score_and_no_row(llama: Resident) -> None:
    with serving(lambda messages: "1. Rate the text.\n2. Judge the mood.") as server:
        method = Search(prompts=PROMPTS[:4], calls=24, proposals=4, endpoint=Endpoint(server.url, "m"), proposers=("endpoint",))
        state = searched(llama, judged(rows=12), method, rounds=2)
        (one, two) = (body["messages"][0]["content"] for body in server.asked)
    assert "poor, good" in one
    assert not any(row.input in one + two for silo in judged(rows=12).values() for row in silo.train)
    assert "0." not in two
    assert [o for o in state.origins if o != "hand"] == ["endpoint"] * (len(state.pool) - 4)
    assert any("Judge the mood." in prompt.template for prompt in state.pool)


def test_a_proposal_too_long_for_a_row_is_skipped_and_counted(llama: Resident) -> None:
    with serving(lambda messages: "Judge it. " * 47) as server:
        method = Search(prompts=PROMPTS[:2], calls=24, proposals=1, proposers=("endpoint",), endpoint=Endpoint(server.url, "m"))
        state = searched(llama, judged(rows=12), method)
    assert len(state.pool) == 3
    assert state.skipped == 1
    assert 2 not in state.running


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ("no slot",)}, "has no slot"),
        ({"prompts": ("{input}", Prompt("{input}"))}, "twice"),
        ({"bandit": "halvin"}, "did you mean 'halving'"),
        ({"proposers": ("endpoint",)}, r"set \[method.endpoint\]"),
    ],
)
def test_settings_that_cannot_be(more: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Search(**more)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"prompts": ("x" * 520 + "{input}",)}, "has 527 tokens, the model's context is 512"),
        ({"prompts": (Prompt("{input}", ("a", "b", "c")),)}, r"has 3 words for 2 labels \(poor, good\)"),
        ({"prompts": ("x" * 470 + "{input}",)}, "silo 'silo-0': a row has .* shorten it"),
        ({"examples": (("tea", "goood"),)}, "'goood' is no label; did you mean 'good'"),
    ],
)
def test_what_does_not_fit_the_model_or_the_rows_is_told_before(llama: Resident, more: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Search(**more).ready(llama, judged(rows=6))


def test_what_needs_labels_and_what_needs_a_model_that_writes(
    llama: Resident, bert: Resident, written: dict[str, SiloData]
) -> None:
    with pytest.raises(UserError, match="score = 'accuracy'"):
        Search(score="accuracy").ready(llama, written)
    with pytest.raises(UserError, match="search needs a causal model or an encoder-decoder"):
        Search().ready(bert, judged(rows=6))
    Search().ready(llama, written)


def test_over_a_federation_the_silo_says_what_does_not_fit(llama: Resident) -> None:
    """The server has no base: the first silo that answers looks at the prompts."""
    with pytest.raises(UserError, match="too long for the model"):
        Search(prompts=("{input}", "x" * 520 + "{input}")).begin(InProcess(judged(rows=6), {"base": llama}).reach(0))
    data = judged(rows=6)
    data = {name: SiloData((Row("y" * 505, "good"), *rows.train[1:]), (), (), LABELS) for name, rows in data.items()}
    engine = InProcess(data, {"base": llama})
    method = Search(prompts=("x" * 30 + "{input}",), proposals=0)
    with pytest.raises(RunError, match="no prompt fits the rows"):
        method.round(method.begin(engine.reach(0)), engine.reach(1))


def test_an_exported_prompt_is_usable_by_hand(llama: Resident, tmp_path: Path) -> None:
    """Pasted around a row, the text is what the model is asked; the intervals are those of the silos' sums."""
    data = judged()
    method = Search(prompts=PROMPTS[:3], calls=60, proposals=2, proposers=("examples",), examples=EXAMPLES)
    state = searched(llama, data, method)
    method.export_prompt(state, tmp_path, "{text}\nMood:")
    text, told = (tmp_path / "prompt.txt").read_text(), json.loads((tmp_path / "prompt.json").read_text())
    row = data["silo-1"].test[0]
    assert text.replace("{input}", row.input) == state.pool[state.best].told(row, LABELS).prompt
    assert told["format"]["answers"] == {"poor": "poor", "good": "good"}
    assert told["origin"] == state.origins[state.best]
    assert set(told["scores"]) == set(data)
    for s, silo in enumerate(data):
        found = told["scores"][silo]
        assert found["low"] <= found["mean"] <= found["high"]
        assert found["rows"] == int(state.known.counts[state.best, s])
    model = method.serve(state).open({"base": llama})
    silo = Silo("x", data["silo-1"], {"base": llama}, 0)
    assert model.scores(silo.data.test, LABELS).shape == (12, 2)


def test_a_limit_that_would_silence_every_silo_is_told_before(llama: Resident) -> None:
    data = judged(rows=6)
    careful = {**data, "silo-1": replace(data["silo-1"], settings={"epsilon": 1.0})}
    with pytest.raises(UserError, match=r"\[silo.silo-1\] epsilon = 1: bounds .* set \[method\] noise"):
        Search().ready(llama, careful)
    Search(noise="laplace").ready(llama, careful)
    with pytest.raises(UserError, match=r"minimum = 7: no silo has so many training rows \(silo-0 has 6 of 7"):
        Search(minimum=7).ready(llama, data)


def test_scores_of_a_prompt_are_those_of_the_searchs_end(llama: Resident, tmp_path: Path) -> None:
    """Round 0 knows of none; and noise is told of."""
    engine = InProcess(judged(), {"base": llama})
    method = Search(prompts=PROMPTS[:2], proposals=0, calls=60, noise="laplace", epsilon=4.0)
    begun = method.begin(engine.reach(0))
    end = method.round(begun, engine.reach(1))
    method.export_prompt(begun, tmp_path, "{text}", end)
    told = json.loads((tmp_path / "prompt.json").read_text())
    assert set(told["scores"]) == {"silo-0", "silo-1", "silo-2"}
    assert all(0 <= one["low"] <= one["mean"] <= one["high"] <= 1 for one in told["scores"].values())
    assert (told["noise"], told["epsilon"]) == ("laplace", end.notes["epsilon"])
