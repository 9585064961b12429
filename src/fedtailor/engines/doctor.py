"""What may keep a kit from working, looked at from where it lies: each finding says how it is, and how to mend it.

    findings(kit) -> Finding("certificate", True, "client.crt is valid until 2027-11-25"), ...

Nothing is started and nothing is changed; only the address that the kit names is connected to.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import shutil
import socket
import ssl
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtailor import __version__
from fedtailor.engines import courier, standing
from fedtailor.engines import kit as kits
from fedtailor.errors import FedtailorError, UserError

if TYPE_CHECKING:  # they bring torch in, which is looked at only where an experiment is named
    from fedtailor.engines.site import Site
    from fedtailor.experiment import Experiment
    from fedtailor.models import Base, Resident

SOON = 30  # days before its end that a certificate is named
PACKAGES = {"nvflare": ("nvflare", "NVFlare", "2.9"), "flower": ("flwr", "Flower", "1.41")}
ROOM = 5 * 10**9  # bytes: a base model, memories and spooled messages
WAIT = 5.0  # seconds for a connection
RECENT, TIMES = datetime.timedelta(minutes=5), 3  # a silo that was driven out so often comes from two places
EVICTED = re.compile(r"(?P<when>\S+ [\d:]+),.* is evicted for \S+ from endpoint (?P<silo>[^\s.]+) for exceeding limit")


@dataclass(frozen=True)
class Finding:
    what: str
    fine: bool | None  # None: it may be, and cannot be told from here
    told: str  # how it is; where it is not fine, what to do


def findings(kit: Path, asked: Experiment | None = None, source: str | None = None) -> Iterator[Finding]:
    """Of a server's or a silo's kit. Raises UserError where it is neither.

    asked: its base model is loaded, and a silo's rows are read as it asks. source: a silo's rows, as given to its worker.
    """
    kind = "server" if (kit / "federation.toml").exists() else "silo"
    about = kits.about(kit, kind)
    engine = about.get("engine", "nvflare")
    yield _engine(engine)
    yield _versions()
    yield _owners_alone(kit)
    yield from _read_only(kit)
    yield _disk(kit)
    yield from certificates(kit)
    host, _, port = about["server"].rpartition(":")
    if kind == "server":
        yield from _own_server(kit, host, int(port))
        yield from _silos(kit, about["silos"])
        if engine == "nvflare":  # Flower lets a node in once
            yield _twins(kit)
        if asked is not None:
            yield _model(asked.model)[0]
        return
    yield _server(host, int(port), kit)
    yield _worker(kit, about["silo"])
    yield from _silos_own(kit, asked, source)


def _engine(engine: str) -> Finding:
    package, product, needed = PACKAGES[engine]
    extra = f"pip install 'fedtailor[{engine}]'"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding("engine", False, f"{product} is not installed; {extra}")
    fine = version.startswith(f"{needed}.")
    return Finding("engine", fine, f"{product} {version}" + ("" if fine else f"; needs {needed}: {extra}"))


def _versions() -> Finding:
    others = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    told = f"fedtailor {__version__}, which must be the same everywhere; {', '.join(others)}: their first two numbers"
    return Finding("versions", True, told)


def _owners_alone(kit: Path) -> Finding:
    keys = [kit, *kit.rglob("*.key"), *kit.rglob("*.pem")]
    open_ = [path for path in keys if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if open_:
        return Finding("permissions", False, f"{open_[0]} can be read by others; chmod -R go= {kit}")
    return Finding("permissions", True, "the owner's alone")


def _read_only(kit: Path) -> Iterator[Finding]:
    try:
        tempfile.TemporaryFile(dir=kit).close()  # has no name, or loses it at once
    except OSError as error:
        told = f"{kit} cannot be written to ({error.strerror}); make it writable: logs, sockets and memories lie in it"
        yield Finding("permissions", False, told)


def _disk(kit: Path) -> Finding:
    free = shutil.disk_usage(kit).free
    mend = "" if free >= ROOM else f"; free some: {ROOM / 1e9:.0f} GB should be there for a model, memories and messages"
    return Finding("disk", free >= ROOM, f"{free / 1e9:.1f} GB free{mend}")


def certificates(kit: Path) -> Iterator[Finding]:
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
            mend = "who holds authority/ makes new ones: `fedtailor federation renew KITS`"
            if (kit / "startup" / "ca.crt").exists():  # over Flower
                mend = "have new kits made with `fedtailor federation init`"
            yield Finding("certificate", now <= end, f"{told}; {mend}")
        else:
            yield Finding("certificate", True, f"{file.name} is valid until {end:%Y-%m-%d}")


def _own_server(kit: Path, host: str, port: int) -> Iterator[Finding]:
    """Whether it runs here, and then whether the name that silos are given leads to it."""
    try:
        socket.create_connection(("127.0.0.1", port), WAIT).close()
    except OSError as error:
        yield Finding("server", False, f"port {port}: {error.strerror or error}; start `fedtailor server {kit}`")
        return
    yield Finding("server", True, f"port {port} answers")
    found = _server(host, port, kit / "admin" if (kit / "admin").exists() else kit)
    if found.fine:
        yield Finding("address", True, found.told)
    else:  # not every router leads back to itself
        told = f"from here: {found.told}"
        yield Finding("address", None, f"{told}; what counts is how silos see it: there, `fedtailor doctor KIT`")


def _server(host: str, port: int, kit: Path) -> Finding:
    """Whether who answers at this address is the server of this kit's federation."""
    try:
        with socket.create_connection((host, port), WAIT) as link:
            _greeted(link, host, kit / "startup")
        return Finding("server", True, f"{host}:{port} answers, and is this federation's")
    except socket.gaierror as error:
        return Finding("server", False, f"{host}: {error.strerror}; mend the name in your DNS, or in /etc/hosts")
    except FileNotFoundError:
        return Finding("server", False, f"{kit / 'startup'} is not whole; ask for this kit again")
    except ssl.SSLCertVerificationError as error:
        told = f"{host}:{port} shows a certificate that this kit does not trust ({error.verify_message})"
        mend = "it is another federation's, or this kit is older than that server's: ask its owner"
        return Finding("server", False, f"{told}; {mend}")
    except ssl.SSLError as error:
        told = f"{host}:{port} is no server of a federation ({error.reason})"
        return Finding("server", False, f"{told}; find out what listens there, and mind proxies in between")
    except OSError as error:
        mend = "start `fedtailor server KIT` there, and open this port in its firewall"
        return Finding("server", False, f"{host}:{port}: {error.strerror or error}; {mend}")


