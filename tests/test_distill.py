"""Distillation as a whole: silos of different models, what leaves, what goes wrong, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import experiment, progress, report, runs, wire
from fedtailor.data import Row, SiloData, load
from fedtailor.distilling import NO_IDS, Said
from fedtailor.engines.in_process import InProcess
from fedtailor.errors import RunError, UserError
from fedtailor.methods.distill import Distill
from fedtailor.models import Base, Resident
from fedtailor.proxies import strangeness
from fedtailor.studying import Spoken, Study
from tiny_runs import FEDERATED, PUBLIC, asked

TRAINER = {"name": "lora", "rank": 2, "lr": 0.02, "local_steps": 3, "batch_size": 3}
SMALL: dict[str, Any] = {"trainer": TRAINER, "public_rows": 4, "digest_steps": 2}
PARCELS = SiloData(
    tuple(Row(f"The {thing} was", "here at last") for thing in ("parcel", "green boat", "old bear", "cup of tea")), (), ()
)

BODY = Study(Distill(**SMALL), PUBLIC.train[:2], 1, 3, places=2, outcomes=2)
NONE = torch.zeros(2, dtype=torch.bool)
SOUND = Spoken(Said(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log().half(), NO_IDS), torch.tensor([True, True]), NONE, 0.6, 0.7, 9)
TEXT = replace(BODY, tokens=260)


def engine(data: Mapping[str, SiloData], base: Resident, public: SiloData = PUBLIC, **more: Any) -> InProcess:
    return InProcess(data, {"base": base}, public=public, rounds=3, **more)


def rounds(method: Distill, one: InProcess, count: int = 3) -> Any:
    state = method.begin(one.reach(0))
    for number in range(1, count + 1):
        state = method.round(state, one.reach(number))
        one.commit()
    return state


def table(**more: Any) -> str:
    return "method=" + _inline({"name": "distill", **SMALL, **more})


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + "}"
    return "true" if value is True else repr(value)


@pytest.mark.parametrize(("settings", "told"), [
    ({"trainer": {"name": "lorra"}}, r"trainer: .*did you mean 'lora'"),
    ({"trainer": {"name": "search"}}, r"trainer: 'search' is no method that trains"),
    ({"trainer": {"lr": 0.1}}, r"trainer needs a name.*replaces all of \[method.trainer\]"),
    ({"trainer": {"name": "lora", "scaffold": True}}, r"trainer scaffold: is for a server that averages"),
    ({"trainer": {"name": "lora", "combine": "frozen_a"}}, r"trainer combine: is for a server that averages"),
    ({"student": {"name": "lora", "server_optimizer": "adam"}}, r"student server_optimizer: is for a server"),
    ({"trainer": {"name": "lora", "rnk": 2}}, r"trainer has no setting 'rnk'; did you mean 'rank'"),
    ({"student": {"name": "lora", "rank": 0}}, r"student rank: .*greater than or equal to 1, not 0"),
    ({"trainer": {}}, r"trainer needs a name"),
    ({"consensus": "mediam"}, r"consensus = 'mediam': no such function"),
    ({"consensus": "median", "share": "texts"}, r"consensus = 'median': is of logits; of texts the student learns every silo's"),
])  # fmt: skip
def test_settings_that_cannot_be(settings: Mapping[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Distill(**settings)


def test_without_public_rows_it_does_not_begin(rated: dict[str, SiloData], bert: Resident) -> None:
    with pytest.raises(UserError, match="set public to a file, or public_fraction"):
        Distill().begin(engine(rated, bert, SiloData((), (), ())).reach(0))
    with pytest.raises(UserError, match=r"\[data\] .*set public to a file, or public_fraction"):
        runs.begin(asked("method.name=distill"), Path("/nowhere"), "a test")


def test_a_student_becomes_what_silos_agree_on(rated: dict[str, SiloData], bert: Resident) -> None:
    """It ends nearer to their consensus than it began, without a row of theirs."""
    method = Distill(**{**SMALL, "student": {**TRAINER, "local_steps": 20, "batch_size": 6}, "public_rows": 6})
    one = engine(rated, bert)
    first = method.round(method.begin(one.reach(0)), one.reach(1))
    one.commit()
    last = first
    for number in (2, 3):
        last = method.round(last, one.reach(number))
        one.commit()
    model = method.serve(last).open({"base": bert})
    found = model.scores([replace(row, answer="bad") for row in PUBLIC.train], ("bad", "good")).softmax(1)
    heard = last.heard.whole().exp()
    assert last.known.all()
    assert float((found - heard).abs().mean()) < float((0.5 - heard).abs().mean()), "the base says a half to each"
    assert last.notes["declined_share"] == 0
    assert last.notes["student_steps"] == 20


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_silos_may_have_models_of_their_own(
    architecture: str, rated: dict[str, SiloData], bert: Resident, plain: Callable[[str], Any], tmp_path: Path,
    resident_of: Callable[[str], Resident],
) -> None:  # fmt: skip
    """A cut encoder, a llama and a bert, whatever the student: of labels, probabilities are all that is needed."""
    for name in ("bert", "llama"):
        plain(name).save_pretrained(tmp_path / name)
        resident_of(name).save_reader(tmp_path / name)
    own = {
        "cafe": {"model": Base(str(tmp_path / "bert"), "float32", layers=1)},
        "shop": {"model": Base(str(tmp_path / "llama"), "float32"), "trainer": {"name": "full", "local_steps": 2}},
        "zoo": {},
    }
    data = {name: replace(rows, settings=own[name]) for name, rows in rated.items()}
    base = resident_of(architecture)
    method = Distill(**SMALL)
    method.ready(base, data)
    one = engine(data, base)
    state = rounds(method, one)
    assert one.rejected == []
    assert state.known.all()
    sizes = {silo: sum(t.numel() for t in desk.memory["own"].values()) for silo, desk in one.desks.items()}
    assert len(set(sizes.values())) == 3
    own_counts = method.own(one.reach(4), "test", 4)
    assert {silo: counts.rows for silo, counts in own_counts.items()} == dict.fromkeys(rated, 3)


def test_nobody_learns_from_rows_that_a_silo_holds(rated: dict[str, SiloData], bert: Resident) -> None:
    """Two of the public rows are the cafe's, one with other words around it, one with other spaces: it says so."""
    known = rated["cafe"].train[0], rated["cafe"].test[0]
    around = Row(f"Read: {known[0].prompt}", "", frame=(6, 0))
    public = (around, replace(known[1], prompt=known[1].prompt.replace(" ", "  "), answer=""))
    one = engine(rated, bert, SiloData((*public, *PUBLIC.train[:2]), (), ()))
    method, heard = Distill(**SMALL), dict[str, Spoken]()
    one.record = lambda silo, way, body: heard.update({silo: found}) if isinstance(found := wire.unpack(body), Spoken) else None
    state = rounds(method, one, 1)
    assert heard["cafe"].spoken.tolist() == [False, False, True, True]
    assert heard["cafe"].held.tolist() == [True, True, False, False]
    assert heard["zoo"].spoken.tolist() == [True] * 4
    assert state.notes["declined_share"] == pytest.approx(0.5 / 3)
    assert state.known.tolist() == [False, False, True, True]


