"""The two ends inside Flower's app: thin, without state. The app may die at any moment; nothing is lost by it.

    server program <- unix socket -> server <- Flower, TLS -> client <- unix socket -> worker

Flower starts a process for each message that a silo gets. It imports no torch and no model: the worker has them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

from fedtailor.engines import courier, frames, kit
from fedtailor.engines.answered import answered
from fedtailor.engines.flower_kit import ACTION, LIMIT
from fedtailor.errors import FedtailorError, printable

server = ServerApp()  # Flower looks for the two names in this text, so they are not annotated
client = ClientApp()

PAUSE = 0.2  # seconds between two looks for answers
# of what a silo has sent; none of them says that the server is away
UNREADABLE = (LookupError, ValueError, TypeError, AttributeError, RecursionError, DecodeError)


@server.main()
def run(grid: Grid, context: Context) -> None:
    """Takes exchanges from the server program, asks the silos, sends each answer back as it comes."""
    folder = Path(os.environ["FEDTAILOR_KIT"])
    with courier.connect(folder / kit.SOCKET, 10.0) as link:
        frames.send(link, {"kind": "job", "job": str(context.run_config["job"])})
        while True:
            if not select.select([link], [], [], 5.0)[0]:
                continue
            link.until(600.0)
            try:
                head, body = frames.receive(link, LIMIT)
            except frames.Closed:
                return  # the program has ended, or wants another job
            assert isinstance(body, bytes)  # no folder was named for it
            exchange(grid, folder, link, head, body)


def exchange(grid: Grid, folder: Path, link: courier.Link, head: Mapping[str, Any], body: bytes) -> None:
    """One message to several silos. Ends early when the program says or ends something: nobody waits any more."""

    def tell(silo: str, said: Mapping[str, Any], body: bytes = b"") -> None:
        link.until(600.0)
        frames.send(link, {"kind": "answer", "id": head["id"], "silo": silo, **said}, body)

    end = time.monotonic() + head["seconds"]
    nodes = connected(grid, folder)
    for silo in head["to"]:
        if silo not in nodes:
            tell(silo, {"lost": "not connected to the server; its own log says why"})
    asked = {silo: secrets.token_hex(16) for silo in head["to"] if silo in nodes}
    messages = [_message(nodes[silo], key, head, body) for silo, key in asked.items()]
    numbers = list(grid.push_messages(messages)) if messages else []
    del messages, body
    waiting = {number: silo for number, silo in zip(numbers, asked, strict=True) if number}
    for silo in set(asked) - set(waiting.values()):
        tell(silo, {"lost": "its node went away"})
    while waiting and not select.select([link], [], [], PAUSE)[0]:
        for number in list(waiting):  # one by one: only one large answer is held at a time
            try:
                replies = list(grid.pull_messages([number]))
            except UNREADABLE as error:  # Flower reads what a silo has sent here, and would end the run of all by it
                tell(waiting.pop(number), {"lost": printable(f"its answer is none of ours: {error!r:.300}")})
                continue
            for reply in replies:
                silo = waiting.pop(number)
                tell(silo, *_answer(reply, asked[silo]))
            del replies
        if time.monotonic() > end:
            for silo in waiting.values():
                tell(silo, {"lost": f"no reply within {head['seconds']:.3g} s"})
            return


def connected(grid: Grid, folder: Path) -> dict[str, int]:
    """The node of each silo that is connected: the one that has proved the key which the server's kit names for it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    keys = {file.stem: load_ssh_public_key(file.read_bytes()) for file in (folder / "nodes").glob("*.pub")}
    found: dict[str, int] = {}
    for node in grid.get_nodes():
        with contextlib.suppress(ValueError):  # a key of another kind, which none of ours is
            proved = load_pem_public_key(node.public_key)
            found |= {silo: int(node.node_id) for silo, key in keys.items() if key == proved}
    return found


def _message(node: int, key: str, head: Mapping[str, Any], body: bytes) -> Message:
    asked = ConfigRecord({"head": json.dumps(head["head"]), "key": key, "seconds": float(head["seconds"])})
    content = RecordDict({"asked": asked, "body": _record(body)})
    return Message(content, node, ACTION, ttl=float(head["seconds"]) + 5.0, group_id=str(head["id"]))


def _answer(reply: Message, key: str) -> tuple[dict[str, Any], bytes]:
    """What came back. The key is known to the asked node alone: with it, no other node can answer in its place."""
    if reply.has_error():
        why = f"its courier failed: {str(reply.error.reason)[:300]} (Flower's code {reply.error.code})"
        return {"lost": printable(why)}, b""
    try:
        told = reply.content.config_records["told"]
        if told["key"] != key:
            return {"lost": "an answer without the key of the question"}, b""
        said, _ = answered(str(told["said"]))
        body = _body(reply)
        if len(body) > LIMIT:
            raise ValueError(f"a reply of {len(body)} bytes; the limit is {LIMIT}")
        return said, body
    except ValueError as error:
        return {"lost": printable(f"its answer is none of ours: {str(error)[:300]}")}, b""
    except (KeyError, TypeError, AttributeError) as error:
        return {"lost": printable(f"its answer is none of ours: {error!r:.300}")}, b""


@client.query(ACTION.partition(".")[2])
def ask(message: Message, context: Context) -> Message:
    """The worker's answer. What goes wrong is told in one line, without a traceback."""
    asked = message.content.config_records["asked"]
    seconds, body = float(asked["seconds"]), b""  # type: ignore[arg-type]
    try:
        head = json.loads(str(asked["head"]))
        said, body = forwarded(Path(os.environ["FEDTAILOR_KIT"]), head, _body(message), seconds)
        told: dict[str, Any] = {"head": said}
    except TimeoutError:
        told = {"lost": f"no reply within {seconds:.3g} s"}
    except (OSError, FedtailorError, ValueError) as error:
        told = {"lost": f"its worker cannot be reached: {str(error)[:300]}"}
    if len(body) > LIMIT:
        why = f"a reply of {len(body)} bytes; Flower carries {LIMIT} at most: use NVFlare"
        told, body = {"head": {"kind": "refused", "why": why}}, b""
    record = ConfigRecord({"said": json.dumps(told), "key": asked["key"]})
    return Message(RecordDict({"told": record, "body": _record(body)}), reply_to=message)


def forwarded(folder: Path, head: Mapping[str, Any], body: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
    """What the worker says. A worker of another silo is not asked: its rows would count under this one's name."""
    silo = kit.about(folder, "silo")["silo"]
    with courier.connect(kit.worker_socket(folder), seconds) as link:
        frames.send(link, {"kind": "hello"})
        found = frames.receive(link, 0)[0].get("silo")
        if found != silo:
            raise FedtailorError(f"the worker there is of silo {found!r}, not of {silo!r}")
        courier.ask(link, head, body)
        answer, reply = frames.receive(link)
    assert isinstance(reply, bytes)  # no folder was named for it: Flower holds it in memory anyway
    return answer, reply


def _record(body: bytes) -> ArrayRecord:
    return ArrayRecord({"body": Array("uint8", (len(body),), "safetensors", body)})


def _body(message: Message) -> bytes:
    return message.content.array_records["body"]["body"].data
