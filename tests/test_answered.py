"""What a silo's end says is read as a flat, limited, printable table, or refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedtailor.engines.answered import FLAT, answered
from fedtailor.engines.frames import BODY_LIMIT, HEAD_LIMIT


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"head": {"kind": "reply", "id": "3", "n": 1, "x": 0.5, "fine": True, "none": None}, "size": 7}, 7),
        ({"head": {}}, 0),
        ({"head": {"kind": "ünï"}, "lost": ""}, 0),
    ],
)
def test_an_honest_head_goes_on_as_it_is(said: dict[str, Any], told: int) -> None:
    for text in (json.dumps(said), json.dumps(said).encode()):
        assert answered(text) == ({"head": said["head"], "lost": ""}, told)


def test_why_there_is_no_head_goes_on() -> None:
    assert answered('{"lost": "no reply within 5 s"}') == ({"head": {}, "lost": "no reply within 5 s"}, 0)


def test_nothing_else_goes_on() -> None:
    said, _ = answered(json.dumps({"head": {"kind": "hello"}, "silo": "shop", "id": "0", "kind": "job"}))
    assert said == {"head": {"kind": "hello"}, "lost": ""}


def test_words_are_short_and_give_a_terminal_no_orders() -> None:
    rude = "\x1b[2J\ud800\n" + "a" * 1000
    said, _ = answered(json.dumps({"head": {rude: rude}, "lost": rude}))
    fine = "?[2J??" + "a" * 494
    assert said == {"head": {fine: fine}, "lost": fine}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 60_000, "too deep"),
        ('{"head": ' + "[" * 30_000, "too deep"),
        ("[" * 200_000, f"over the limit of {HEAD_LIMIT}"),
        (json.dumps({"head": {"why": "a" * 100_000}}), f"over the limit of {HEAD_LIMIT}"),
        (json.dumps({"head": dict.fromkeys(map(str, range(3000)), "ü" * 5)}, ensure_ascii=False), f"the limit is {FLAT}"),
        ("[1]", "no JSON object"),
        ("null", "no JSON object"),
        ("{", "Expecting"),
        (b'{"head": {"why": "\xff"}}', "can't decode"),
        ("{}", "no flat table"),
        ('{"head": "x"}', "no flat table"),
        ('{"head": null}', "no flat table"),
        ('{"head": [["kind", "reply"]]}', "no flat table"),
        ('{"head": {"why": [[[]]]}}', "no flat table"),
        ('{"head": {"x": NaN}}', "not JSON compliant"),
        ('{"head": {"x": -Infinity}}', "not JSON compliant"),
        ('{"head": {"x": 1e999}}', "not JSON compliant"),
        (json.dumps({"head": {"x": 0}}).replace("0", "9" * 5000), "4300"),
        ('{"head": {}, "size": -1}', "a reply of -1 bytes"),
        ('{"head": {}, "size": true}', "a reply of True bytes"),
        ('{"head": {}, "size": "5"}', "a reply of '5' bytes"),
        (json.dumps({"head": {}, "size": BODY_LIMIT + 1}), f"the limit is {BODY_LIMIT}"),
    ],
)
def test_a_lie_is_refused_in_one_line(text: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]{1,300}$") as refused:
        answered(text)
    assert told in str(refused.value)


@pytest.mark.parametrize("where", ["lost", "size", "head"])
def test_depth_that_json_reads_and_nothing_tells_is_refused_or_cut(where: str) -> None:
    """Wherever between the two the limit of this interpreter lies."""
    for depth in range(10, 1100, 7):
        text = f'{{"{where}": {"[" * depth}{"]" * depth}}}'
        try:
            said, _ = answered(text)
        except ValueError:
            continue
        assert len(said["lost"]) <= 500