def test_a_silo_is_believed_about_rows_of_its_own_kind(rated: dict[str, SiloData], bert: Resident) -> None:
    """What is kept of each row is the silos' opinions, in proportion to exp(-4 strangeness - entropy) as they sent it."""
    one, heard = engine(rated, bert), dict[str, Spoken]()
    one.record = lambda silo, way, body: heard.update({silo: found}) if isinstance(found := wire.unpack(body), Spoken) else None
    method = Distill(**{**SMALL, "public_rows": 6, "consensus": "familiar"})
    state = rounds(method, one, 1)
    assert one.rejected == []
    probs = torch.stack([reply.said.whole().exp() for reply in heard.values()])
    own = torch.stack([strangeness(bert.tokenizer, PUBLIC.train, rated[silo].train) for silo in heard])
    assert torch.allclose(torch.stack([reply.strange.float() for reply in heard.values()]), own, atol=0.01)
    weights = (-4 * own + (probs * probs.log()).sum(-1)).exp()
    expected = (probs * weights[..., None]).sum(0) / weights.sum(0)[:, None]
    assert torch.allclose(state.heard.whole().exp(), expected, atol=0.01)
    rounds(Distill(**SMALL), one, 1)
    assert all(len(reply.strange) == 0 for reply in heard.values()), "nobody asked"


