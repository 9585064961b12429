"""The server's end, without a network: replies of a silo whose own process runs other code. Each costs its answer alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from fedtailor.engines import flower_kit, frames
from fedtailor.engines.courier import Link
from fedtailor.engines.frames import HEAD_LIMIT

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedtailor[flower]'")

from cryptography.hazmat.primitives import serialization as pem
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from flwr.supercore.task_identity import TaskIdentity

from fedtailor.engines import flower_ends as ends

HONEST = {"head": {"kind": "reply", "id": "1"}}


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages within a run alone."""
    for name in TaskIdentity.__annotations__:
        monkeypatch.setattr(TaskIdentity, name, 1)


def body(data: bytes = b"abc") -> ArrayRecord:
    return ArrayRecord({"body": Array("uint8", (len(data),), "safetensors", data)})


def reply(content: RecordDict | Error) -> Message:
    return Message(content, reply_to=Message(RecordDict(), 1, flower_kit.ACTION))


def told(said: Any, key: Any = "key", **records: Any) -> RecordDict:
    """said: the table or, as a text, what is there instead of its JSON."""
    text = said if isinstance(said, str) else json.dumps(said)
    return RecordDict({"told": ConfigRecord({"said": text, "key": key}), "body": body()} | records)


def test_an_honest_reply_comes_whole() -> None:
    assert ends._answer(reply(told(HONEST)), "key") == ({**HONEST, "lost": ""}, b"abc")
    assert ends._answer(reply(told({"lost": "no reply within 5 s"})), "key")[0] == {"head": {}, "lost": "no reply within 5 s"}


LIES = {
    "deep": (told("[" * 60_000), "too deep"),
    "deeper": (told("[" * 200_000), f"over the limit of {HEAD_LIMIT}"),
    "long": (told({"head": {"why": "a" * 100_000}}), f"over the limit of {HEAD_LIMIT}"),
    "a text for a head": (told({"head": "x"}), "no flat table"),
    "no head": (told({}), "no flat table"),
    "NaN": (told({"head": {"x": float("nan")}}), "not JSON compliant"),
    "a list": (told("[1]"), "no JSON object"),
    "no JSON": (told("{"), "Expecting"),
    "numbers": (RecordDict({"told": ConfigRecord({"said": [1.5], "key": "key"})}), "no JSON object"),
    "another key": (told(HONEST, "other"), "without the key"),
    "keys": (told(HONEST, ["key"]), "without the key"),
    "no body": (told(HONEST, body=ArrayRecord()), "KeyError('body')"),
    "a table for a body": (told(HONEST, body=ConfigRecord({"body": b"abc"})), "KeyError('body')"),
    "nothing": (RecordDict(), "KeyError('told')"),
    "an array": (RecordDict({"told": body()}), "KeyError('told')"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_told_in_one_line(lie: str) -> None:
    content, why = LIES[lie]
    said, came = ends._answer(reply(content), "key")
    assert set(said) == {"lost"}
    assert why in said["lost"]
    assert said["lost"].isprintable()
    assert came == b""


def test_a_body_that_flower_cannot_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "LIMIT", 2)
    lost = "its answer is none of ours: a reply of 3 bytes; the limit is 2"
    assert ends._answer(reply(told(HONEST)), "key") == ({"lost": lost}, b"")


RUDE = "\x1b[2J\nTraceback" + "a" * 1000


@pytest.mark.parametrize("content", [told({"lost": RUDE}), Error(7, RUDE)], ids=["ours", "Flower's"])
def test_a_silos_words_are_short_and_give_a_terminal_no_orders(content: RecordDict | Error) -> None:
    lost = ends._answer(reply(content), "key")[0]["lost"]
    assert lost.isprintable()
    assert "?[2J?Traceback" in lost
    assert len(lost) <= 500


class Two(Grid):
    """Between the two ends, for two nodes: south answers; north's reply is read by Flower itself, as in its own grid."""

    run = property(lambda self: pytest.fail("not asked for"))
    set_run = create_message = send_and_receive = get_node_ids = pytest.fail

    def __init__(self, kits: dict[str, Path], content: bytes) -> None:
        self.content, self.keys = content, {}
        for number, silo in enumerate(("north", "south")):
            key = pem.load_ssh_private_key((kits[silo] / "startup" / "node.key").read_bytes(), None).public_key()
            self.keys[number] = key.public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=number, public_key=key) for number, key in self.keys.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = {str(one.metadata.dst_node_id): one.content.config_records["asked"]["key"] for one in messages}
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (number,) = message_ids
        if number == "0":
            return [cast(Message, inflate_object_from_contents("x", {"x": self.content}))]
        return [reply(told(HONEST, self.sent[number]))]


UNREADABLE = f"Message{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}3".encode() + HEAD_BODY_DIVIDER + b"\xff\xff\xff"


def test_what_flower_cannot_read_costs_that_silos_answer_alone(tmp_path: Path) -> None:
    validate_object_content(UNREADABLE)  # Flower's server lets it in
    kits = flower_kit.init(tmp_path / "fed", "demo", "fl.example:8002", ["north", "south"])
    ours, theirs = socket.socketpair()
    with ours, Link(fileno=theirs.detach()) as link:
        head = {"id": "1", "to": ["north", "south"], "seconds": 30.0, "head": {"kind": "ask"}}
        ends.exchange(Two(kits, UNREADABLE), kits["server"], link, head, b"")
        answers = {said["silo"]: (said, body) for said, body in (frames.receive(ours) for _ in range(2))}
    assert answers["north"][0]["lost"].startswith("its answer is none of ours: DecodeError(")
    assert answers["south"] == ({"kind": "answer", "id": "1", "silo": "south", **HONEST, "lost": ""}, b"abc")
