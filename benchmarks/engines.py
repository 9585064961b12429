"""What the distributed engines cost: our way over each beside the engine alone, on this machine, three silos, mutual TLS.

    python benchmarks/engines.py [--engine nvflare] [--megabytes 500] [--repeats 20]

    trivial      median milliseconds of an exchange of a few bytes with all silos
    there, back  seconds of one exchange of a large body with all silos, and the most memory that any process took in it
    loads        base models loaded in each worker over ten rounds of experiments/tiny.toml
    deadline     seconds of each round where ten silos are asked, three of them sleep a minute, and the deadline is five

Our workers are real ones, with a base model and rows; the large body is read and written by them. The engine alone sends
bytes from and to its own processes, with no worker behind. Needs the engine's extra.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "experiments" / "tiny.toml"
FEDTAILOR = [sys.executable, "-c", "from fedtailor.cli import main; main()"]
SILOS = ("cafe", "clinic", "shop")
ROUNDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=["nvflare"], dest="engines")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)  # a kit: be the server program over it
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.program:
        print(json.dumps(measured(given.program, given)))
        return
    print(f"{'':<20}{'trivial ms':>11}{f'{given.megabytes} MB s':>10}{'peak MB':>9}  of what{'':<14}loads")
    for engine in given.engines or ["nvflare"]:
        with federation(engine) as kits:
            told(f"{engine}, ours", ours(kits, given))
        with federation(engine, alone=True) as kits:
            told(f"{engine} alone", alone(kits, given))
    print(f"deadline 5 s, three of ten asleep: rounds of {', '.join(f'{s:.2f}' for s in stragglers())} s")


def told(name: str, found: dict[str, Any]) -> None:
    who, peak = max(found["peaks"].items(), key=lambda item: item[1])
    loads = " ".join(map(str, found.get("loads", {}).values()))
    print(f"{name:<20}{1000 * found['trivial']:>11.0f}{found['large']:>10.1f}{peak:>9.0f}  {who:<21}{loads}")
    print(f"{'':<20}peaks in MB: " + ", ".join(f"{who} {peak:.0f}" for who, peak in sorted(found["peaks"].items())), flush=True)


@contextlib.contextmanager
def federation(engine: str, alone: bool = False) -> Iterator[Path]:
    """The kits of one that runs: `fedtailor server`, and `fedtailor silo` for each silo."""
    running = []
    with tempfile.TemporaryDirectory(prefix="ft", dir=os.environ.get("FEDTAILOR_BENCH_DIR")) as folder:
        kits = Path(folder) / "kits"
        init = ["federation", "init", str(kits), "--server", f"localhost:{free_port()}"]
        subprocess.run([*FEDTAILOR, *init, *(f"--silo={silo}" for silo in SILOS)], check=True, stdout=subprocess.DEVNULL)
        for silo in SILOS:
            file = kits / silo / "silo.toml"
            file.write_text(f'allow = ["echoing"]\n{file.read_text()}')
        if alone:
            permit(kits)
        try:
            for what, kit in [("server", "server"), *(("silo", silo) for silo in SILOS)]:
                with (kits / kit / "process.log").open("w") as log:
                    running.append(subprocess.Popen([*FEDTAILOR, what, str(kits / kit)], stdout=log, stderr=log))
            yield kits
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()


def ours(kits: Path, given: argparse.Namespace) -> dict[str, Any]:
    """In a program of its own, as `fedtailor run` is."""
    sizes = ["--megabytes", str(given.megabytes), "--repeats", str(given.repeats)]
    command = [sys.executable, __file__, "--program", str(kits / "server"), *sizes]
    with watched(kits) as peaks:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "peaks": {**peaks, **found["peaks"]}}


def measured(kit: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What the server program sees."""
    import torch
    from echoing import Blob, echo

    from fedtailor import experiment, peak, wire
    from fedtailor.engines import courier
    from fedtailor.engines.remote import Remote
    from fedtailor.engines.worker import Open

    wire.allow("echoing")
    torch.set_num_threads(1)
    spec = experiment.load(TINY, [f"rounds={ROUNDS}", f"evaluate.every={ROUNDS}"])
    with courier.of(kit) as reached:
        while [a for a in reached.exchange(SILOS, {"kind": "hello"}, b"", 60) if a.lost]:
            time.sleep(0.5)
        took = []
        for _ in range(given.repeats):
            began = time.perf_counter()
            assert not [a for a in reached.exchange(SILOS, {"kind": "hello"}, b"", 60) if a.lost]
            took.append(time.perf_counter() - began)

        def engine(run: str) -> Remote:
            opening = Open(run, 0, spec.data, spec.model, spec.silo, 1)
            return Remote(reached, opening, rounds=ROUNDS, deadline=600.0, spool=kit / "spool")

        one = engine("large")
        one._open(SILOS, 60, {})
        peak.reset()
        count = 8
        body = Blob({f"t{i}": torch.rand(given.megabytes * 250_000 // count) for i in range(count)})
        began = time.perf_counter()
        for reply in one.reach(1)(echo, body):
            assert all(torch.equal(reply.body.tensors[name], tensor) for name, tensor in body.tensors.items()), reply.silo
        large, most = time.perf_counter() - began, peak.megabytes()
        assert one.rejected == [], one.rejected
        experiment.run(spec, engine("rounds"))
        after = engine("after")
        after._open(SILOS, 60, {})
    loads = {silo: found.loads for silo, found in after.opened.items()}
    return {"trivial": statistics.median(took), "large": large, "peaks": {"server program": most}, "loads": loads}


def permit(kits: Path) -> None:
    """NVFlare's own classes for its own job, in the kits of this measurement alone."""
    for kit in kits.iterdir():
        if (kit / "local").is_dir():
            file = kit / "local" / "resources.json"
            table = json.loads(file.read_text())
            table["class_allow_list"] += ["bare_nvflare.BareServer", "bare_nvflare.BareSilo"]
            file.write_text(json.dumps(table))


def alone(kits: Path, given: argparse.Namespace) -> dict[str, Any]:
    from fedtailor.engines import nvflare_admin

    file = kits / "server" / "bare.json"
    spec = json.dumps({"file": str(file), "repeats": given.repeats, "bytes": given.megabytes * 10**6}).encode().hex()
    job = kits / "job" / "fedtailor"
    for name, table in nvflare_admin.job("0" * 16, SILOS).items():
        text = json.dumps(table)
        if "config_fed_server" in name:
            table["components"][0].update(path="bare_nvflare.BareServer", args={"spec": spec})
        elif "config_fed_client" in name:
            table["components"][0].update(path="bare_nvflare.BareSilo")
        text = json.dumps(table)
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text(text)
    with watched(kits) as peaks:
        submitted(kits / "server", job)
        end = time.monotonic() + 900
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.5)
    return {**json.loads(file.read_text()), "peaks": {who: peak for who, peak in peaks.items() if who != "worker"}}


def submitted(kit: Path, job: Path) -> None:
    from fedtailor.engines import nvflare_admin

    while True:
        with contextlib.suppress(Exception), contextlib.closing(nvflare_admin.login(kit)) as session:
            if len(nvflare_admin.connected(session)) == len(SILOS):
                session.submit_job(str(job))
                return
        time.sleep(1)


@contextlib.contextmanager
def watched(kits: Path) -> Iterator[dict[str, float]]:
    """The highest resident memory of every kind of process over these kits, in MB, while this lasts."""
    import psutil

    peaks: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in psutil.process_iter(["cmdline"]):
                line = process.info["cmdline"] or []
                if any(str(kits) in word for word in line) and not any("--program" in word for word in line):
                    with contextlib.suppress(OSError, StopIteration):
                        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                        high = next(int(row.split()[1]) for row in status if row.startswith("VmHWM:")) * 1024 / 1e6
                        who = kind(line)
                        peaks[who] = max(peaks.get(who, 0.0), high)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def kind(line: list[str]) -> str:
    """What a process of a federation is, by its command."""
    known = {
        "server_train": "server", "client_train": "silo's engine",
        "runner_process": "server's job", "worker_process": "silo's job",
        "silo": "worker",
    }  # fmt: skip
    found = (known[word.rpartition(".")[2]] for word in line if word.rpartition(".")[2] in known)
    return next(found, "other")


def stragglers() -> list[float]:
    """Ten workers on sockets, in threads; three sleep."""
    import torch
    from echoing import SLOW, Blob, sleepy

    from fedtailor import experiment, wire
    from fedtailor.data import SiloData
    from fedtailor.engines.courier import Sockets
    from fedtailor.engines.desk import Desk
    from fedtailor.engines.remote import Remote
    from fedtailor.engines.site import Site
    from fedtailor.engines.worker import Open, Opened, Worker

    wire.allow("echoing")
    names = tuple(f"silo_{i}" for i in range(10))
    spec, took = experiment.load(TINY), []
    with tempfile.TemporaryDirectory(prefix="ft") as folder:
        paths = {}
        for name in names:
            worker = Worker(Site(name, Path(folder) / name))
            worker.desks["run"], worker.rows["run"] = Desk(name, SiloData((), (), ()), {}, 0), ""
            up = threading.Event()
            threading.Thread(target=worker.serve, args=(up.set,), daemon=True).start()
            up.wait()
            paths[name] = worker.address
        engine = Remote(Sockets(paths), Open("run", 0, spec.data, spec.model), rounds=3, deadline=5.0)
        engine.opened = {name: Opened("0", "0", torch.__version__, 1) for name in names}
        for number in (1, 2, 3):
            began = time.monotonic()
            replies = list(engine.reach(number)(sleepy, Blob({})))
            took.append(time.monotonic() - began)
            assert [reply.silo for reply in replies] == [name for name in names if name not in SLOW]
            assert [silo for n, silo, _ in engine.rejected if n == number] == list(SLOW)
            engine.commit()
    return took


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main()