@pytest.mark.parametrize(("strange", "told"), [
    ([0.0, 11.0], None), ([0.0, math.nan], "how strange"), ([-1.0, 1.0], "how strange"), ([1e4, 1.0], "from 0 to 100"),
    ([1.0], "says of (1,) of 2"), (1.0, "says of () of 2"),
])  # fmt: skip
def test_what_is_said_of_strangeness_is_checked(strange: list[float] | float, told: str | None) -> None:
    body = replace(BODY, method=Distill(**SMALL, consensus="familiar"))
    found = replace(SOUND, strange=torch.tensor(strange)).problem(body)
    assert found == told or (told is not None and found is not None and told in found)


def test_rows_that_nobody_speaks_of_are_left_out(rated: dict[str, SiloData], bert: Resident) -> None:
    public = SiloData((*(replace(row, answer="") for row in rated["cafe"].train[:2]), *PUBLIC.train[:2]), (), ())
    one = engine({"cafe": rated["cafe"]}, bert, public)
    state = rounds(Distill(**SMALL), one, 2)
    assert state.known.tolist() == [False, False, True, True]
    every = SiloData(tuple(replace(row, answer="") for row in rated["cafe"].train[:2]), (), ())
    state = rounds(Distill(**SMALL), engine({"cafe": rated["cafe"]}, bert, every), 1)
    assert state.notes["student_steps"] == 0
    assert math.isnan(state.notes["student_loss"])




def tokens(*rows: list[int], dtype: torch.dtype = torch.int32) -> Said:
    return Said(torch.tensor([[0.5, 0.25], [0.9, 0.05]]).log(), torch.tensor(rows, dtype=dtype))


@pytest.mark.parametrize(("more", "told"), [
    ({}, None),
    ({"loss": math.nan}, "a loss is not finite"),
    ({"said": Said(torch.tensor([[math.nan, -1.0], [-1.0, -1.0]]), NO_IDS)}, "log-probabilities are not finite"),
    ({"said": Said(torch.tensor([[math.nan, -1.0], [-1.0, -1.0]]), NO_IDS), "spoken": torch.tensor([False, True])}, None),
    ({"said": Said(torch.tensor([[-0.1, -0.1], [-1.0, -1.0]]), NO_IDS)}, "probabilities add up to more than 1"),
    ({"spoken": torch.tensor([True])}, "says (2, 2), of (1,) whether: asked (2, 2)"),
    ({"said": Said(torch.tensor([[-1.0, -1.0]]), NO_IDS)}, "says (1, 2), of (2,) whether: asked (2, 2)"),
    ({"distance": math.nan}, "a distance of nan"),
    ({"held": torch.tensor([True])}, "says of (1,) of 2 rows whether it holds them"),
    ({"held": torch.tensor(True)}, "says of () of 2 rows whether it holds them"),
    ({"said": tokens([1, 2], [3, 4])}, "tokens (2, 2) of torch.int32: asked none"),
])  # fmt: skip
def test_replies_are_checked(more: Mapping[str, Any], told: str | None) -> None:
    found = replace(SOUND, **more).problem(BODY)
    assert found == told or (told is not None and found is not None and told in found)


