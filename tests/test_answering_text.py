"""Text: greedy as transformers writes it, drawn by a seed, ended where the model ends it, and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedtailor import answering
from fedtailor.answering import Answers, Encoded, batch, encode, fresh
from fedtailor.data import Row
from fedtailor.methods.averaging import Averaging
from fedtailor.methods.prefix import Prefix
from fedtailor.models import Resident
from test_answering import ROWS, name, opened


def test_greedy_text_is_that_of_transformers(causal: Resident, plain: Callable[[str], Any]) -> None:
    module = plain(causal.module.config.model_type)
    for row in ROWS:
        ids = torch.tensor([causal.tokenizer(row.prompt).input_ids])
        with torch.no_grad():
            whole = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        expected = causal.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert fresh(causal).generate([row], max_new_tokens=16) == [expected]


def tokens_of(model: Answers, row: Row, count: int, seed: int) -> list[int]:
    some = batch([Encoded(encode(model.resident, [row], [""], stop=False)[0].prompt, [])], 256)
    with torch.no_grad():
        steps = list(model._steps(some, count, 1.0, 1.0, torch.Generator().manual_seed(seed)))
    return [step[0] for step in steps if step[0] is not None]


def test_text_ends_at_the_models_end_token(causal: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    model, row = fresh(causal), Row("abc", "")
    seed = next(s for s in range(20) if len(set(tokens_of(model, row, 6, s))) == 6)
    tokens = tokens_of(model, row, 6, seed)
    for end in (tokens[3], [tokens[5], tokens[3]]):  # configurations hold one, or a list
        monkeypatch.setattr(causal.module.generation_config, "eos_token_id", end)
        assert tokens_of(model, row, 6, seed) == tokens[:3]
        told = model.generate([row], max_new_tokens=6, temperature=1.0, seed=seed)
        assert told == [causal.tokenizer.decode(tokens[:3], skip_special_tokens=True).strip()]


def test_a_row_that_ended_does_not_change_the_others(causal: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(causal)
    some = batch([Encoded([i, i + 1], []) for i in (3, 50, 90)], 256)
    with torch.no_grad():
        free = list(zip(*model._steps(some, 8, 0.0, 1.0, torch.Generator()), strict=True))
        end = free[0][2]
        assert end is not None
        monkeypatch.setattr(causal.module.generation_config, "eos_token_id", end)
        ended = list(zip(*model._steps(some, 8, 0.0, 1.0, torch.Generator()), strict=True))
    for before, after in zip(free, ended, strict=True):
        cut = before.index(end) if end in before else len(before)
        assert [t for t in after if t is not None] == list(before[:cut])


def test_sampling_is_seeded(causal: Resident) -> None:
    model, how = fresh(causal), {"max_new_tokens": 12, "temperature": 1.0}
    first = model.generate(ROWS, seed=1, **how)
    torch.manual_seed(0)
    assert model.generate(ROWS, seed=1, **how) == first
    assert model.generate(ROWS, seed=2, **how) != first


def test_a_small_nucleus_is_greedy(causal: Resident) -> None:
    model = fresh(causal)
    assert model.generate(ROWS, temperature=1.0, top_p=1e-6, seed=3) == model.generate(ROWS)


def test_the_nucleus_by_hand() -> None:
    """Probabilities .5, .3, .15, .05: the fewest that reach .75 are the first two."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(400, 4)
    drawn = answering._choose(logits, 1.0, 0.75, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 3}
    share = (drawn == 1).float().mean().item()
    assert share == pytest.approx(0.5 / 0.8, abs=0.1)  # sd of the mean of 400 draws: .024
    assert set(answering._choose(logits, 1.0, 1.0, torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2, 3}


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[1.0, 0.0]]).expand(2000, 2)
    drawn = answering._choose(logits, 0.5, 1.0, torch.Generator().manual_seed(0))
    assert (drawn == 0).float().mean().item() == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.04)


def test_a_stream_is_the_same_text_in_pieces(causal: Resident) -> None:
    model = fresh(causal)
    for seed in range(6):
        how: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9, "seed": seed}
        pieces = list(model.stream(ROWS[1], **how))
        whole = model.generate([ROWS[1]], **how)[0]
        assert whole.startswith("".join(pieces).strip())
        assert len(whole) - len("".join(pieces).strip()) <= 4 or "\ufffd" in whole


def test_no_nucleus_is_greedy() -> None:
    logits, draw = torch.tensor([[0.1, 3.0, 2.9]]), torch.Generator().manual_seed(0)
    assert [int(answering._choose(logits, 1.0, 0.0, draw)) for _ in range(20)] == [1] * 20


@pytest.mark.parametrize("method", [None, Prefix(virtual_tokens=3)], ids=name)
def test_text_stops_where_the_context_is_full(causal: Resident, method: Averaging | None) -> None:
    """A prompt of n tokens leaves room to read n - 1 more, and one that is only told."""
    model = opened(causal, method)
    room = 512 - (0 if method is None else 3)
    long, short = Row("p" * (room - 4), ""), Row("q" * 20, "")
    assert len(tokens_of(model, long, 30, 0)) == 5
    assert len(tokens_of(model, Row("p" * (room - 1), ""), 30, 0)) == 2
    assert model.generate([long, short], max_new_tokens=30)[1] == model.generate([short], max_new_tokens=30)[0]
