"""Kits over Flower: names are checked before anything is written; what is written is private and lies in the kit alone."""

from __future__ import annotations

import datetime
import os
import ssl
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from commands import Command, fails
from fedtailor.engines import courier, flower, flower_kit
from fedtailor.engines import kit as kits
from fedtailor.errors import UserError


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "../x"}, "name = '../x'"),
        ({"server": "fl.example:0"}, "HOST:PORT"),
        ({"silos": ["north", "../up"]}, "silo = '../up'"),
        ({"silos": ["north", "authority"]}, "silo = 'authority': reserved"),
        ({"days": 0}, "a day at least"),
    ],
)
def test_a_bad_setting_is_told_before_anything_is_written(change: dict[str, object], told: str, tmp_path: Path) -> None:
    given = {"name": "demo", "server": "fl.example:8002", "silos": ["north"], "days": 10} | change
    with pytest.raises(UserError, match=told):
        flower_kit.init(tmp_path / "fed", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "fed").exists()


def test_without_flower_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedtailor\[flower\]'"):
        flower_kit.init(tmp_path / "fed", "demo", "fl.example:8002", ["north"])
    assert not (tmp_path / "fed").exists()


def test_an_engine_that_is_none_is_refused(fedtailor: Command) -> None:
    given = ("--server", "fl.example:8002", "--silo", "north")
    fails(fedtailor("federation", "init", "fed", "--engine", "flowr", *given), 2, "'flowr'", "did you mean 'flower'?")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedtailor[flower]'")
    folder = tmp_path_factory.mktemp("f") / "fed"
    return flower_kit.init(folder, "demo", "fl.example:8002", ["north", "south"], 730)


def test_each_participant_has_its_own_kit(kit: dict[str, Path]) -> None:
    assert sorted(path.name for path in kit["server"].parent.iterdir()) == ["authority", "north", "server", "south"]
    assert kits.about(kit["server"], "server")["silos"] == ["north", "south"]
    assert kits.about(kit["north"], "silo")["silo"] == "north"
    assert tomllib.loads((kit["north"] / "silo.toml").read_text())["name"] == "north"
    assert kits.engine(kit["north"], "silo").__name__ == "fedtailor.engines.flower"


def test_no_silo_holds_what_another_participant_signs_with(kit: dict[str, Path]) -> None:
    keys = {who: sorted(path.name for path in folder.rglob("*.key")) for who, folder in kit.items()}
    assert keys == {"server": ["server.key"], "north": ["node.key"], "south": ["node.key"]}
    assert (kit["server"].parent / "authority" / "ca.key").exists()


def test_the_server_knows_each_silo_by_its_key(kit: dict[str, Path]) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

    for silo in ("north", "south"):
        mine = load_ssh_private_key((kit[silo] / "startup" / "node.key").read_bytes(), None).public_key()
        assert load_ssh_public_key((kit["server"] / "nodes" / f"{silo}.pub").read_bytes()) == mine


def test_kits_are_readable_by_their_owner_alone(kit: dict[str, Path]) -> None:
    for who, folder in kit.items():
        flower_kit.settle(folder, "127.0.0.1:8003" if who == "server" else "")
    root = kit["server"].parent
    before = os.umask(0)  # as lax as it can be
    try:
        made = flower_kit.init(root.with_name("lax"), "demo", "fl.example:8002", ["north"])["server"].parent
    finally:
        os.umask(before)
    for folder in (root, made):
        assert [path for path in [folder, *folder.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_certificates_are_valid_as_long_as_asked_and_for_the_host_as_silos_reach_it(kit: dict[str, Path]) -> None:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    found = {path.name: x509.load_pem_x509_certificate(path.read_bytes()) for path in kit["server"].rglob("*.crt")}
    for one in found.values():
        assert 729 <= (one.not_valid_after_utc - now).total_seconds() / 86400 <= 730
    names = found["server.crt"].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example", "localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    found["server.crt"].verify_directly_issued_by(found["ca.crt"])
    ssl.create_default_context(cafile=str(kit["north"] / "startup" / "ca.crt"))


def test_flowers_commands_are_told_to_be_quiet_and_to_find_no_other_app_runner(
    kit: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_DATABASE", "elsewhere")
    found = flower_kit.settle(kit["north"])
    assert {name: value for name, value in found.items() if name.startswith("FLWR_")} == {
        "FLWR_HOME": str(kit["north"] / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }
    assert found["PATH"] == str(kit["north"] / "flower" / "bin")
    assert sorted(path.name for path in Path(found["PATH"]).iterdir()) == ["flwr-clientapp", "flwr-serverapp"]


def test_a_kits_secret_stays_the_same_and_is_its_own(kit: dict[str, Path]) -> None:
    secrets = []
    for silo in ("north", "north", "south"):
        flower_kit.settle(kit[silo])
        secrets.append((kit[silo] / "flower" / "secret").read_bytes())
    assert secrets[0] == secrets[1] != secrets[2]
    assert len(secrets[0]) == 32


def test_the_silos_end_does_without_torch(kit: dict[str, Path]) -> None:
    """It is started for each message."""
    code = "import sys, fedtailor.engines.flower_ends; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_finds_its_courier_by_the_servers_kit(kit: dict[str, Path]) -> None:
    with courier.of(kit["server"]) as found:
        assert type(found).__name__ == "Flower"
        assert found.silos == ("north", "south")


def test_a_body_that_flower_cannot_carry_is_refused_and_told(kit: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtailor.engines.flower.LIMIT", 10)
    with courier.of(kit["server"]) as found:
        for answer in found.exchange(("north", "south"), {"kind": "ask"}, b"x" * 11, 5.0):
            assert answer.head == {"kind": "refused", "why": "a request of 11 bytes; Flower carries 10 at most: use NVFlare"}


def test_a_server_that_was_never_started_is_named(kit: dict[str, Path], tmp_path: Path) -> None:
    fresh = flower_kit.init(tmp_path / "fed", "demo", "fl.example:8002", ["north"])["server"]
    with courier.of(fresh) as found:
        (answer,) = found.exchange(("north",), {"kind": "hello"}, b"", 5.0)
    assert "was never started" in answer.lost


@pytest.mark.engines
def test_a_kit_is_found_by_a_relative_path_and_what_flower_says_is_one_line(
    kit: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's command runs in the kit: below it, such a path led to a folder of its own, which it made."""
    flower_kit.settle(kit["server"], "127.0.0.1:9")  # nobody listens there
    folder = kit["server"].parent
    monkeypatch.chdir(folder.parent)
    with pytest.raises(flower.Lost, match=r"SuperLink is unavailable.*is `fedtailor server` running\?$") as lost:
        flower.seen(kit["server"].relative_to(folder.parent))
    assert str(lost.value).isprintable()
    assert not (kit["server"] / folder.name).exists()
