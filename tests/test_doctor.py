"""What may keep a kit from working, each made so by hand, and what is said about it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtailor
from background import free_port
from commands import TINY, Command
from fedtailor import experiment, models
from fedtailor.engines import doctor, nvflare_kit, standing
from fedtailor.errors import UserError

x509 = pytest.importorskip("cryptography.x509", reason="comes with NVFlare: pip install 'fedtailor[nvflare]'")


def certificate(file: Path, begins: float, ends: float) -> None:
    """Valid from and until so many days from now."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now + datetime.timedelta(begins)).not_valid_after(now + datetime.timedelta(ends))
    file.parent.mkdir(exist_ok=True, mode=0o700)
    file.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def kit(folder: Path, port: int = 1) -> Path:
    folder.chmod(0o700)
    about = {"name": "f", "silo": "north", "server": f"localhost:{port}"}
    (folder / "fedtailor.json").write_text(json.dumps(about))
    return folder


def told(folder: Path, what: str) -> list[tuple[bool, str]]:
    return [(one.fine, one.told) for one in doctor.findings(folder) if one.what == what]


@pytest.mark.parametrize(
    ("begins", "ends", "fine", "said"),
    [
        (-1, 300, True, "client.crt is valid until "),
        (-1, 10, True, "; who holds authority/ makes new ones: `fedtailor federation renew KITS`"),
        (-30, -1, False, "client.crt ended on "),
        (0.5, 300, False, "; set this clock right"),
    ],
)
def test_certificates(tmp_path: Path, begins: float, ends: float, fine: bool, said: str) -> None:
    certificate(tmp_path / "startup" / "client.crt", begins, ends)
    ((was, text),) = told(kit(tmp_path), "certificate")
    assert was == fine
    assert said in text


def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    assert told(kit(tmp_path), "permissions") == [(True, "the owner's alone")]
    (tmp_path / "client.key").touch(0o644)
    assert told(tmp_path, "permissions") == [(False, f"{tmp_path / 'client.key'} can be read by others; chmod -R go= {tmp_path}")]


def test_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(kit(tmp_path), "disk")[0][1].endswith(" GB free") or told(tmp_path, "disk")[0][0] is False
    monkeypatch.setattr(doctor, "ROOM", 10**18)
    ((fine, text),) = told(tmp_path, "disk")
    assert not fine
    assert "free some: 1000000000 GB should be there" in text


@pytest.fixture
def kits(tmp_path: Path) -> dict[str, Path]:
    """Real ones, of a server that is to be on a free port of this machine."""
    return nvflare_kit.init(tmp_path / "kits", "demo", f"localhost:{free_port()}", ["north", "south"])


