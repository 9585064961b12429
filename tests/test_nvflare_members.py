"""Silos that join later or leave, and new certificates: first on the kits alone, then at a server that runs."""

from __future__ import annotations

import datetime
import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from background import Background, free_port, left, trusting, wait_for
from commands import LABELLED, PROCESS, SLIM, TINY, Command, fails
from fedtailor.engines import nvflare_admin, nvflare_kit, nvflare_members, standing
from fedtailor.engines.keeping import locked
from fedtailor.errors import UserError

x509 = pytest.importorskip("cryptography.x509", reason="comes with NVFlare: pip install 'fedtailor[nvflare]'")


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    nvflare_kit.init(tmp_path / "kits", "demo", "fl.example:8002", ["north", "south"], 100)
    return tmp_path / "kits"


def days_left(certificate: Path) -> float:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    return (found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400


def signed(certificate: Path, root: Path) -> bool:
    one, by = (x509.load_pem_x509_certificate(path.read_bytes()) for path in (certificate, root))
    try:
        one.verify_directly_issued_by(by)
    except Exception:
        return False
    return True


def startups(kits: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in kits.rglob("*") if "startup" in path.parts and path.is_file()}


def test_a_silo_that_joins_changes_no_other_kit(kits: Path, fedtailor: Command) -> None:
    before = startups(kits)
    ended = fedtailor("federation", "add", kits, "--silo", "west")
    assert ended.code == 0, ended
    assert "A running server lets west in as it is." in ended.out
    assert {path: data for path, data in startups(kits).items() if path in before} == before
    assert nvflare_kit.about(kits / "server", "server")["silos"] == ["north", "south", "west"]
    assert nvflare_kit.about(kits / "west", "silo") == {"name": "demo", "silo": "west", "server": "fl.example:8002"}
    assert signed(kits / "west" / "startup" / "client.crt", kits / "north" / "startup" / "rootCA.pem")
    assert 99 <= days_left(kits / "west" / "startup" / "client.crt") <= 100


def test_its_kit_is_as_strict_and_as_private_as_the_first_ones(kits: Path) -> None:
    made = nvflare_members.add(kits, "west", 10)
    assert 9 <= days_left(made / "startup" / "client.crt") <= 10
    for name in ("authorization.json", "resources.json"):
        assert (made / "local" / name).read_text() == (kits / "north" / "local" / name).read_text()
    assert sorted(path.name for path in made.rglob("*.key")) == ["client.key"]
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in (kits / "north").iterdir())
    assert [path for path in kits.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
    assert sorted(path.name for path in kits.iterdir()) == ["authority", "north", "server", "south", "west"]


@pytest.mark.parametrize(
    ("silo", "days", "told"),
    [
        ("../up", None, "letters, digits, - and _ only"),
        ("server", None, "reserved"),
        ("NORTH", None, "is in this federation already"),
        ("west", 0, "a day at least"),
        ("west", 101, "own certificate ends on .*; leave --days out, or renew first: `fedtailor federation renew"),
        ("taken", None, "is there already"),
    ],
)
def test_what_cannot_be_added_is_told_and_changes_nothing(silo: str, days: int | None, told: str, kits: Path) -> None:
    (kits / "taken").mkdir(mode=0o700)
    before = {path: path.read_bytes() for path in kits.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=told):
        nvflare_members.add(kits, silo, days)
    assert {path: path.read_bytes() for path in kits.rglob("*") if path.is_file() and path.name != ".members"} == before


def test_without_the_authority_it_is_said_what_is_missing(kits: Path) -> None:
    shutil.rmtree(kits / "authority")
    with pytest.raises(UserError, match=r"authority/cert.json: No such file or directory; it signs certificates: bring back"):
        nvflare_members.add(kits, "west")
    with pytest.raises(UserError, match="authority"):
        nvflare_members.renew(kits)


@pytest.mark.parametrize("words", [["add", "--silo", "west"], ["remove", "--silo", "north"], ["renew"]])
def test_another_engines_kits_are_left_alone(words: list[str], kits: Path, fedtailor: Command) -> None:
    about = nvflare_kit.about(kits / "server", "server")
    (kits / "server" / nvflare_kit.ABOUT).write_text(json.dumps({**about, "engine": "another"}))
    before = startups(kits)
    fails(fedtailor("federation", words[0], kits, *words[1:]), 2, "over another, whose members are fixed")
    assert startups(kits) == before


def test_one_command_at_a_time(kits: Path) -> None:
    with locked(kits / "server" / ".members", "x"), pytest.raises(UserError, match="another command works on these kits"):
        nvflare_members.add(kits, "west")


def test_an_add_that_was_cut_off_is_done_again(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nvflare_kit, "silos_kit", stop)
        with pytest.raises(KeyboardInterrupt):
            nvflare_members.add(kits, "west")
    assert nvflare_kit.about(kits / "server", "server")["silos"] == ["north", "south"]
    made = nvflare_members.add(kits, "west", 5)
    assert days_left(made / "startup" / "client.crt") <= 5
    assert sorted(path.name for path in kits.iterdir()) == ["authority", "north", "server", "south", "west"]


def test_who_leaves_is_kept_out_by_name(kits: Path, fedtailor: Command) -> None:
    ended = fedtailor("federation", "remove", kits, "--silo", "south")
    assert ended.code == 0
    assert f"stop the server and start it anew, which cuts south off: fedtailor server {kits / 'server'}" in ended.out
    assert nvflare_kit.about(kits / "server", "server")["silos"] == ["north"]
    assert json.loads((kits / "server" / "disabled_clients.json").read_text()) == {"disabled_clients": ["south"]}
    fails(fedtailor("federation", "add", kits, "--silo", "South"), 2, "was removed")
    fails(fedtailor("federation", "remove", kits, "--silo", "suoth"), 2, "not in this federation")
    fails(fedtailor("federation", "remove", kits, "--silo", "north"), 2, "is the only one")
    nvflare_members.add(kits, "west")
    nvflare_members.remove(kits, "north")
    assert nvflare_members.removed(kits / "server") == ["north", "south"]


def test_new_certificates_go_together_with_the_old_ones(kits: Path, fedtailor: Command) -> None:
    shutil.rmtree(kits / "south")  # it was handed over
    (kits / "north" / "silo.toml").write_text('name = "north"\nbody_limit = 7\n')
    old, begun = kits.parent / "old", startups(kits)
    shutil.copytree(kits, old)
    ended = fedtailor("federation", "renew", kits, "--days", "400")
    assert ended.code == 0, ended
    assert [line.split(": ")[0] for line in ended.out.splitlines()][:3] == ["server", "north", "south"]
    assert f"south: {kits / 'south' / 'startup' / 'client.crt'}, {kits / 'south' / 'startup' / 'rootCA.pem'}\n" in ended.out
    clients = ("server/admin/startup", "north/startup", "south/startup")
    for place, name in [("server/startup", "server"), *((place, "client") for place in clients)]:
        assert 399 <= days_left(kits / place / f"{name}.crt") <= 400
        assert 399 <= days_left(kits / place / "rootCA.pem") <= 400
        certificate = kits / place / f"{name}.crt"
        assert signed(certificate, old / "north" / "startup" / "rootCA.pem"), "old silos know the new server"
    assert signed(old / "north" / "startup" / "client.crt", kits / "server" / "startup" / "rootCA.pem"), "and it knows them"
    assert "body_limit = 7" in (kits / "north" / "silo.toml").read_text()
    assert [path for path in kits.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
    now = startups(kits)
    assert {path.relative_to(kits) for path in now if now[path] != begun.get(path)} == {
        Path(place) / name for place in clients for name in ("client.crt", "rootCA.pem")
    } | {Path("server/startup/server.crt"), Path("server/startup/rootCA.pem")}, "keys stay"
    nvflare_members.add(kits, "west")
    assert days_left(kits / "west" / "startup" / "client.crt") > 399, "who joins later gets the new end"
    nvflare_members.renew(kits, 30)
    assert days_left(kits / "west" / "startup" / "client.crt") < 31


@pytest.fixture
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Background]:
    """A server with north, south to come, in folder/kits."""
    folder = tmp_path_factory.mktemp("f")
    nvflare_kit.init(folder / "kits", "demo", f"localhost:{free_port()}", ["cafe", "clinic"], 30)
    for silo in ("cafe", "clinic"):
        trusting(folder / "kits" / silo)
    with Background(folder) as made:
        for words in (("server", "kits/server"), ("silo", "kits/cafe"), ("silo", "kits/clinic")):
            made.start(*words)
        yield made
    assert left(folder) == []


def connected(kits: Path) -> list[str]:
    try:
        return sorted(nvflare_admin.look(kits / "server"))
    except nvflare_admin.Lost:
        return []


@pytest.mark.engines
def test_a_server_that_runs_lets_in_who_joins_and_a_resumed_run_asks_it(running: Background, fedtailor: Command) -> None:
    import subprocess

    kits, out = running.folder / "kits", running.folder / "out"
    assert wait_for(lambda: connected(kits) == ["cafe", "clinic"], 90)
    words = ["run", TINY, "--federation", "kits/server", "--out", "out", "--set", LABELLED, "--set", "rounds=40"]
    words += ["--set", 'rows=["federated"]']
    running.start(*words)

    def far() -> bool:
        known = standing.read(kits / "server")
        return known is not None and known.get("round", 0) >= 2

    assert wait_for(far, 120), running.log(" ".join(map(str, words))).read_text()
    assert "federated, round " in fedtailor("status", kits / "server").out
    program = running.running.pop(" ".join(map(str, words)))
    program.kill()
    program.wait()
    told = fedtailor("status", kits / "server").out.splitlines()[0]
    assert "stopped (federated, round" in told
    assert fedtailor("federation", "add", kits, "--silo", "shop").code == 0
    trusting(kits / "shop")
    running.start("silo", "kits/shop")
    assert wait_for(lambda: connected(kits) == ["cafe", "clinic", "shop"], 90), "the server was not started anew"
    resume = [*PROCESS, *told.partition("fedtailor ")[2].split()]
    done = subprocess.run(resume, cwd=running.folder, env=SLIM, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line).get("silos", []) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert asked[1] == ["cafe", "clinic"]
    assert asked[-1] == ["cafe", "clinic", "shop"]


@pytest.mark.engines
def test_who_was_removed_is_not_let_in_and_old_certificates_are(running: Background) -> None:
    kits = running.folder / "kits"
    assert wait_for(lambda: connected(kits) == ["cafe", "clinic"], 90)
    nvflare_members.remove(kits, "clinic")
    shutil.copytree(kits / "cafe" / "startup", running.folder / "old")
    nvflare_members.renew(kits, 60)
    shutil.rmtree(kits / "cafe" / "startup")
    (running.folder / "old").rename(kits / "cafe" / "startup")  # this silo has not changed its kit yet
    running.stop("server kits/server")
    running.start("server", "kits/server")
    assert wait_for(lambda: connected(kits) == ["cafe"], 90)
    running.stop("silo kits/clinic")
    running.start("silo", "kits/clinic")  # it tries again
    log = kits / "server" / "log.txt"
    assert wait_for(lambda: "Reject disabled client registration: clinic" in log.read_text(), 90), "in vain"
    assert connected(kits) == ["cafe"]
