"""What may keep a kit from working, looked at from where it lies: each finding says how it is, and how to mend it.

    findings(kit) -> [Finding("certificate", True, "valid until 2027-11-25"), ...]

Nothing is started and nothing is changed; only the address that the kit names is connected to.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtailor import __version__
from fedtailor.engines import courier, nvflare_kit
from fedtailor.errors import UserError

SOON = 30  # days before its end that a certificate is named
ROOM = 5 * 10**9  # bytes: a base model, memories and spooled messages
WAIT = 5.0  # seconds for a connection


@dataclass(frozen=True)
class Finding:
    what: str
    fine: bool
    told: str  # how it is; where it is not fine, what to do


def findings(kit: Path) -> Iterator[Finding]:
    """Of a server's or a silo's kit. Raises UserError where it is neither."""
    kind = "server" if (kit / "federation.toml").exists() else "silo"
    about = nvflare_kit.about(kit, kind)
    yield _engine()
    yield _owners_alone(kit)
    yield _disk(kit)
    yield from _certificate(kit)
    host, _, port = about["server"].rpartition(":")
    yield _server(host, int(port), kit if kind == "server" else None)
    if kind == "silo":
        yield _worker(kit, about["silo"])


def _engine() -> Finding:
    try:
        version = importlib.metadata.version("nvflare")
    except importlib.metadata.PackageNotFoundError:
        return Finding("engine", False, "NVFlare is not installed; pip install 'fedtailor[nvflare]'")
    fine = version.startswith("2.9.")
    return Finding("engine", fine, f"NVFlare {version}" + ("" if fine else "; needs 2.9: pip install 'fedtailor[nvflare]'"))


def _owners_alone(kit: Path) -> Finding:
    keys = [kit, *kit.rglob("*.key"), *kit.rglob("*.pem")]
    open_ = [path for path in keys if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if open_:
        return Finding("permissions", False, f"{open_[0]} can be read by others; chmod -R go= {kit}")
    return Finding("permissions", True, "the owner's alone")


def _disk(kit: Path) -> Finding:
    free = shutil.disk_usage(kit).free
    mend = "" if free >= ROOM else f"; free some: {ROOM / 1e9:.0f} GB should be there for a model, memories and messages"
    return Finding("disk", free >= ROOM, f"{free / 1e9:.1f} GB free{mend}")


def _certificate(kit: Path) -> Iterator[Finding]:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    for file in sorted([*kit.glob("startup/*.crt"), *kit.glob("startup/*.pem")]):
        found = x509.load_pem_x509_certificate(file.read_bytes())
        begin, end = found.not_valid_before_utc, found.not_valid_after_utc
        if now < begin:
            told = f"{file.name} begins at {begin:%Y-%m-%d %H:%M} UTC, and here it is {now:%Y-%m-%d %H:%M}"
            yield Finding("certificate", False, f"{told}; set this clock right")
        elif now > end - datetime.timedelta(days=SOON):
            told = f"{file.name} {'ended' if now > end else 'ends'} on {end:%Y-%m-%d}"
            yield Finding("certificate", now <= end, f"{told}; have new kits made with `fedtailor federation init`")
        else:
            yield Finding("certificate", True, f"{file.name} is valid until {end:%Y-%m-%d}")


def _server(host: str, port: int, kit: Path | None) -> Finding:
    """`kit`: the server's own, when it lies on this machine."""
    try:
        with socket.create_connection(("127.0.0.1" if kit else host, port), WAIT):
            return Finding("server", True, f"{host}:{port} answers")
    except socket.gaierror as error:
        return Finding("server", False, f"{host}: {error.strerror}; mend the name in your DNS, or in /etc/hosts")
    except OSError as error:
        mend = f"start `fedtailor server {kit or 'KIT'}`" + ("" if kit else " there, and open this port in its firewall")
        return Finding("server", False, f"{host}:{port}: {error.strerror or error}; {mend}")


def _worker(kit: Path, silo: str) -> Finding:
    try:
        path = nvflare_kit.worker_socket(kit)
        (answer,) = courier.Sockets({silo: path}).exchange((silo,), {"kind": "hello"}, b"", WAIT)
    except UserError as error:
        return Finding("worker", False, str(error))
    if answer.lost:
        return Finding("worker", False, f"{answer.lost}; start it with `fedtailor silo {kit}`")
    if answer.head.get("fedtailor") != __version__:
        told = f"runs fedtailor {answer.head.get('fedtailor')}, and {__version__} is installed"
        return Finding("worker", False, f"{told}; start it anew")
    return Finding("worker", True, f"answers, fedtailor {__version__}")
