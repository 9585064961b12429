"""Kits: names are checked before anything is written; what is written is strict, private and lies in the kit alone."""

from __future__ import annotations

import datetime
import json
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from fedtailor.engines import courier, nvflare, nvflare_kit
from fedtailor.engines.nvflare import NVFlare
from fedtailor.errors import UserError

BAD_SILOS = ["../up", "a/b", "", ".", "..", "-a", "a b", "a\n", "ä", "a" * 51, "server", "Admin", "authority", "fl.example"]


@pytest.mark.parametrize("silo", BAD_SILOS)
def test_a_bad_name_is_refused_before_anything_is_written(silo: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="silo = "):
        nvflare_kit.init(tmp_path / "fed", "demo", "fl.example:8002", ["north", silo])
    assert not (tmp_path / "fed").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "../x"}, "name = '../x'"),
        ({"server": "fl.example"}, "HOST:PORT"),
        ({"server": "fl.example:0"}, "HOST:PORT"),
        ({"server": "fl.example:70000"}, "HOST:PORT"),
        ({"server": "a b:8002"}, "HOST:PORT"),
        ({"silos": []}, "no silo is named"),
        ({"silos": ["north", "North"]}, "named more than once"),
        ({"days": 0}, "a day at least"),
    ],
)
def test_a_bad_setting_is_told_with_its_value(change: dict[str, object], told: str, tmp_path: Path) -> None:
    given = {"name": "demo", "server": "fl.example:8002", "silos": ["north"], "days": 10} | change
    with pytest.raises(UserError, match=told):
        nvflare_kit.init(tmp_path / "fed", **given)  # type: ignore[arg-type]


def test_all_errors_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        nvflare_kit.init(tmp_path, "a/b", "nowhere", ["x y", "server"], 0)
    assert len(str(raised.value).splitlines()) == 5


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        nvflare_kit.init(tmp_path, "demo", "fl.example:8002", ["north"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_nvflare_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedtailor\[nvflare\]'"):
        nvflare_kit.init(tmp_path / "fed", "demo", "fl.example:8002", ["north"])
    assert not (tmp_path / "fed").exists()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    return nvflare_kit.init(tmp_path_factory.mktemp("f") / "fed", "demo", "fl.example:8002", ["north", "south"], 730)


def test_each_participant_has_its_own_kit(kits: dict[str, Path]) -> None:
    assert sorted(path.name for path in kits["server"].parent.iterdir()) == ["authority", "north", "server", "south"]
    assert nvflare_kit.about(kits["server"], "server")["silos"] == ["north", "south"]
    assert nvflare_kit.about(kits["north"], "silo")["silo"] == "north"
    with pytest.raises(UserError, match="not the kit of a server"):
        nvflare_kit.about(kits["north"], "server")
    with pytest.raises(UserError, match="no kit of a federation"):
        nvflare_kit.about(kits["north"].parent, "silo")


def test_what_carries_alone_does_without_torch() -> None:
    """NVFlare's processes import it: 200 MB and 2 s each."""
    code = "import sys, fedtailor.engines.courier, fedtailor.engines.nvflare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_silo_holds_what_another_participant_signs_with(kits: dict[str, Path]) -> None:
    for silo in ("north", "south"):
        keys = [path.relative_to(kits[silo]).as_posix() for path in kits[silo].rglob("*.key")]
        assert keys == ["startup/client.key"]
    assert not [path for kit in kits.values() for path in kit.rglob("cert.json")]  # the authority's


def test_kits_are_readable_by_their_owner_alone(kits: dict[str, Path]) -> None:
    root = kits["server"].parent
    assert [path for path in [root, *root.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


@pytest.mark.parametrize("kit", ["server", "north"])
def test_the_rules_are_strict(kit: str, kits: dict[str, Path]) -> None:
    rules = json.loads((kits[kit] / "local" / "authorization.json").read_text())["permissions"]
    for role, rights in rules.items():
        for right in ("byoc", "shell_commands", "server-predeployed-flwr", "download_job", "operate"):
            assert rights[right] == "none", (role, right)
        assert rights["submit_job"] == ("any" if role == "project_admin" else "none")
    table = json.loads((kits[kit] / "local" / "resources.json").read_text())
    assert table["class_list_enforcement_mode"] == "enforce"
    assert sorted(table["class_allow_list"]) == sorted(nvflare_kit.CLASSES["server" if kit == "server" else "silo"])
    assert table["allow_log_streaming"] is False
    assert not [one for one in table["components"] if "log" in one["id"]]


def test_the_servers_storage_lies_in_its_kit_wherever_that_is(kits: dict[str, Path]) -> None:
    nvflare_kit.settle(kits["server"], "server")
    text = (kits["server"] / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in text
    assert text.count(f'"{kits["server"]}/') == 2


def test_certificates_are_valid_as_long_as_asked(kits: dict[str, Path]) -> None:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    for path in [*kits["server"].rglob("*.crt"), *kits["north"].rglob("*.crt"), *kits["north"].rglob("*.pem")]:
        left = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc - now
        assert 729 <= left.total_seconds() / 86400 <= 730, path


def test_the_workers_socket_is_named_on_the_silos_side(kits: dict[str, Path]) -> None:
    assert nvflare_kit.worker_socket(kits["south"]) == kits["south"] / "silo" / "worker.sock"
    (kits["south"] / "local" / "worker").write_text("/run/elsewhere/worker.sock\n")
    assert nvflare_kit.worker_socket(kits["south"]) == Path("/run/elsewhere/worker.sock")


def test_a_run_finds_its_courier_by_the_servers_kit(kits: dict[str, Path]) -> None:
    assert (kits["server"] / "federation.toml").read_text() == 'engine = "nvflare"\n'
    found = courier.of(kits["server"])
    assert isinstance(found, NVFlare)
    assert found.silos == ("north", "south")
    found.close()


def test_a_server_lets_in_more_silos_than_nvflares_hundred(kits: dict[str, Path]) -> None:
    (server,) = json.loads((kits["server"] / "startup" / "fed_server.json").read_text())["servers"]
    assert server["max_num_clients"] == nvflare_kit.MOST > 100


def test_what_ended_jobs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    server, silo, jobs = tmp_path / "server", tmp_path / "silo", [str(uuid.uuid4()) for _ in range(4)]
    states = dict(zip(jobs, ("FINISHED:COMPLETED", "FINISHED:ABORTED", "SUBMITTED", None), strict=True))
    for job, status in states.items():
        for folder in (server / job, server / "jobs" / job, silo / job):
            folder.mkdir(parents=True)
            (folder / "log.txt").touch()
        if status is not None:
            (server / "jobs" / job / "meta").write_text(json.dumps({"job_id": job, "status": status}))
    for kit in (server, silo):
        for name in ("local", "silo", "spool", f"{jobs[0]}-mine", "a-b-c-d-e"):
            (kit / name).mkdir()
        (kit / str(uuid.uuid4())).symlink_to(kit / "silo")
        (kit / str(uuid.uuid4())).write_text("a file")
    (server / "jobs" / "mine").mkdir()
    (lost := server / str(uuid.uuid4())).mkdir()  # jobs/ does not know it any more
    before = {*server.rglob("*"), *silo.rglob("*")}
    nvflare.sweep(server)
    nvflare.sweep(silo)
    gone = [server / job for job in jobs[:2]] + [server / "jobs" / job for job in jobs[:2]] + [silo / job for job in jobs]
    kept = {path for path in before if not any(path == one or one in path.parents for one in [*gone, lost])}
    assert {*server.rglob("*"), *silo.rglob("*")} == kept