@pytest.mark.parametrize(("said", "told"), [
    (tokens([1, 2], [3, -1]), None),
    (tokens([1, 2], [-1, -1]), None),
    (tokens([1, 260], [3, 4]), "tokens that the student has not"),
    (tokens([1, -2], [3, 4]), "tokens that the student has not"),
    (tokens([1, 2], [3, 3]), "one of them twice"),
    (tokens([1, 2], [3, 4], dtype=torch.int64), "of torch.int64: asked (2, 2)"),
    (replace(SOUND.said), "tokens (0, 0) of torch.int32: asked (2, 2)"),
])  # fmt: skip
def test_replies_about_text_are_checked(said: Said, told: str | None) -> None:
    found = replace(SOUND, said=said).problem(TEXT)
    assert found == told or (told is not None and found is not None and told in found)


def test_a_silo_that_fails_is_named_and_the_round_goes_on(rated: dict[str, SiloData], bert: Resident) -> None:
    data = {**rated, "zoo": replace(rated["zoo"], settings={"trainer": {**TRAINER, "lr": 1e38, "local_steps": 6}})}
    one = engine(data, bert)
    state = rounds(Distill(**{**SMALL, "public_rows": 6}), one, 1)
    assert [(silo, "lower the trainer's lr" in why) for _, silo, why in one.rejected] == [("zoo", True)]
    assert state.known.all()


def test_text_is_told_by_its_likeliest_tokens(llama: Resident, written: Mapping[str, SiloData]) -> None:
    method = Distill(**{**SMALL, "top": 5})
    one, heard = engine(written, llama, PARCELS), list[Spoken]()
    one.record = lambda silo, way, body: heard.append(found) if isinstance(found := wire.unpack(body), Spoken) else None
    state = rounds(method, one, 2)
    places = 4 * (len(" here at last") + 1)
    assert state.heard.logp.shape == state.heard.ids.shape == (places, 5)
    assert heard[0].said.logp.dtype == torch.float16
    assert heard[0].said.ids.shape == (places, 5)
    assert one.rejected == []
    assert state.notes["student_loss"] > 0


def test_text_of_rows_without_answers_is_refused(llama: Resident, written: Mapping[str, SiloData]) -> None:
    bare = SiloData(tuple(replace(row, answer="") for row in PARCELS.train), (), ())
    with pytest.raises(UserError, match=r"name rows with answers by public .* or set method.share = 'texts'"):
        Distill(**SMALL).suited(llama, bare.train, ())
    Distill(**SMALL, share="texts").suited(llama, bare.train, ())


def test_public_rows_that_cannot_be_asked_about_are_told(llama: Resident) -> None:
    long = (*PUBLIC.train, Row("so " * 300, ""))
    with pytest.raises(UserError, match=r"\[data\] public, row 7: more tokens than the model's context of 512"):
        Distill(**SMALL).suited(llama, long, ("bad", "good"))
    bare = tuple(replace(row, answer="") for row in PUBLIC.train)
    with pytest.raises(UserError, match=r"truth = 0.5: no public row has an answer"):
        Distill(**SMALL, truth=0.5).suited(llama, bare, ("bad", "good"))


def test_texts_of_any_length_are_left_out(llama: Resident, written: Mapping[str, SiloData]) -> None:
    """A reply may hold answers that fit no context: neither the student nor a silo stumbles over them."""
    bare = SiloData(tuple(replace(row, answer="") for row in PARCELS.train), (), ())
    method, one = Distill(**SMALL, share="texts"), engine(written, llama, bare)
    state = method.round(method.begin(one.reach(0)), one.reach(1))
    one.commit()
    state = replace(state, texts=tuple((i, (*texts, "so " * 3000)) for i, texts in state.texts))
    state = method.round(state, one.reach(2))
    assert one.rejected == []
    assert state.notes["student_steps"] == 3