@contextlib.contextmanager
def listening(kit: Path, port: int, *, tls: bool = True) -> Iterator[None]:
    """Something at that port that greets as the owner of this server's kit, or, without TLS, says good-bye."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "startup" / "server.crt", kit / "startup" / "server.key")

    def serve(one: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                link = one.accept()[0]
                with link, contextlib.suppress(OSError):
                    context.wrap_socket(link, server_side=True).close() if tls else link.sendall(b"220 mail at your service")

    with socket.create_server(("127.0.0.1", port)) as one:
        thread = threading.Thread(target=serve, args=(one,), daemon=True)
        thread.start()
        yield
        one.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def port_of(kits: dict[str, Path]) -> int:
    return int(nvflare_kit.about(kits["north"], "silo")["server"].rpartition(":")[2])


def test_a_silo_knows_its_server(kits: dict[str, Path]) -> None:
    port = port_of(kits)
    with listening(kits["server"], port):
        assert told(kits["north"], "server") == [(True, f"localhost:{port} answers, and is this federation's")]
        assert told(kits["server"], "server") == [(True, f"port {port} answers")]
        assert told(kits["server"], "address") == [(True, f"localhost:{port} answers, and is this federation's")]
    ((fine, text),) = told(kits["north"], "server")
    assert not fine
    assert text == f"localhost:{port}: Connection refused; start `fedtailor server KIT` there, and open this port in its firewall"
    ((fine, text),) = told(kits["server"], "server")
    assert text == f"port {port}: Connection refused; start `fedtailor server {kits['server']}`"
    assert told(kits["server"], "address") == []


def test_another_server_at_that_address_is_not_trusted(kits: dict[str, Path], tmp_path: Path) -> None:
    port = port_of(kits)
    other = nvflare_kit.init(tmp_path / "other", "demo", f"localhost:{port}", ["north"])
    with listening(other["server"], port):
        ((fine, text),) = told(kits["north"], "server")
        assert (fine, "shows a certificate that this kit does not trust" in text) == (False, True), text
        ((fine, text),) = told(kits["server"], "address")
        assert fine is None
        assert text.startswith(f"from here: localhost:{port} shows a certificate")
    with listening(kits["server"], port, tls=False):
        ((fine, text),) = told(kits["north"], "server")
        assert (fine, f"localhost:{port} is no server of a federation" in text) == (False, True), text


def test_a_kit_that_is_not_whole(kits: dict[str, Path]) -> None:
    (kits["north"] / "startup" / "client.key").unlink()
    with listening(kits["server"], port_of(kits)):
        assert told(kits["north"], "server") == [(False, f"{kits['north'] / 'startup'} is not whole; ask for this kit again")]


def test_a_name_that_leads_nowhere(kits: dict[str, Path]) -> None:
    about = nvflare_kit.about(kits["north"], "silo")
    (kits["north"] / nvflare_kit.ABOUT).write_text(json.dumps({**about, "server": "nowhere.invalid:8002"}))
    ((fine, text),) = told(kits["north"], "server")
    assert not fine
    assert text.startswith("nowhere.invalid: ")
    assert text.endswith("; mend the name in your DNS, or in /etc/hosts")


def test_what_the_last_run_learnt_of_the_silos(kits: dict[str, Path]) -> None:
    before = [one.told for one in doctor.findings(kits["server"]) if not one.fine]
    assert len(before) == 1, "nothing runs, and nothing else is wrong"
    silos = {"north": {"fedtailor": "0.0.9", "model_sha256": "b" * 64}, "south": {"torch": "1.9"}}
    known = {"run": "x", "since": 0, "rounds": 1, "model_sha256": "a" * 64, "silos": silos}
    (kits["server"] / standing.FILE).write_text(json.dumps(known))
    assert [text for fine, text in told(kits["server"], "versions") if not fine] == [
        f"north has fedtailor 0.0.9, and here it is {fedtailor.__version__}; install the same on both sides",
        f"south has torch 1.9, and here it is {torch.__version__}; install the same on both sides",
    ]
    ((fine, text),) = told(kits["server"], "model")
    assert not fine
    assert text.startswith("north had another base than the last run (sha256 bbbbbbbbbbbb, not aaaaaaaaaaaa); compare")


def test_both_sides_tell_the_same_hash_of_the_base(kits: dict[str, Path]) -> None:
    asked = experiment.load(TINY)
    said = [[one.told for one in doctor.findings(kits[kit], asked) if one.what == "model"] for kit in ("server", "north")]
    assert said[0] == said[1]
    assert said[0][0].startswith(f"tiny as float32: sha256 {models.load(asked.model).sha256[:12]}, tokenizer ")
    auto = experiment.load(TINY, ["model.dtype=auto"])
    ((told_auto),) = [one.told for one in doctor.findings(kits["server"], auto) if one.what == "model"]
    assert 'where another processor takes another dtype, write dtype = "' in told_auto


def test_a_base_that_is_not_there(kits: dict[str, Path]) -> None:
    asked = experiment.load(TINY)
    (kits["north"] / "silo.toml").write_text('name = "north"\n[models]\ntiny = "/nowhere/tiny"\n')
    ((fine, text),) = [(one.fine, one.told) for one in doctor.findings(kits["north"], asked) if one.what == "model"]
    assert not fine
    assert "no model, folder or reachable hub id" in text


def test_rows_are_read_as_the_worker_will(kits: dict[str, Path], tmp_path: Path) -> None:
    kit, rows = kits["north"], tmp_path / "rows.jsonl"
    assert told(kit, "data") == [
        (None, "silo.toml names no rows; --data ROWS looks at them, --experiment FILE at how they fit")
    ]
    rows.write_text("".join(json.dumps({"text": f"t {i}", "mood": ("bad", "good")[i % 2]}) + "\n" for i in range(20)))

    def looked(asked: Any = None) -> tuple[bool | None, str]:
        return next((one.fine, one.told) for one in doctor.findings(kit, asked, str(rows)) if one.what == "data")

    assert looked() == (True, "rows.jsonl: 20 rows with text, mood")
    fine, text = looked(experiment.load(TINY))
    assert (fine, text.endswith("; each fits the experiment")) == (True, True), text
    assert sum(int(word) for word in text.split() if word.isdigit()) == 20
    fine, text = looked(experiment.load(TINY, ["data.template={note}:"]))
    assert (fine, "no column 'note'" in text) == (False, True), text
    (kit / "silo.toml").write_text('nam = "north"\n')
    assert told(kit, "silo.toml")[0][0] is False


def test_the_command_tells_all_and_fails_where_something_is_wrong(kits: dict[str, Path], fedtailor: Command) -> None:
    ended = fedtailor("doctor", kits["north"], "--experiment", TINY)
    assert ended.code == 1
    marks = {line.split(": ")[0] for line in ended.out.splitlines()}
    assert {"ok  versions", "ok  certificate", "BAD server", "BAD worker", "ok  model"} <= marks
    ended = fedtailor("doctor", kits["north"])
    assert "?   data: silo.toml names no rows" in ended.out


def test_a_worker_that_is_not_there(tmp_path: Path) -> None:
    ((fine, text),) = told(kit(tmp_path), "worker")
    assert not fine
    assert text.endswith(f"; start it with `fedtailor silo {tmp_path}`")


def test_a_silos_kit_that_is_in_use_twice(tmp_path: Path) -> None:
    """As the server's engine writes it; a job's own connection, once each, and what is long past do not count."""
    folder = kit(tmp_path)
    (folder / "fedtailor.json").write_text(json.dumps({"name": "f", "silos": ["north", "south"], "server": "localhost:1"}))
    (folder / "federation.toml").touch()
    now, line = datetime.datetime.now(), "{:%Y-%m-%d %H:%M:%S},000 - sfm - INFO - Connection CN1 is evicted for CN2 from {}"
    times = [now] * 3 + [now - datetime.timedelta(hours=1)] * 3
    silos = ["north"] * 3 + ["south"] * 3
    entries = [line.format(when, f"endpoint {silo} for exceeding limit 1") for when, silo in zip(times, silos, strict=True)]
    (folder / "log.txt").write_text("\n".join(entries[1:]))
    assert told(folder, "silos") == [(True, "each comes from one place")]
    (folder / "log.txt").write_text("\n".join(entries))
    ((fine, text),) = told(folder, "silos")
    assert not fine
    assert text.startswith("north: its kit seems to be in use twice; ")


def test_no_kit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kit of a federation"):
        list(doctor.findings(tmp_path))


def test_a_kit_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at by another account where this one may do everything."""
    list(doctor.findings(kit(tmp_path)))  # what it imports has been read
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500 if os.geteuid() else 0o755)
    before = os.geteuid()
    if not before:
        (tmp_path / "fedtailor.json").chmod(0o644)
        os.seteuid(65534)
    try:
        found = [one.told for one in doctor.findings(Path()) if one.what == "permissions" and not one.fine]
    finally:
        os.seteuid(before)
        tmp_path.chmod(0o700)
    assert ". cannot be written to (Permission denied); make it writable: logs, sockets and memories lie in it" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fedtailor.json"]
