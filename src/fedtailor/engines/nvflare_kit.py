"""Kits of a federation over NVFlare: a folder for the server, one for each silo, with certificates and strict rules.

Who holds a kit is that participant: hand each silo its own folder by a trusted way. `authority/` signs what is made later
(`nvflare_members`): keep it off the network. The rules are in each kit's local/ folder and are enforced by its owner: no job
may carry code, no class may be named but ours, no shell commands, no log leaves a silo, no file outside the kit.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedtailor.engines.kit import ABOUT as ABOUT
from fedtailor.engines.kit import SITE, checked, owners_alone
from fedtailor.engines.kit import SOCKET as SOCKET
from fedtailor.engines.kit import about as about
from fedtailor.engines.kit import bad_names as bad_names
from fedtailor.engines.kit import worker_socket as worker_socket
from fedtailor.engines.kit import write as write
from fedtailor.engines.kit import write_text as write_text
from fedtailor.errors import UserError

ADMIN = "admin@fedtailor.local"  # who submits our job; its identity lies in the server's kit
ORG = "fedtailor"
CLASSES = {  # all that a job may name, on each side
    "server": ("fedtailor.engines.nvflare_ends.ServerEnd", "nvflare.collab.runtime.controller.CollabController"),
    "silo": ("fedtailor.engines.nvflare_ends.SiloEnd", "nvflare.collab.runtime.executor.CollabExecutor"),
}
RIGHTS = {"submit_job": "any", "manage_job": "any", "view": "any"}  # of our one admin; everything else is "none"
REFUSED = ("byoc", "clone_job", "download_job", "operate", "server-predeployed-flwr", "shell_commands")
MOST = 10_000  # silos that a server lets in; NVFlare's own limit is 100
ROLES = ("org_admin", "lead", "member")  # NVFlare's other roles: no kit of ours has one


def needed() -> None:
    """Raises UserError where NVFlare is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise UserError("NVFlare is not installed here; next: pip install 'fedtailor[nvflare]'")


def init(folder: Path, name: str, server: str, silos: Sequence[str], days: int = 365) -> dict[str, Path]:
    """Make the kits of a new federation: `folder`/server and `folder`/SILO. Raises UserError before anything is written."""
    host, port = checked(folder, name, server, silos, days)
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
    if kind == "server":
        file = kit / "startup" / "fed_server.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        told["servers"][0]["max_num_clients"] = MOST
        write(file, told)
    for script in kit.rglob("startup/*.sh"):
        script.unlink()  # `fedtailor server` and `fedtailor silo` start the engine
    write(kit / ABOUT, said)
    owners_alone(kit)