def test_texts_are_shared_where_it_is_asked(
    llama: Resident, written: Mapping[str, SiloData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by default; with a warning of what leaves. The student learns what silos wrote; their wording goes to all."""
    assert Distill().share == "logits"
    lines = list[str]()
    monkeypatch.setattr(progress, "line", lines.append)
    bare = SiloData(tuple(replace(row, answer="") for row in PARCELS.train), (), ())
    method = Distill(**SMALL, share="texts")
    one, heard = engine(written, llama, bare), list[Any]()
    one.record = lambda silo, way, body: heard.append(wire.unpack(body))
    state = rounds(method, one, 2)
    assert any("may write what it learnt of private rows" in line for line in lines)
    assert all(len(body.texts) == 4 for body in heard if isinstance(body, Spoken))
    assert [i for i, _ in state.texts] == [0, 1, 2, 3]
    second = next(body for body in heard if isinstance(body, Study) and body.number == 2)
    first = [body.texts for body in heard if isinstance(body, Spoken)][: len(written)]
    told = [tuple(text.strip() for text in texts if text.strip()) for texts in zip(*first, strict=True)]
    assert [tuple(row.answer for row in some) for some in second.texts] == told
    assert state.notes["student_steps"] == 3


def test_the_student_may_speak_too(rated: dict[str, SiloData], bert: Resident) -> None:
    """What goes back to silos is half the consensus, half what the student said before; it is kept apart from the consensus."""
    bodies = list[Study]()
    one = engine(rated, bert)
    one.record = lambda silo, way, body: bodies.append(found) if isinstance(found := wire.unpack(body), Study) else None
    method = Distill(**{**SMALL, "public_rows": 6, "student_share": 0.5})
    state = method.round(method.begin(one.reach(0)), one.reach(1))
    one.commit()
    method.round(state, one.reach(2))
    model = method.serve(state).open({"base": bert})
    asked_rows = [replace(row, answer="bad") for row in bodies[-1].past]
    mine = model.scores(asked_rows, ("bad", "good")).softmax(1)
    assert torch.allclose(bodies[-1].heard.whole().exp(), (state.heard.whole().exp() + mine) / 2, atol=1e-3)


def test_what_is_true_of_public_rows_counts_as_much_as_is_asked(rated: dict[str, SiloData], bert: Resident) -> None:
    one = engine(rated, bert)
    method = Distill(**SMALL, truth=1.0)
    state = rounds(method, one, 1)
    told = method._true(state, PUBLIC.train, bert).whole().exp()
    assert told.argmax(1).tolist() == [("bad", "good").index(row.answer) for row in PUBLIC.train]
    assert replace(method, truth=0.0)._true(state, PUBLIC.train, bert) is state.heard


def test_no_row_is_in_any_message(tmp_path: Path) -> None:
    """Public rows go down; a row of a silo's own is in no message, either way."""
    one = asked(FEDERATED, "engine.record=true", "rounds=2", "data.public_fraction=0.3", table())
    runs.begin(one, tmp_path / "run", "a test").conduct()
    whole = b"\n".join(file.read_bytes() for file in sorted((tmp_path / "run" / "messages").iterdir()))
    loaded = load(one.data, {}, 0)
    assert len(loaded.public) > 2
    assert any(row.input.encode() in whole for row in loaded.public), "the check can fail"
    private = {row.input for silo in loaded.silos.values() for part in (silo.train, silo.val, silo.test) for row in part}
    assert len(private) > 10
    assert not [text for text in private if text.encode() in whole]


def test_rows_of_a_run(tmp_path: Path) -> None:
    """Alone is each silo's own model, centralized a model of the student's size; federated has silos' own models beside it."""
    sets = ["rounds=2", "data.public_fraction=0.3", 'rows=["alone","federated","centralized"]', table()]
    rows = runs.begin(asked(*sets), tmp_path / "run", "a test").conduct()["rows"]
    assert set(rows["federated"]["own"]["accuracy"]["per_silo"]) == set(rows["alone"]["own"]["accuracy"]["per_silo"])
    assert rows["federated"]["bytes_up"] < rows["alone"]["bytes_up"], "a few probabilities are less than the tensors"
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "adapter_config.json").exists(), "the student is exported as its trainer exports"


def test_settings_of_one_silo_are_checked(tmp_path: Path) -> None:
    more = ["data.public_fraction=0.3", table()]
    with pytest.raises(UserError, match=r"\[silo.cafe\].* trainer has no setting 'rnk'"):
        asked(*more, 'silo.cafe.trainer={name="lora", rnk=2}')
    with pytest.raises(UserError, match=r"\[silo.cafe.model\] name = 'minilmm': .*did you mean 'minilm'"):
        runs.begin(asked(*more, 'silo.cafe.model={name="minilmm"}'), tmp_path / "run", "a test")
    one = asked(*more, 'silo.cafe.model={name="tiny", dtype="float32"}')
    assert one.silo["cafe"]["model"] == Base("tiny", "float32")
    assert experiment.parse(experiment.as_table(one), "again") == one


def test_a_round_without_a_usable_reply_is_told(rated: dict[str, SiloData], bert: Resident) -> None:
    data = {name: replace(rows, settings={"trainer": {**TRAINER, "lr": 1e38, "local_steps": 6}}) for name, rows in rated.items()}
    with pytest.raises(RunError, match="no reply of 3 silos could be used"):
        rounds(Distill(**SMALL), engine(data, bert), 1)


def test_public_rows_that_the_base_writes(llama: Resident, rated: dict[str, SiloData]) -> None:
    """They are part of the state: a run that goes on has the same ones."""
    method = Distill(**SMALL, generated=6, generate="A review: ")
    assert not method.needs_public
    one = engine(rated, llama, SiloData((), (), (), ("bad", "good"), {"template": "{text}\nMood:"}))
    state = rounds(method, one, 2)
    assert len({row.prompt for row in state.rows}) == 6
    assert state.known.all()
    assert 0 < state.notes["public_distance"] <= 1
    with pytest.raises(ValueError, match="generated and generate go together"):
        Distill(generated=6)
    with pytest.raises(UserError, match="choose a causal base, and rows with labels"):
        method.ready(llama, {name: replace(rows, labels=()) for name, rows in rated.items()})


def test_the_report_tells_what_public_rows_were(tmp_path: Path) -> None:
    one = asked(FEDERATED, "rounds=1", "data.public_fraction=0.3", table())
    row = runs.begin(one, tmp_path / "run", "a test").conduct()["rows"]["federated"]
    assert 0 < row["public_distance"] <= 1
    assert row["declined_share"] == 0
    page = report.write(tmp_path / "run").read_text()
    assert "distance of public rows" in page
    assert "share declined" in page


def test_of_text_the_true_tokens_count_as_much_as_is_asked(llama: Resident, written: Mapping[str, SiloData]) -> None:
    method = Distill(**SMALL, truth=0.75, top=4)
    state = rounds(method, engine(written, llama, PARCELS), 1)
    told = method._true(state, PARCELS.train, llama)
    true = [*llama.tokenizer(" here at last").input_ids, llama.tokenizer.eos_token_id] * 4
    assert [told.ids[i, int(told.logp[i].argmax())].item() for i in range(len(true))] == true
    assert bool((told.logp.exp().sum(1) <= 1 + 1e-5).all())


def test_batches_of_several_passes(rated: dict[str, SiloData], bert: Resident) -> None:
    method = Distill(**{**SMALL, "trainer": {**TRAINER, "accumulate": 2}})
    one = engine(rated, bert)
    state = rounds(method, one, 2)
    assert one.rejected == []
    assert math.isfinite(state.notes["student_loss"])