def _greeted(link: socket.socket, host: str, startup: Path) -> None:
    """A TLS greeting as the engine's, which shows who the other side is. Raises OSError, SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if (startup / "ca.crt").exists():  # over Flower, where a node proves its key in each call
        context.load_verify_locations(startup / "ca.crt")
    else:
        context.load_verify_locations(startup / "rootCA.pem")
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
        context.set_alpn_protocols(["h2"])
    context.wrap_socket(link, server_hostname=host).close()


def _silos(kit: Path, silos: Sequence[str]) -> Iterator[Finding]:
    """What the last run learnt of them."""
    known = standing.read(kit) or {"silos": {}}
    for silo in silos:
        one = known["silos"].get(silo, {})
        torch = importlib.metadata.version("torch")
        for name, here, parts in (("fedtailor", __version__, None), ("torch", torch, 2)):
            there = one.get(name, here)
            if there.split(".")[:parts] != here.split(".")[:parts]:
                told = f"{silo} has {name} {there}, and here it is {here}"
                yield Finding("versions", False, f"{told}; install the same on both sides")
        if standing.another_base(known, silo):
            its, ours = one["model_sha256"][:12], known["model_sha256"][:12]
            told = f"{silo} had another base than the last run (sha256 {its}, not {ours})"
            yield Finding("model", False, f"{told}; compare with what `fedtailor doctor KIT --experiment FILE` says there")


def _twins(kit: Path) -> Finding:
    """Two engines with one kit drive each other out, without an end: what the server's engine wrote of it lately."""
    since = datetime.datetime.now() - RECENT
    driven: Counter[str] = Counter()
    for file in (kit / "log.txt.1", kit / "log.txt"):
        for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
            if (found := EVICTED.match(line)) and datetime.datetime.fromisoformat(found["when"]) > since:
                driven[found["silo"]] += 1
    twice = [silo for silo, times in driven.items() if times >= TIMES]
    if twice:
        told = f"{', '.join(twice)}: its kit seems to be in use twice; end one, or have new kits made if a stranger has it"
        return Finding("silos", False, told)
    return Finding("silos", True, "each comes from one place")


def _worker(kit: Path, silo: str) -> Finding:
    try:
        path = kits.worker_socket(kit)
        (answer,) = courier.Sockets({silo: path}).exchange((silo,), {"kind": "hello"}, b"", WAIT)
    except UserError as error:
        return Finding("worker", False, str(error))
    if answer.lost:
        return Finding("worker", False, f"{answer.lost}; start it with `fedtailor silo {kit}`")
    if answer.head.get("fedtailor") != __version__:
        told = f"runs fedtailor {answer.head.get('fedtailor')}, and {__version__} is installed"
        return Finding("worker", False, f"{told}; start it anew")
    return Finding("worker", True, f"answers, fedtailor {__version__}")


def _silos_own(kit: Path, asked: Experiment | None, source: str | None) -> Iterator[Finding]:
    """Its settings, its base model and its rows: what is said here stays here."""
    from fedtailor.engines import site

    try:
        own = site.read(kit / "silo.toml", source)
    except UserError as error:
        yield Finding("silo.toml", False, str(error))
        return
    resident = None
    if asked is not None:
        found, resident = _model(own.base(asked.model))
        yield found
    yield _rows(own, asked, resident)


def _model(base: Base) -> tuple[Finding, Resident | None]:
    from fedtailor import models

    try:
        resident = models.load(base)
    except FedtailorError as error:
        return Finding("model", False, str(error)), None
    dtype = str(resident.module.dtype).removeprefix("torch.")
    hashes = f"sha256 {resident.sha256[:12]}, tokenizer {resident.tokenizer_sha256[:12]}"
    told = f"{base.name} as {dtype}: {hashes}; both must be the same everywhere"
    if base.dtype == "auto":
        told += f'; where another processor takes another dtype, write dtype = "{dtype}" into [model]'
    return Finding("model", True, told), resident


def _rows(own: Site, asked: Experiment | None, resident: Resident | None) -> Finding:
    from fedtailor import preparing, sources

    source = own.data.get("source")
    try:
        if asked is not None:
            rows = own.rows(asked.data, asked.silo.get(own.name, {}), asked.seeds[0])
            if resident is not None:
                preparing.fits(resident, {own.name: rows}, taken=getattr(asked.method, "virtual_tokens", 0))
            counts = f"{len(rows.train)} rows to train on, {len(rows.val)} to validate, {len(rows.test)} to test"
            return Finding("data", True, f"{counts}; each fits the experiment")
        if source is None:
            return Finding("data", None, "silo.toml names no rows; --data ROWS looks at them, --experiment FILE at how they fit")
        table = sources.read(source, config=own.data.get("config", ""), revision=own.data.get("revision", ""))
        return Finding("data", True, f"{table.name}: {len(table.rows)} rows with {', '.join(table.columns)}")
    except FedtailorError as error:
        return Finding("data", False, str(error))
