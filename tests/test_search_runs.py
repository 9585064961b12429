"""Whole runs of a search on the tiny model: its rows, its report, resumed, exported, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtailor import experiment, report, runs, whole, wire
from fedtailor.errors import UserError
from fedtailor.experiment import Experiment
from fedtailor.preparing import prepare
from tiny_runs import TINY

ROWS = ["zero_shot", "hand_written", "federated", "centralized"]
SEARCH = (
    'method={name="search", calls=16, proposals=3, prompts=["{prompt}", "{input}\\nIt was", "Judge: {input}"], '
    'examples=[["All was calm.", "good"]]}'
)


def asked(*sets: str, rows: list[str] = ROWS) -> Experiment:
    ones = ["engine.threads=1", "engine.cohort=1", f"rows={json.dumps(rows)}", "evaluate.best_by=accuracy"]
    return experiment.load(TINY, [*ones, SEARCH, *sets])


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "search"
    return folder, runs.begin(asked("seeds=[0,1]"), folder, "a test").conduct()


def test_its_rows(searched: tuple[Path, dict[str, Any]]) -> None:
    rows = searched[1]["rows"]
    assert list(rows) == ROWS
    assert rows["federated"]["model_calls"] > 0
    assert rows["federated"]["trained_parameters"] == 0
    assert rows["hand_written"]["prompt"] in ("{prompt}", "{input}\nIt was", "Judge: {input}")
    assert rows["hand_written"]["evaluation_bytes_up"] > rows["zero_shot"]["evaluation_bytes_up"]
    paired = rows["federated"]["paired"]
    assert set(paired) == {"hand_written", "centralized"}
    for other, found in paired.items():
        apart = rows["federated"]["accuracy"]["mean"] - rows[other]["accuracy"]["mean"]
        assert found["mean"] == pytest.approx(apart)
        assert found["low"] <= found["mean"] <= found["high"]


def test_the_hand_written_one_is_the_best_on_validation(searched: tuple[Path, dict[str, Any]]) -> None:
    folder = searched[0] / "seed-0"
    from fedtailor import data, models
    from fedtailor import evaluate as scoring
    from fedtailor.engines.in_process import InProcess
    from fedtailor.evaluate import Evaluate

    one = asked()
    rows = data.load(one.data, {}, 0).silos
    ask = InProcess(rows, {"base": models.load(one.model)}).reach(0)
    pool = one.method.hand_written(next(iter(rows.values())).labels)
    found = [scoring.summary(scoring.ask_all(ask, Evaluate(s, "val", 4)))["accuracy"]["mean"] for s in pool]
    chosen = wire.read_file(folder / "rows" / "hand_written" / "served.safetensors")
    assert pool.index(chosen) == found.index(max(found))


def test_the_page_shows_prompts_differences_and_accuracy_by_calls(searched: tuple[Path, dict[str, Any]]) -> None:
    page = report.write(searched[0]).read_text()
    assert "model calls, all silos together" in page
    assert 'id="paired"' in page
    assert "best hand-written prompt" in page
    text = (searched[0] / "seed-0" / "adapter" / "prompt.txt").read_text()
    import html

    assert html.escape(text.splitlines()[-1], quote=False)[:20] in page
    assert "calls" in report.markdown(searched[1])


def test_a_killed_search_goes_on_to_the_same_prompt(searched: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    one = asked("seeds=[0]")
    whole_run = runs.begin(one, tmp_path / "whole", "a test")
    expected = whole_run.conduct()

    from fedtailor.generations import Generations

    class Killed(Exception): ...

    real: Callable[..., None] = Generations.commit
    stopped = runs.begin(one, tmp_path / "stopped", "a test")

    def commit(self: Generations, number: int, *rest: Any) -> None:
        real(self, number, *rest)
        if number == 1 and "federated" in str(self.folder):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generations, "commit", commit)
        with pytest.raises(Killed):
            stopped.conduct()
    found = runs.resume(tmp_path / "stopped").conduct()
    for row in ROWS:
        assert found["rows"][row]["accuracy"] == expected["rows"][row]["accuracy"]
    for file in ("prompt.txt", "prompt.json"):
        assert (tmp_path / "stopped" / "adapter" / file).read_text() == (tmp_path / "whole" / "adapter" / file).read_text()


def test_it_is_exported_as_text_and_not_merged(searched: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole.export(searched[0], tmp_path / "out", merge=False)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"prompt.txt", "prompt.json"}
    with pytest.raises(UserError, match="a prompt, no change of weights"):
        whole.export(searched[0], tmp_path / "merged", merge=True)


def test_noise_is_compared_with_none(tmp_path: Path) -> None:
    one = asked('method.noise="laplace"', "method.epsilon=4", rows=["federated", "noiseless"])
    found = runs.begin(one, tmp_path / "noisy", "a test").conduct()["rows"]
    assert 0 < found["federated"]["epsilon"] <= 4
    assert "epsilon" not in found["noiseless"]
    assert set(found["federated"]["paired"]) == {"noiseless"}


def test_a_limit_bounds_what_is_told_under_noise_and_leaves_the_row_without_it_alone(tmp_path: Path) -> None:
    one = asked('method.noise="laplace"', "silo.cafe.epsilon=6", rows=["federated", "noiseless"])
    found = runs.begin(one, tmp_path / "noisy", "a test").conduct()["rows"]
    assert not any("cafe" in why for row in found.values() for why in row["rejected"])
    prompt = json.loads((tmp_path / "noisy" / "adapter" / "prompt.json").read_text())
    assert prompt["noise"] == "laplace"
    assert set(prompt["scores"]) == {"cafe", "clinic", "shop"}, "of the whole search, whichever round was best"


def test_no_row_without_noise_over_a_federation(tmp_path: Path) -> None:
    one = asked('method.noise="laplace"', rows=["federated", "noiseless", "centralized"])
    assert runs.Run(one, tmp_path).rows == ["federated", "noiseless", "centralized"]
    afar: Any = object()
    assert runs.Run(one, tmp_path, courier=afar).rows == ["federated"]
    told = prepare(asked('method.noise="laplace"', "silo.cafe.epsilon=6", 'data.labels=["bad", "good"]'), ("cafe", "shop"))[0]
    assert told.silos["cafe"].settings == {"epsilon": 6.0}
    with pytest.raises(UserError, match=r"\[silo.cafe\] epsilon = 6: bounds what is told under noise"):
        prepare(asked("silo.cafe.epsilon=6", 'data.labels=["bad", "good"]'), ("cafe", "shop"))


@pytest.mark.parametrize(
    ("sets", "rows", "why"),
    [
        ([], ["noiseless"], "rows: 'noiseless' needs method.noise; leave it out"),
        (['method={name="prefix"}'], ["hand_written"], "needs a method that begins with prompts"),
        (['method.prompts=["' + "x" * 600 + '{input}"]'], ["federated"], "tokens, the model's context is 512"),
        (['method.examples=[["a", "lovely"]]'], ["federated"], "answer 'lovely' is no label"),
        (["silo.cafe.epsilon=1"], ["federated"], r"\[silo.cafe\] epsilon = 1: bounds what is told under noise"),
        (
            ["silo.cafe.epsilon=0.1", 'method.noise="laplace"'], ["federated"],
            r"\[silo.cafe\] epsilon = 0.1: one sum costs 0.889 already; raise it, or lower \[method\] epsilon",
        ),
        (["method.secrets=none.txt"], ["federated"], "secrets = 'none.txt': cannot be read"),
    ],
)
def test_what_cannot_run_is_told_before_anything_is(sets: list[str], rows: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        runs.begin(asked(*sets, rows=rows), tmp_path / "none", "a test")
    assert not (tmp_path / "none").exists()


def test_where_the_secrets_lie_is_not_passed_on(tmp_path: Path) -> None:
    secrets = tmp_path / "hidden.txt"
    secrets.write_text("project zinc")
    result = runs.begin(asked(f'method.secrets="{secrets}"', rows=["federated"]), tmp_path / "run", "a test").conduct()
    page = report.write(tmp_path / "run").read_text()
    told = json.dumps(result)
    assert "zinc" not in told + page
    assert str(tmp_path) not in told + page


def test_chat_asks_by_the_prompt(searched: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from fedtailor import chatting, models
    from fedtailor.data import Row

    lines = iter(["The parcel was lovely.", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    out = io.StringIO()
    chatting.talk(searched[0], Console(file=out), temperature=0, top_p=1, max_new_tokens=4, seed=0)
    served = wire.read_file(searched[0] / "seed-0" / "adapter" / "served.safetensors")
    after = "\nSentiment:"
    row = Row(f"The parcel was lovely.{after}", "", frame=(0, len(after)))
    scores = served.open({"base": models.load(asked().model)}).scores([row], served.labels)
    assert out.getvalue().strip() == served.labels[int(scores.argmax())]


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        ('method.prompts=["{input}", {template="{input}", wrods=["a"]}]', r"prompts\.1\.wrods: Unexpected keyword argument"),
        ("method.prompts=[3]", r"prompts\.0: "),
        ('method.examples=["All was calm."]', r"examples\.0: an example is \[input, answer\], two texts, not 'All was calm.'"),
        ('method={name="blackbox", dimensions=2000}', "dimensions: .* 1900"),
        ('method={name="blackbox", population=2}', "population: .* 4"),
    ],
)
def test_a_wrong_setting_is_told_once(sets: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as told:
        asked(sets)
    assert len(str(told.value).splitlines()) == 1
