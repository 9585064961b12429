"""What may keep a kit from working, each made so by hand, and what is said about it."""

from __future__ import annotations

import datetime
import json
import socket
from pathlib import Path

import pytest

from fedtailor.engines import doctor
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
        (-1, 10, True, "; have new kits made with `fedtailor federation init`"),
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


def test_a_server_that_answers_and_one_that_does_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        assert told(kit(tmp_path, port), "server") == [(True, f"localhost:{port} answers")]
    ((fine, text),) = told(tmp_path, "server")
    assert not fine
    assert text == f"localhost:{port}: Connection refused; start `fedtailor server KIT` there, and open this port in its firewall"


def test_a_worker_that_is_not_there(tmp_path: Path) -> None:
    ((fine, text),) = told(kit(tmp_path), "worker")
    assert not fine
    assert text.endswith(f"; start it with `fedtailor silo {tmp_path}`")


def test_no_kit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kit of a federation"):
        list(doctor.findings(tmp_path))
