"""Who joins a federation over NVFlare, who leaves it, and new certificates before the old ones end.

All three need `authority/`, or the server's kit, beside each other as `federation init` left them. No kit that a silo has
is asked for: what a silo must be given lies in its folder here afterwards.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtailor.engines import nvflare_kit
from fedtailor.engines.keeping import locked
from fedtailor.errors import UserError, suggest

DISABLED = "disabled_clients.json"  # in the server's kit: NVFlare reads it at its start, and lets none of these in


def add(folder: Path, silo: str, days: int | None = None) -> Path:
    """Make one more silo's kit in `folder`. No other kit's certificate changes, and a running server lets it in.

    days: of its certificate; None: it ends with the federation's own. Raises UserError before anything is written.
    """
    with _changing(folder) as about:
        state, server = _authority(folder), folder / "server"
        host, port = _address(about)
        errors = nvflare_kit.bad_names([silo], host, about["silos"])
        if silo.lower() in {one.lower() for one in removed(server)}:
            errors.append(f"silo = {silo!r}: was removed, and its old certificate would be let in again; choose another name")
        elif (folder / silo).exists() and not errors:
            errors.append(f"{folder / silo}: is there already; move it away, or choose another name")
        begin, end = _validity(state["root_cert"])
        now = datetime.datetime.now(datetime.UTC)
        ends = None if days is None else now + datetime.timedelta(days)
        if days is not None and days < 1:
            errors.append(f"days = {days}: certificates must be valid for a day at least")
        if (ends or now) > end:
            todo = "leave --days out, or renew first" if now < end else "renew first"
            told = f"the federation's own certificate ends on {end:%Y-%m-%d}"
            errors.append(f"{told}; {todo}: `fedtailor federation renew {folder}`")
        if errors:
            raise UserError("\n".join(errors))
        state.pop(silo, None)  # of an earlier try that was cut off
        with _provisioned(folder, about["name"], host, port, [silo], (end - begin).days, state, ends) as made:
            nvflare_kit.silos_kit(made / silo, about["name"], silo, about["server"])
            shutil.move(made / silo, folder / silo)
        nvflare_kit.write(server / nvflare_kit.ABOUT, {**about, "silos": sorted([*about["silos"], silo])})
        return folder / silo


def remove(folder: Path, silo: str) -> None:
    """No run asks this silo any more, and a server that is started from now on lets its certificate in no more."""
    with _changing(folder) as about:
        if silo not in about["silos"]:
            raise UserError(f"silo = {silo!r}: is not in this federation{suggest(silo, about['silos'])}")
        if len(about["silos"]) == 1:
            raise UserError(f"silo = {silo!r}: is the only one; a federation without it is ended by stopping its server")
        server, rest = folder / "server", [one for one in about["silos"] if one != silo]
        nvflare_kit.write(server / DISABLED, {"disabled_clients": sorted({*removed(server), silo})})
        nvflare_kit.write(server / nvflare_kit.ABOUT, {**about, "silos": rest})


def renew(folder: Path, days: int = 365) -> dict[str, list[Path]]:
    """New certificates for all, over the keys that they have: none of the new files, returned by participant, is secret.

    Old and new ones go together until the old ones end: no flag day.
    """
    if days < 1:
        raise UserError(f"days = {days}: certificates must be valid for a day at least")
    with _changing(folder) as about:
        state, server = _authority(folder), folder / "server"
        state["root_cert"] = _again(state["root_cert"], state, days)
        subjects = {_address(about)[0]: server, nvflare_kit.ADMIN: server / "admin"} | {s: folder / s for s in about["silos"]}
        for subject in subjects:
            state[subject]["cert"] = _again(state[subject]["cert"], state, days)
        nvflare_kit.write(folder / "authority" / "cert.json", state)
        made: dict[str, list[Path]] = {}
        for subject, kit in subjects.items():
            startup = kit / "startup"
            for place in (kit, startup):  # a kit that was handed over need not lie here any more
                place.mkdir(exist_ok=True, mode=0o700)
            texts = {"server.crt" if kit == server else "client.crt": state[subject]["cert"], "rootCA.pem": state["root_cert"]}
            for name, text in texts.items():
                nvflare_kit.write_text(startup / name, text)
            made.setdefault("server" if server in (kit, kit.parent) else subject, []).extend(startup / name for name in texts)
        return made


def removed(server: Path) -> list[str]:
    """Silos that this server's kit keeps out."""
    file = server / DISABLED
    return list(json.loads(file.read_text(encoding="utf-8"))["disabled_clients"]) if file.exists() else []


def _address(about: Mapping[str, Any]) -> tuple[str, int]:
    host, _, port = about["server"].rpartition(":")
    return host, int(port)


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[dict[str, Any]]:
    """What the server's kit says of itself, for this command alone to change."""
    nvflare_kit.needed()
    server = folder / "server"
    engine = nvflare_kit.about(server, "server").get("engine", "nvflare")
    if engine != "nvflare":
        raise UserError(f"{folder}: a federation over {engine}, whose members are fixed; make new kits, or one over nvflare")
    with locked(server / ".members", "another command works on these kits; wait for it"):
        yield nvflare_kit.about(server, "server")


def _authority(folder: Path) -> dict[str, Any]:
    """What signs."""
    file = folder / "authority" / "cert.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: {told}; it signs certificates: bring back authority/ as `federation init` made it") from None


@contextlib.contextmanager
def _provisioned(
    folder: Path, name: str, host: str, port: int, silos: list[str], days: int, state: Mapping[str, Any],
    ends: datetime.datetime | None = None,
) -> Iterator[Path]:  # fmt: skip
    """NVFlare's kits by this state. What it then holds is the authority's once the caller has been through."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as work:
        place = Path(work) / name / "state" / "cert.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(state), encoding="utf-8")
        made = nvflare_kit.provisioned(Path(work), name, host, port, silos, days, ends)
        nvflare_kit.write(folder / "authority" / "cert.json", json.loads(place.read_text(encoding="utf-8")))
        yield made


def _validity(pem: str) -> tuple[datetime.datetime, datetime.datetime]:
    from cryptography import x509

    found = x509.load_pem_x509_certificate(pem.encode())
    return found.not_valid_before_utc, found.not_valid_after_utc


def _again(pem: str, state: Mapping[str, Any], days: int) -> str:
    """The same certificate with a later end: same names, same key, same rights."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    old, now = x509.load_pem_x509_certificate(pem.encode()), datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer).public_key(old.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now)
    made = made.not_valid_after(now + datetime.timedelta(days))
    for one in old.extensions:
        made = made.add_extension(one.value, one.critical)
    key: Any = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode("ascii")
