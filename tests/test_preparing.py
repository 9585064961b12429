"""What is known to fail is told before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtailor.data import Row, SiloData
from fedtailor.errors import UserError
from fedtailor.experiment import load, parse
from fedtailor.models import Resident
from fedtailor.preparing import fits, prepare

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


def test_rows_too_long_are_found_before_a_run(causal: Resident) -> None:
    good, long = Row("p", "a", "1"), Row("p" * 600, "a", "row-77")
    fits(causal, {"fine": SiloData((good,), (good,), (good,))})
    for split in ("train", "val", "test"):
        parts = {"train": (good,), "val": (), "test": (), split: (good, long)}
        with pytest.raises(UserError, match=rf"silo 'far', {split}, row row-77: a row has 603 tokens") as error:
            fits(causal, {"fine": SiloData((good,), (), ()), "far": SiloData(**parts)})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("over", [0, 1])
def test_virtual_tokens_take_their_places(causal: Resident, over: int) -> None:
    row = Row("p" * (512 - 3 - 10 + over), "a", "row-77")  # " a" and the end; 10 virtual tokens
    silos = {"far": SiloData((row,), (), ())}
    fits(causal, silos)
    if over:
        with pytest.raises(UserError, match="10 of them virtual tokens"):
            fits(causal, silos, taken=10)
    else:
        fits(causal, silos, taken=10)


def test_chat_rows_are_measured_with_their_template(causal: Resident) -> None:
    def chat(size: int) -> dict[str, SiloData]:
        turns = ({"role": "user", "content": "p" * size},)
        return {"far": SiloData((Row("", "a", "row-77", turns),), (), ())}

    around = len("user: \nassistant:") + 3
    fits(causal, chat(512 - around))
    with pytest.raises(UserError, match="row-77: a row has 513 tokens"):
        fits(causal, chat(513 - around))


def test_an_encoder_cuts_instead(bert: Resident) -> None:
    fits(bert, {"far": SiloData((Row("p" * 900, "a"),), (), ())})


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["evaluate.best_by=rouge_l"], "best_by = 'rouge_l': not measured on this task .choices: loss, accuracy, macro_f1"),
        (["faults.attackers=['nowhere']"], r"\[faults\] attackers: the data has no silo 'nowhere'"),
        (["faults.attackers=0.4", "method.name=search"],
         r"\[faults\] attack = 'sign_flip' changes what is averaged, and silos of method 'search' send no such tensors"),
        (["faults.noise=0.1", "method.name=search"], r"\[faults\] noise = 0.1 changes what is"),
        (["faults.slow=['shpo']"], r"\[faults\] slow: the data has no silo 'shpo'; did you mean 'shop'"),
        (["faults.attackers=0.1"], "attackers = 0.1 of 3 silos is none; choose 0.17 or more"),
        (["faults.attack=backdoor", "faults.target=2"], r"\[faults\] target = 2: there are 2 labels; choose 0 to 1"),
        (["faults.attack=label_flip", "faults.attackers=0.4", "data.label=", "data.answer=mood", "evaluate.best_by=loss"],
         "attack = 'label_flip' changes labels, and silo 'cafe' has none; set data.label, or choose sign_flip"),
        (["faults.attack=backdoor", f"faults.trigger={'cf' * 400}", "rows=['federated']"], "it has a trigger in front"),
        (["method.warmup_rounds=9"], r"\[method\] warmup_rounds = 9: the run has \d rounds, so the rate would never reach lr"),
        (["baseline.centralized.warmup_rounds=9"], r"\[baseline.centralized\] warmup_rounds = 9: the run has"),
        (["method.virtual_tokens=600"], "virtual_tokens = 600 leaves no room"),
        (["evaluate.examples=30"], "few_shot row puts 30 examples in front: lower evaluate.examples"),
    ],
)
def test_what_cannot_run(sets: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepare(load(TINY, sets))


def test_few_shot_is_measured_only_where_it_is_asked_for() -> None:
    prepare(load(TINY, ["evaluate.examples=30", 'rows=["federated"]']))


def test_an_encoder_needs_labels(monkeypatch: pytest.MonkeyPatch, bert: Resident) -> None:
    monkeypatch.setattr("fedtailor.models.load", lambda base: bert)
    asked = ["data.label=", "data.answer=mood"]
    with pytest.raises(UserError, match="an encoder tells labels, it writes no text"):
        prepare(load(TINY, asked))


def test_chat_rows_need_a_chat_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, causal: Resident) -> None:
    turns = '[{"role": "user", "content": "hi %d"}, {"role": "assistant", "content": "yes"}]'
    (tmp_path / "chat.jsonl").write_text("".join(f'{{"m": {turns % i}, "site": "a"}}\n' for i in range(40)))
    asked = load(TINY, [f"data.source={tmp_path / 'chat.jsonl'}", "data.label=", "data.template=", "data.messages=m"])
    prepare(asked)
    monkeypatch.setattr(causal.tokenizer, "chat_template", None)
    monkeypatch.setattr("fedtailor.models.load", lambda base: causal)
    with pytest.raises(UserError, match="has no chat template"):
        prepare(asked)


def test_the_examples_of_every_seed_must_fit(tmp_path: Path) -> None:
    """Only some seeds draw the long row as an example."""
    splits = ["train"] * 30 + ["valid", "test"] * 5
    rows = [{"x": f"{i} short", "y": "z", "who": ("one", "two")[i % 4 > 1], "split": s} for i, s in enumerate(splits)]
    rows[0]["x"] = "long " * 100
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "name": "x", "model": {"name": "tiny"}, "method": {"name": "lora"}, "evaluate": {"examples": 1},
        "data": {"source": str(tmp_path / "rows.jsonl"), "template": "{x}", "answer": "y", "silo_column": "who"},
    }  # fmt: skip
    fails = []
    for seed in range(60):
        try:
            prepare(parse({**table, "seeds": [seed]}, "x"))
        except UserError:
            fails.append(seed)
    assert 0 < len(fails) < 60
    fine = next(seed for seed in range(60) if seed not in fails)
    with pytest.raises(UserError, match=r"lower evaluate\.examples"):
        prepare(parse({**table, "seeds": [fine, fails[0]]}, "x"))


def test_what_is_wrong_is_told_together(tmp_path: Path) -> None:
    sets = ["data.label=moood", "data.silo_column=sites", "data.template={txt}", "model.name=tinny", "evaluate.best_by=bleu"]
    with pytest.raises(UserError) as error:
        prepare(load(TINY, sets))
    lines = str(error.value).splitlines()
    begins = ["[model] name = 'tinny'", "[data] template: ", "[data] label: ", "[data] silo_column: ", "[evaluate] best_by"]
    assert [any(line.startswith(begin) for line in lines) for begin in begins] == [True] * 5
    with pytest.raises(UserError) as error:
        prepare(load(TINY, ["silo.shp.max_train=3", "silo.clinik.max_train=3"]))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["[silo.shp]", "[silo.clinik]"]
