"""Talking to a finished run, through real standard input: what is typed is what the model reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.control import strip_control_codes

from fedtailor import wire
from fedtailor.answering import Answers
from fedtailor.chatting import talk
from fedtailor.data import Row
from fedtailor.errors import UserError
from fedtailor.experiment import load, parse
from fedtailor.models import Base
from fedtailor.models import load as load_model
from fedtailor.runs import begin
from fedtailor.tiny import tiny

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"
HOW: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8, "seed": 3}
Say = Callable[..., str]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(folder, *lines): what is printed when these lines are typed."""

    def said(folder: Path, *lines: str, **more: Any) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        out = Console(file=io.StringIO(), width=1000)
        talk(folder, out, **{**HOW, **more})
        text: str = out.file.getvalue()  # type: ignore[attr-defined]
        return text

    return said


def seen(text: str) -> str:
    """As a terminal may show it: rich leaves out bells, backspaces and the like, which random weights do say."""
    return strip_control_codes(text)


def finished(tmp_path: Path, rows: list[dict[str, Any]], data: Mapping[str, Any], model: str = "tiny") -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "name": "chat", "rounds": 1, "rows": ["federated"], "model": {"name": model, "dtype": "float32"},
        "method": {"name": "lora", "rank": 2, "local_steps": 1, "batch_size": 2, "lr": 0.05},
        "data": {"source": str(tmp_path / "rows.jsonl"), "silo_column": "who", **data},
        "evaluate": {"max_new_tokens": 2, "samples": 0}, "engine": {"threads": 1},
    }  # fmt: skip
    begin(parse(table, "here"), tmp_path / "run", "").conduct()
    return tmp_path / "run"


def opened(folder: Path, model: str = "tiny") -> Answers:
    served = wire.read_file(folder / "adapter" / "served.safetensors")
    return served.open({"base": load_model(Base(model, "float32"))})  # type: ignore[no-any-return]


def streamed(model: Answers, row: Row) -> str:
    return "".join(model.stream(row, **HOW))


def answers(count: int = 40) -> list[dict[str, Any]]:
    return [{"x.y": f"number {i}", "z": str(i), "who": "ab"[i % 2]} for i in range(count)]


def test_a_template_is_filled_in(tmp_path: Path, say: Say) -> None:
    """Its column has a dot, as columns may: the value is put in as it is, braces and all."""
    folder = finished(tmp_path, answers(), {"template": "Q: {x.y} {{now}}\nA:", "answer": "z"})
    expected = streamed(opened(folder), Row("Q: how {many}? {now}\nA:", ""))
    assert expected
    assert say(folder, "how {many}?") == seen(expected) + "\n"
    then = streamed(opened(folder), Row("Q: and then? {now}\nA:", ""))
    assert say(folder, "how {many}?", "and then?") == seen(f"{expected}\n{then}\n")


def test_several_columns_are_asked_one_after_the_other(tmp_path: Path, say: Say) -> None:
    rows = [{"a": f"a{i}", "b": f"b{i}", "z": str(i), "who": "pq"[i % 2]} for i in range(40)]
    folder = finished(tmp_path, rows, {"template": "{b} after {a}, {b}:", "answer": "z"})
    assert say(folder, "two", "one") == seen(streamed(opened(folder), Row("two after one, two:", ""))) + "\n"
    assert say(folder, "two") == "", "the end of input in the middle of a question"


def test_an_empty_line_ends_it(tmp_path: Path, say: Say) -> None:
    folder = finished(tmp_path, answers(), {"template": "{x.y}", "answer": "z"})
    assert say(folder, "", "how many?") == ""
    assert say(folder) == ""


def test_a_chat_remembers_its_turns(tmp_path: Path, say: Say) -> None:
    turns = lambda i: [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"yes {i}"}]  # noqa: E731
    rows = [{"turns": turns(i), "who": "ab"[i % 2]} for i in range(40)]
    folder = finished(tmp_path, rows, {"messages": "turns"})
    model = opened(folder)
    first = {"role": "user", "content": "hi"}
    told = streamed(model, Row("", "", messages=(first,)))
    then = ({"role": "assistant", "content": told}, {"role": "user", "content": "and you?"})
    again = streamed(model, Row("", "", messages=(first, *then)))
    assert say(folder, "hi", "and you?") == seen(f"{told}\n{again}\n")


@pytest.mark.parametrize("labels", [(), ("bad", "good", "so-so")])
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_classifier_says_a_label(tmp_path: Path, say: Say, architecture: str, labels: tuple[str, ...]) -> None:
    """Words that the experiment names, or that were read off the rows."""
    base = tiny("float32", architecture)
    base.module.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    words = labels or ("bad", "good", "other")
    rows = [{"x": f"{words[i % 3]} {i}", "z": words[i % 3], "who": "ab"[i % 2]} for i in range(60)]
    data = {"template": "{x}:", "label": "z", **({"labels": list(labels)} if labels else {})}
    folder = finished(tmp_path, rows, data, str(tmp_path / "base"))
    lines = [f"{word} {i}" for i, word in enumerate(words)]
    scores = opened(folder, str(tmp_path / "base")).scores([Row(f"{line}:", "") for line in lines], words)
    assert say(folder, *lines).split() == [words[i] for i in scores.argmax(1).tolist()]


def test_the_shipped_tiny_experiment(tmp_path: Path, say: Say) -> None:
    experiment = load(TINY, ['rows=["federated"]', "engine.threads=1"])
    begin(experiment, tmp_path / "run", "").conduct()
    assert say(tmp_path / "run", "The parcel was lovely.", "The parcel was late.").split() in (
        [one, other] for one in ("bad", "good") for other in ("bad", "good")
    )


def test_a_folder_without_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished run there.*--resume") as error:
        talk(tmp_path, Console(file=io.StringIO()), **HOW)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_conversation_that_fills_the_context_goes_on(say: Say, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}] for i in range(40)]
    folder = finished(tmp_path, [{"m": m, "who": f"silo {i % 2}"} for i, m in enumerate(turns)], {"messages": "m"})
    text = say(folder, "a" * 200, "b" * 200, "c" * 200, "d" * 600, "e", "")
    assert text.count("; forgetting what was said before]") == 1
    assert text.count("; say it shorter]") == 1
    assert not text.rstrip().endswith("]"), "the last line was answered"
