"""Kits of a federation over Flower: a CA, the server's certificate, a key pair for each silo's node. And how its commands run.

Who holds a kit is that participant. The server's kit names the public key of each silo: a node is a silo by its key alone.
Flower would run whatever app is submitted: the kits run its commands by `flower_guard`, which lets no app in but APP.
"""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtailor.engines.kit import ABOUT, SITE, checked, owners_alone, write
from fedtailor.errors import UserError

ACTION = "query.ask"
ENDS = "fedtailor.engines.flower_ends"
APP = {  # all that is submitted: which of our functions are the two ends, and no code
    "project": {
        "name": "fedtailor",
        "version": "1.0.0",
        "description": "carries messages between a server program and the workers of the silos",
        "license": "Apache-2.0",
        "dependencies": [],
    },
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedtailor",
                "components": {"serverapp": f"{ENDS}:server", "clientapp": f"{ENDS}:client"},
                "config": {"job": ""},
            }
        }
    },
}
APPS = ("flwr-serverapp", "flwr-clientapp")  # the commands by which an app is run here; no other is found
LOCAL = ("localhost", "127.0.0.1")
LIMIT = 2**31 - 1 - 2**20  # bytes of a body: Flower counts a message's bytes in 31 bits; the rest is for what is around it


def needed() -> None:
    """Raises UserError where Flower is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise UserError("Flower is not installed here; next: pip install 'fedtailor[flower]'")


def init(folder: Path, name: str, server: str, silos: Sequence[str], days: int = 365) -> dict[str, Path]:
    """Make the kits of a new federation: `folder`/server and `folder`/SILO. Raises UserError before anything is written."""
    host, _ = checked(folder, name, server, silos, days)
    needed()
    kits = {"server": folder / "server"} | {silo: folder / silo for silo in silos}
    making = folder / ".making"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        (making / "authority").mkdir(parents=True, mode=0o700)
        for who in kits:
            for part in ("startup", "local"):
                (making / who / part).mkdir(parents=True, mode=0o700)
        _certificates(making, name, host, days)
        (making / "server" / "nodes").mkdir(mode=0o700)
        for silo in silos:
            key = _node_key(making / silo / "startup")
            (making / "server" / "nodes" / f"{silo}.pub").write_text(f"{key} {silo}\n", encoding="utf-8")
        said = {"engine": "flower", "name": name, "server": server}
        write(making / "server" / ABOUT, {**said, "silos": sorted(silos)})
        (making / "server" / "federation.toml").write_text('engine = "flower"\n', encoding="utf-8")
        for silo in silos:
            shutil.copy(making / "authority" / "ca.crt", making / silo / "startup" / "ca.crt")
            (making / silo / "silo.toml").write_text(f'name = "{silo}"\n{SITE}', encoding="utf-8")
            write(making / silo / ABOUT, {**said, "silo": silo})
        owners_alone(making)
        for who in ("authority", *kits):
            shutil.move(making / who, folder / who)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return kits


def settle(kit: Path, address: str = "") -> dict[str, str]:
    """Make what Flower's commands need in this kit, where it lies now. Returns the environment in which they run.

    address: where the SuperLink listens; in a server's kit alone.
    """
    home, found = kit / "flower", kit / "flower" / "bin"
    for folder in (home, found):
        folder.mkdir(exist_ok=True, mode=0o700)
    for name in APPS:
        _private(found / name, f'#!/bin/sh\nexec {shlex.join(guarded(kit, name))} "$@"\n', 0o700)
    secret = home / "secret"
    if not secret.exists():
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    if address:
        import tomli_w

        told = {"default": "kit", "kit": {"address": address, "root-certificates": str(kit / "startup" / "ca.crt")}}
        _private(home / "config.toml", tomli_w.dumps({"superlink": told}))
        (home / "app").mkdir(exist_ok=True, mode=0o700)
        _private(home / "app" / "pyproject.toml", tomli_w.dumps(APP))
    return environment(kit)


def _private(file: Path, text: str, mode: int = 0o600) -> None:
    file.touch(mode)
    file.chmod(mode)
    file.write_text(text, encoding="utf-8")


def environment(kit: Path) -> dict[str, str]:
    """For Flower's commands: nothing is sent to its makers, nothing installed, and apps run by the guard alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "FLOWER_"))}
    local = ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy", "")), *LOCAL]))
    return kept | {
        "FEDTAILOR_KIT": str(kit),
        "FLWR_HOME": str(kit / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "NO_PROXY": local,
        "no_proxy": local,
        "PATH": str(kit / "flower" / "bin"),
    }


def guarded(kit: Path, name: str) -> list[str]:
    """One of Flower's commands, with this interpreter. -P: what lies in the working directory is not imported."""
    return [sys.executable, "-P", "-m", "fedtailor.engines.flower_guard", str(kit), name]


def _certificates(making: Path, name: str, host: str, days: int) -> None:
    """A CA for this federation, and the server's certificate. 127.0.0.1 is in it: the server's own commands use it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def begun(subject: str, key: Any) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named(name)).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now)
        return made.not_valid_after(now + datetime.timedelta(days=days))

    now = datetime.datetime.now(datetime.UTC)
    root, leaf = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    identity = x509.SubjectKeyIdentifier.from_public_key(root.public_key())
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = begun(name, root).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ca = ca.add_extension(signs, critical=True).add_extension(identity, critical=False)
    names = x509.SubjectAlternativeName([_alternative(one) for one in dict.fromkeys((host, *LOCAL))])
    cert = begun(host, leaf).add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    cert = cert.add_extension(names, critical=False)
    cert = cert.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    cert = cert.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), critical=False)
    authority, startup = making / "authority", making / "server" / "startup"
    _write_key(authority / "ca.key", root)
    _write_key(startup / "server.key", leaf)
    for file, made in (authority / "ca.crt", ca), (startup / "ca.crt", ca), (startup / "server.crt", cert):
        file.write_bytes(made.sign(root, hashes.SHA384()).public_bytes(_pem()))


def _alternative(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(file: Path, key: Any) -> None:
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

    file.touch(0o600)
    file.write_bytes(key.private_bytes(_pem(), PrivateFormat.PKCS8, NoEncryption()))


def _pem() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.PEM


def _node_key(folder: Path) -> str:
    """Makes the key pair of a silo's node. Returns the public key as one line of OpenSSH."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1())
    (folder / "node.key").touch(0o600)
    (folder / "node.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
