"""Kits of a federation over NVFlare: a folder for the server, one for each silo, with certificates and strict rules.

Who holds a kit is that participant: hand each silo its own folder by a trusted way. `authority/` signs what is made later
(`nvflare_members`): keep it off the network. The rules are in each kit's local/ folder and are enforced by its owner: no job
may carry code, no class may be named but ours, no shell commands, no log leaves a silo, no file outside the kit.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtailor.errors import UserError

ADMIN = "admin@fedtailor.local"  # who submits our job; its identity lies in the server's kit
ORG = "fedtailor"
RESERVED = ("admin", "authority", "server")  # folders of ours, and the name by which a silo knows its server
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
HOST = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
PLAIN = "letters, digits, - and _ only, 50 at most, a letter or digit first"
CLASSES = {  # all that a job may name, on each side
    "server": ("fedtailor.engines.nvflare_ends.ServerEnd", "nvflare.collab.runtime.controller.CollabController"),
    "silo": ("fedtailor.engines.nvflare_ends.SiloEnd", "nvflare.collab.runtime.executor.CollabExecutor"),
}
RIGHTS = {"submit_job": "any", "manage_job": "any", "view": "any"}  # of our one admin; everything else is "none"
REFUSED = ("byoc", "clone_job", "download_job", "operate", "server-predeployed-flwr", "shell_commands")
ROLES = ("org_admin", "lead", "member")  # NVFlare's other roles: no kit of ours has one
WORKER = "worker"  # in a silo's local/: where the worker's socket is, if not at its usual place in the kit
ABOUT = "fedtailor.json"
SITE = """
# allow = ["ours"]                    # packages besides fedtailor whose methods may run here
[data]                                # laid over the experiment's [data], seen by nobody else
# source = "rows.jsonl"               # or: fedtailor silo KIT --data rows.jsonl
# template = "{note}\\nUrgency:"      # where the columns are called otherwise
"""
SOCKET = "courier.sock"  # in the server's kit: the server program listens there for its job


def needed() -> None:
    """Raises UserError where NVFlare is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise UserError("NVFlare is not installed here; next: pip install 'fedtailor[nvflare]'")


def init(folder: Path, name: str, server: str, silos: Sequence[str], days: int = 365) -> dict[str, Path]:
    """Make the kits of a new federation: `folder`/server and `folder`/SILO. Raises UserError before anything is written."""
    host, port = _checked(folder, name, server, silos, days)
    needed()
    making = folder / ".making"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        made = provisioned(making, name, host, port, silos, days)
        (made / host / "admin").mkdir()
        for part in ("startup", "local"):
            shutil.move(made / ADMIN / part, made / host / "admin" / part)
        _harden(made / host, "server", {"name": name, "silos": sorted(silos), "server": server})
        (made / host / "federation.toml").write_text('engine = "nvflare"\n', encoding="utf-8")
        (made / host / "federation.toml").chmod(0o600)
        for silo in silos:
            silos_kit(made / silo, name, silo, server)
        shutil.move(making / name / "state", folder / "authority")
        (folder / "authority").chmod(0o700)
        (folder / "authority" / "cert.json").chmod(0o600)
        kits = {"server": folder / "server"} | {silo: folder / silo for silo in silos}
        for kit, path in kits.items():
            shutil.move(made / (host if kit == "server" else kit), path)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return kits


