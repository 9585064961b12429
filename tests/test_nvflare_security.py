"""What no participant of a federation can do to another, tried over a real one: each with a true kit of its own at most.

What a participant can do whose own process runs other code: test_nvflare_ends.py.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from background import free_port, wait_for
from fedtailor import experiment, wire
from fedtailor.engines import courier, doctor, frames, nvflare_admin, nvflare_kit
from fedtailor.engines.nvflare import NVFlare, serve_server
from fedtailor.engines.worker import Open
from fedtailor.errors import UserError
from flares import SILOS, Federation, all_answer, hello, listening, names_one_alone, submitted, worker_at

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")
pytestmark = pytest.mark.engines

import psutil  # noqa: E402  (comes with NVFlare)

TINY = Path(__file__).resolve().parents[1] / "experiments" / "tiny.toml"


def test_another_silos_worker_is_not_asked(flare: NVFlare, federation: Federation) -> None:
    with worker_at(federation.kits["cafe"], str(federation.kits["shop"] / "silo" / "worker.sock")):
        (answer,) = flare.exchange(["cafe"], {"kind": "hello"}, b"", 30)
    assert "of silo 'shop', not of 'cafe'" in answer.lost


def opened(flare: NVFlare, run: str) -> bytes:
    """Every silo knows of this run. Returns what opened it."""
    spec = experiment.load(TINY)
    opening = wire.pack(Open(run, 0, spec.data, spec.model, spec.silo, 1))
    assert [one.head["kind"] for one in flare.exchange(SILOS, {"kind": "open"}, opening, 120)] == ["opened"] * 3
    return opening


def asked(flare: NVFlare, run: str, work: str, body: bytes) -> list[tuple[str, str]]:
    head = {"kind": "ask", "run": run, "round": 99, "index": 0, "work": work, "committed": -1}
    answers = list(flare.exchange(SILOS, head, body, 30))
    assert [one.lost for one in answers] == ["", "", ""]
    return [(str(one.head["kind"]), str(one.head.get("why"))) for one in answers]


def test_work_that_is_not_in_silo_is_refused(flare: NVFlare) -> None:
    body = opened(flare, "refused")
    for work in ("os:system", "fedtailor.models:load", "../x:y", "fedtailor.engines.nvflare:job"):
        for kind, why in asked(flare, "refused", work, body):
            assert kind == "refused"
            assert repr(work) in why


def test_a_body_that_is_none_is_refused(flare: NVFlare) -> None:
    opened(flare, "garbage")
    work = "fedtailor.methods.averaging:start"
    for kind, why in asked(flare, "garbage", work, os.urandom(5000)):
        assert kind == "refused"
        assert "no body of ours" in why


def test_a_name_leads_nowhere(flare: NVFlare, federation: Federation) -> None:
    """The run is the only name that comes from afar and becomes a file's."""
    root = federation.kits["server"].parent
    before = {path for path in root.parent.rglob("*") if path.is_file()}
    run = "../../../../outside"
    body = opened(flare, run)
    assert {kind for kind, _ in asked(flare, run, "fedtailor.methods.averaging:start", body)} == {"refused"}
    new = {path for path in root.parent.rglob("*") if path.is_file()} - before
    assert {path.relative_to(root).parts[0] for path in new} <= {"server", *SILOS}
    own = [path.relative_to(root).as_posix() for path in new if path.relative_to(root).parts[1] == "silo"]
    assert [name for name in own if not re.fullmatch(r"\w+/silo/memory/[0-9a-f]{24}\.safetensors", name)] == []
    assert [path for path in new if "outside" in path.name] == []


@pytest.fixture
def liar(federation: Federation) -> Iterator[None]:
    """A worker of cafe's that answers with whatever the server would choke on."""

    def talk(link: socket.socket) -> None:
        with link, contextlib.suppress(frames.FrameError, OSError):
            frames.receive(link)
            frames.send(link, {"silo": "cafe"})
            lie = str(frames.receive(link)[0]["lie"])
            head = json.dumps({"kind": "reply"}).encode()
            lengths = {"10 GB": (len(head), 10**10), "a long head": (10**9, 0), "half a message": (len(head), 1000)}
            texts = {"no JSON": b"\x00{", "a list": b"[1]", "a deep head": b'{"a":' + b"[" * 30000}
            text = texts.get(lie, head)
            link.sendall(struct.pack(">IQ", *lengths.get(lie, (len(text), 0))) + text)

    kit = federation.kits["cafe"]
    with listening(kit / "liar.sock", talk), worker_at(kit, "liar.sock"):
        yield


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ("10 GB", "a message of 17 + 10000000000 bytes was announced"),
        ("a long head", "a message of 1000000000 + 0 bytes was announced"),
        ("half a message", "closed the connection"),
        ("no JSON", "head is not JSON"),
        ("a list", "head is no JSON object"),
        ("a deep head", "head is not JSON: maximum recursion depth"),
    ],
)
def test_a_worker_that_lies_is_named_and_disturbs_no_other(lie: str, told: str, flare: NVFlare, liar: None) -> None:
    names_one_alone(flare, lie, "cafe", told)