def about(kit: Path, kind: str) -> dict[str, Any]:
    """What a kit says of itself. Raises UserError where it is no kit of this kind ("server" or "silo")."""
    try:
        found: dict[str, Any] = json.loads((kit / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{kit}: no kit of a federation ({ABOUT}: {error}); `fedtailor federation init` makes them") from None
    if (kind == "server") != ("silos" in found):
        raise UserError(f"{kit}: not the kit of a {kind}; choose the {kind}'s own folder")
    return found


def silos_kit(made: Path, name: str, silo: str, server: str) -> None:
    """Turn what NVFlare made for a silo into a kit of ours."""
    (made / "silo.toml").write_text(f'name = "{silo}"\n{SITE}', encoding="utf-8")
    _harden(made, "silo", {"name": name, "silo": silo, "server": server})


def settle(kit: Path, kind: str) -> None:
    """Point the engine's storage into the kit, where it lies now: NVFlare takes absolute paths alone."""
    if kind == "server":
        file = kit / "local" / "resources.json"
        table = json.loads(file.read_text(encoding="utf-8"))
        table["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "snapshots")
        for component in table["components"]:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(kit / "jobs")
        write(file, table)


def worker_socket(kit: Path) -> Path:
    """Where a silo's worker listens. Said on the silo's side alone: local/worker in its kit, one path."""
    file = kit / "local" / WORKER
    said = file.read_text(encoding="utf-8").strip() if file.exists() else ""
    return kit / (said or "silo/worker.sock")


def _checked(folder: Path, name: str, server: str, silos: Sequence[str], days: int) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    errors = bad_names(silos, host)
    if not HOST.fullmatch(host) or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        errors.append(f"server = {server!r}: must be HOST:PORT as the silos reach it, for instance fl.example.org:8002")
    if not silos:
        errors.append("no silo is named; name one at least")
    errors += [f"name = {name!r}: {PLAIN}"] if not NAME.fullmatch(name) else []
    if days < 1:
        errors.append(f"days = {days}: certificates must be valid for a day at least")
    if folder.exists() and any(folder.iterdir()):
        errors.append(f"{folder}: not empty; choose a new folder, or remove the old federation first")
    if errors:
        raise UserError("\n".join(errors))
    return host, int(port)


def bad_names(silos: Sequence[str], host: str, taken: Collection[str] = ()) -> list[str]:
    """One line for each name that no new silo may have."""
    low = [silo.lower() for silo in silos]
    errors = [f"silo = {silo!r}: {PLAIN}" for silo in silos if not NAME.fullmatch(silo)]
    errors += [f"silo = {silo!r}: reserved; choose another name" for silo in silos if silo.lower() in (*RESERVED, host.lower())]
    errors += [f"silo = {one!r}: named more than once; names differ by more than case" for one in {*low} if low.count(one) > 1]
    known = {one.lower() for one in taken}
    again = [silo for silo in silos if silo.lower() in known]
    return errors + [f"silo = {silo!r}: is in this federation already; choose another name" for silo in again]


def provisioned(
    work: Path, name: str, host: str, port: int, silos: Sequence[str], days: int, ends: datetime | None = None
) -> Path:
    """NVFlare's own kits, as it makes them. Certificates that `work`/`name`/state holds are used again; new ones end with
    the root's, which is valid for `days`, or at `ends`."""
    from nvflare.lighter.constants import CtxKey
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    class Certificates(CertBuilder):  # type: ignore[misc]
        def _generate_cert(self, *given: Any, **named: Any) -> Any:
            """NVFlare's leaves end after 360 days, whatever the root's validity: these end with the root."""
            if not named.get("ca"):
                named["not_valid_after"] = ends or self.root_cert.not_valid_after_utc
            return CertBuilder._generate_cert(*given, **named)

    project = Project(name, "a federation of fedtailor")
    project.set_server(host, ORG, {"fed_learn_port": port, "admin_port": port})
    for silo in silos:
        project.add_client(silo, ORG, {})
    project.add_admin(ADMIN, ORG, {"role": "project_admin"})
    builders = [WorkspaceBuilder(), StaticFileBuilder(config_folder="config", scheme="grpc"), Certificates(days)]
    quiet = logging.getLogger("fedtailor.kit")
    context = Provisioner(str(work), builders).provision(project, logger=quiet)
    if context.get(CtxKey.BUILD_ERROR):
        raise UserError("NVFlare could not make the kits: what it said is above")
    return Path(context[CtxKey.CURRENT_PROD_DIR])


def _harden(kit: Path, kind: str, said: Mapping[str, Any]) -> None:
    local = kit / "local"
    table = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    table["class_list_enforcement_mode"] = "enforce"
    table["class_allow_list"] = list(CLASSES[kind])
    table["allow_log_streaming"] = False
    unwanted = ("site_log_streamer", "log_receiver")  # they send, and take in, the error logs of silos
    table["components"] = [one for one in table["components"] if one["id"] not in unwanted]
    for one in table["components"]:
        if one["id"] == "job_scheduler":
            one["args"]["max_jobs"] = 1000  # a job whose server died counts as running for ever: none may wait for it
    write(local / "resources.json", table)
    none = dict.fromkeys(REFUSED, "none")
    others = {role: dict.fromkeys(RIGHTS, "none") | none for role in ROLES}
    write(local / "authorization.json", {"format_version": "1.0", "permissions": {"project_admin": RIGHTS | none} | others})
    for script in kit.rglob("startup/*.sh"):
        script.unlink()  # `fedtailor server` and `fedtailor silo` start the engine
    write(kit / ABOUT, said)
    for path in [kit, *kit.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)


def write(file: Path, table: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(table, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Whole or not at all, for its owner alone."""
    new = file.with_name(file.name + ".new")
    new.touch(0o600)
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