def test_a_body_over_a_silos_limit_is_read_by_none(flare: NVFlare, federation: Federation) -> None:
    """cafe's owner takes 1000 bytes at most."""
    kit = federation.kits["cafe"]
    federation.stop("worker:cafe")
    federation.start("worker:cafe", limit=1000)
    try:
        assert all_answer(flare)
        answers = {one.silo: one for one in flare.exchange(SILOS, {"kind": "hello"}, bytes(40_000_000), 60)}
    finally:
        federation.stop("worker:cafe")
        federation.start("worker:cafe")
    assert [answers[silo].head["kind"] for silo in ("clinic", "shop")] == ["hello", "hello"]
    told = "bytes was announced; the limits are 65536 + 1000"
    assert (answers["cafe"].lost, answers["cafe"].head["kind"]) == ("", "refused")
    assert str(answers["cafe"].head["why"]).endswith(f" + 40000000 {told}")
    assert told in (kit / "test-worker.log").read_text()
    assert all_answer(flare)


def test_no_port_but_the_servers_is_open_to_others(flare: NVFlare, federation: Federation) -> None:
    """Each port of every address of this machine is tried. Others' programs may listen there, too: ours are told apart."""
    ours = [psutil.Process(), *(psutil.Process(one.pid) for one in federation.running.values())]
    ours += [process for kit in federation.kits for process in federation.processes(kit)]
    found = [c for process in ours for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {one.laddr.ip.removeprefix("::ffff:") for one in found if one.laddr.port != federation.port} <= {"127.0.0.1", "::1"}
    listened = {one.laddr.port for one in found}
    assert len(listened) > 3  # each engine talks to its own job
    addresses = [a.address for every in psutil.net_if_addrs().values() for a in every if a.family == socket.AF_INET]
    for address in addresses:
        if not address.startswith("127."):
            assert reached(address) & listened == {federation.port}


def reached(address: str) -> set[int]:
    """The ports that answer."""
    found = set()
    for port in range(1, 65536):
        with socket.socket() as one:
            one.settimeout(1.0)
            if one.connect_ex((address, port)) == 0:
                found.add(port)
    return found


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_job_that_names_another_class_is_refused(
    side: str, flare: NVFlare, federation: Federation, tmp_path: Path
) -> None:
    there = tmp_path / "was-here"

    def change(job: Path) -> None:
        file = job / "app" / "config" / f"config_fed_{side}.json"
        table = json.loads(file.read_text())
        evil = {"id": "evil", "path": "subprocess.Popen", "args": {"args": ["touch", str(there)]}}
        file.write_text(json.dumps(table | {"components": [*table["components"], evil]}))

    found = submitted(federation.kits["server"], tmp_path, change)
    assert found["status"] in ("FINISHED:EXECUTION_EXCEPTION", "FINISHED:ABNORMAL", "FINISHED:ABORTED")
    if side == "client":  # each silo has refused by its own rule
        for silo in SILOS:
            logs = [path.read_text() for path in federation.kits[silo].rglob("*log.txt")]
            assert [text for text in logs if "'subprocess.Popen'" in text and "is not in allow_list" in text]
    assert not there.exists()


def test_a_foreign_certificate_is_refused(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    server = nvflare_kit.about(federation.kits["server"], "server")["server"]
    foreign = nvflare_kit.init(tmp_path / "fed", "demo", server, SILOS)
    with pytest.raises(Exception, match=r"cannot connect|timed out|timeout|connection"):
        nvflare_admin.login(foreign["server"])
    with pytest.raises(UserError, match=r"port .* in use"):
        serve_server(foreign["server"])


def test_a_silo_cannot_pose_as_the_admin(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """cafe holds a certificate of this federation, and a copy of all else that the admin has."""
    shutil.copytree(federation.kits["server"] / "admin", tmp_path / "admin")
    for name in ("client.crt", "client.key"):
        shutil.copy(federation.kits["cafe"] / "startup" / name, tmp_path / "admin" / "startup" / name)
    with pytest.raises(Exception, match=r"(?i)registration|authent|connect|identity"):
        nvflare_admin.login(tmp_path)


def test_the_programs_socket_is_its_owners_alone(flare: NVFlare, federation: Federation) -> None:
    assert (federation.kits["server"] / nvflare_kit.SOCKET).stat().st_mode & 0o077 == 0
    assert [answer.lost for answer in hello(flare)] == ["", "", ""]


def test_a_stranger_at_the_programs_socket_changes_nothing(flare: NVFlare, federation: Federation) -> None:
    with courier.connect(federation.kits["server"] / nvflare_kit.SOCKET, 5) as link:
        frames.send(link, {"kind": "job", "job": "another", "silos": list(SILOS)})
        assert [answer.lost for answer in hello(flare)] == ["", "", ""]


def says(file: Path, text: str, seconds: float = 60.0) -> bool:
    return wait_for(lambda: file.exists() and text in file.read_text(errors="replace"), seconds)


def test_a_silo_cannot_pose_as_the_server(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """cafe has come between shop and the server: shop connects to an engine's server that holds cafe's certificate. What is
    refused is the certificate alone: the same engine with the server's own is taken for the server."""
    port = free_port()
    rogue = federation.copied("server", tmp_path / "rogue", port)
    true = {name: (rogue / "startup" / f"server.{name}").read_bytes() for name in ("crt", "key")}
    for name in true:
        shutil.copy(federation.kits["cafe"] / "startup" / f"client.{name}", rogue / "startup" / f"server.{name}")
    victim = federation.copied("shop", tmp_path / "victim", port)
    registered = "Successfully registered client:shop"
    federation.start("rogue")
    federation.start("victim")
    try:
        assert says(rogue / "engine.log", "No match found for server name: localhost")
        with pytest.raises(Exception, match=r"cannot connect"):
            nvflare_admin.login(rogue)
        federation.stop("rogue")
        told = (victim / "log.txt").read_text()
        assert told.count("created secure channel") > 1
        assert "verified server identity" not in told
        assert registered not in told
        for name, content in true.items():
            (rogue / "startup" / f"server.{name}").write_bytes(content)
        federation.start("rogue")
        assert says(victim / "log.txt", registered)
    finally:
        federation.stop("victim", "rogue")


def test_a_silo_cannot_pose_as_another(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """cafe says that it is shop; shop, which is connected, does not notice."""
    poser = federation.copied("shop", tmp_path / "poser")
    for name in ("client.crt", "client.key"):
        shutil.copy(federation.kits["cafe"] / "startup" / name, poser / "startup" / name)
    before = nvflare_admin.look(federation.kits["server"])["shop"].token
    federation.start("poser")
    try:
        assert says(federation.kits["server"] / "log.txt", "authenticated as 'cafe' but claimed endpoint 'shop'")
        assert [one.lost for one in hello(flare)] == ["", "", ""]
        assert "Successfully registered" not in (poser / "log.txt").read_text()
    finally:
        federation.stop("poser")
    assert nvflare_admin.look(federation.kits["server"])["shop"].token == before


def test_a_certificate_that_has_ended_is_refused_and_named(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    late = federation.copied("cafe", tmp_path / "late")
    ended(late / "startup" / "client.crt", federation.kits["server"].parent / "authority" / "cert.json")
    assert shaken(federation.kits["cafe"], federation.port) != b""
    assert shaken(late, federation.port) == b""
    federation.start("late")
    try:
        assert says(late / "test-late.log", "certificate: client.crt ended on ")
    finally:
        federation.stop("late")
    told = [one.told for one in doctor.findings(late) if one.what == "certificate" and not one.fine]
    assert len(told) == 1
    assert told[0].startswith("client.crt ended on ")
    assert told[0].endswith("; who holds authority/ makes new ones: `fedtailor federation renew KITS`")


def shaken(kit: Path, port: int) -> bytes:
    """The server's first bytes to who holds this kit; none where it takes no such certificate."""
    context = ssl.create_default_context(cafile=str(kit / "startup" / "rootCA.pem"))
    context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ssl.SSLError), socket.create_connection(("localhost", port), 10) as link:
        return context.wrap_socket(link, server_hostname="localhost").recv(9)
    return b""


def ended(file: Path, authority: Path) -> None:
    """The same certificate, signed anew by the federation's own authority, but for its end, which was yesterday."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    old, now = x509.load_pem_x509_certificate(file.read_bytes()), datetime.datetime.now(datetime.UTC)
    key: Any = serialization.load_pem_private_key(json.loads(authority.read_text())["root_pri_key"].encode(), None)
    new = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), old.serial_number + 1)
    new = new.not_valid_before(now - datetime.timedelta(3)).not_valid_after(now - datetime.timedelta(1))
    for one in old.extensions:
        new = new.add_extension(one.value, one.critical)
    file.write_bytes(new.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def test_a_kit_in_use_twice_is_named(flare: NVFlare, federation: Federation, tmp_path: Path) -> None:
    """Whoever holds a kit is that silo: two of them drive each other out, the others go on, and the server's side says so."""
    federation.copied("shop", tmp_path / "twin")
    federation.start("twin")

    def told() -> list[str]:
        return [one.told for one in doctor.findings(federation.kits["server"]) if one.what == "silos" and not one.fine]

    try:
        assert wait_for(lambda: [one for one in hello(flare, 5) if one.silo != "shop" and not one.lost] and told(), 90)
        assert told()[0].startswith("shop: its kit seems to be in use twice")
    finally:
        federation.stop("twin")
    federation.stop("shop")
    federation.start("shop")
    assert all_answer(flare)
