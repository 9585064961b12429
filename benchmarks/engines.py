"""What the distributed engines cost: our way over each beside the engine alone, on this machine, three silos, mutual TLS.

    python benchmarks/engines.py [--engine nvflare] [--engine flower] [--megabytes 500] [--repeats 20]

    trivial   median seconds of an exchange of a few bytes with all silos
    large     seconds of one exchange of a large body there and back with all silos, a tenth of it over Flower
    peak      the most memory in MB that any process took in it
    loads     base models loaded in each worker over ten rounds of experiments/tiny.toml
    deadline  seconds of each round where ten silos are asked, three of them sleep a minute, and the deadline is five

Exit code 1 where a target is missed: one load a worker, 1.5 GB in any process of ours, 0.1 s over NVFlare, 6 s with deadline 5.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "experiments" / "tiny.toml"
FEDTAILOR = [sys.executable, "-c", "from fedtailor.cli import main; main()"]
SILOS = ("cafe", "clinic", "shop")
ROUNDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", choices=["nvflare", "flower"], dest="engines")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)  # a kit: be the server program over it
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.program:
        print(json.dumps(measured(given.program, given.repeats, given.megabytes)))
        return
    print(f"{'':<16}{'trivial s':>10}{'large MB':>10}{'large s':>9}{'peak MB':>9}  {'of what':<20}loads")
    missed: list[str] = []
    for engine in given.engines or ["nvflare", "flower"]:
        slow = engine == "flower"
        repeats, megabytes = (max(1, given.repeats // 4), given.megabytes // 10) if slow else (given.repeats, given.megabytes)
        with federation(engine) as kits:
            found = ours(kits, repeats, megabytes)
        told(f"ours, {engine}", found, megabytes)
        missed += [f"{engine}: a base was loaded more than once"] if set(found["loads"].values()) != {1} else []
        missed += [f"{engine}: a process took over 1.5 GB"] if max(found["peaks"].values()) > 1500 else []
        missed += [f"{engine}: a trivial exchange took over 0.1 s"] if not slow and found["trivial"] > 0.1 else []
        told(f"{engine} alone", (flower_alone if slow else nvflare_alone)(repeats, megabytes), megabytes)
    took = stragglers()
    print(f"deadline 5 s, three of ten asleep: rounds of {', '.join(f'{s:.2f}' for s in took)} s")
    missed += ["a round took longer than 6 s"] if max(took) > 6 else []
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


def told(name: str, found: dict[str, Any], megabytes: int) -> None:
    who, peak = max(found["peaks"].items(), key=lambda item: item[1])
    loads = " ".join(map(str, found.get("loads", {}).values()))
    print(f"{name:<16}{found['trivial']:>10.3f}{megabytes:>10}{found['large']:>9.1f}{peak:>9.0f}  {who:<20}{loads}")
    print("    peaks in MB: " + ", ".join(f"{who} {peak:.0f}" for who, peak in sorted(found["peaks"].items())), flush=True)


@contextlib.contextmanager
def federation(engine: str, change: Callable[[Path], None] = lambda kits: None) -> Iterator[Path]:
    """The kits of one that runs: `fedtailor server`, and `fedtailor silo` for each silo. `change`: done with the kits before."""
    running = []
    with tempfile.TemporaryDirectory(prefix="ft", dir=os.environ.get("FEDTAILOR_BENCH_DIR")) as folder:
        kits = Path(folder) / "kits"
        init = ["federation", "init", str(kits), "--server", f"localhost:{free_port()}", "--engine", engine]
        subprocess.run([*FEDTAILOR, *init, *(f"--silo={silo}" for silo in SILOS)], check=True, stdout=subprocess.DEVNULL)
        for silo in SILOS:
            file = kits / silo / "silo.toml"
            file.write_text(f'allow = ["echoing"]\nserver_names_data = true\n{file.read_text()}')
        change(kits)
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


def ours(kits: Path, repeats: int, megabytes: int) -> dict[str, Any]:
    """In a program of its own, as `fedtailor run` is."""
    sizes = ["--megabytes", str(megabytes), "--repeats", str(repeats)]
    command = [sys.executable, __file__, "--program", str(kits / "server"), *sizes]
    with watched(kits) as peaks:
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "peaks": {**peaks, **found["peaks"]}}


def nvflare_alone(repeats: int, megabytes: int) -> dict[str, Any]:
    import bare_nvflare

    with federation("nvflare", bare_nvflare.permit) as kits, watched(kits) as peaks:
        found = bare_nvflare.measured(kits, SILOS, repeats, megabytes * 10**6)
    return {**found, "peaks": {who: peak for who, peak in peaks.items() if who != "worker"}}


def flower_alone(repeats: int, megabytes: int) -> dict[str, Any]:
    import bare_flower

    with tempfile.TemporaryDirectory(prefix="ft") as name:
        folder = Path(name)
        with bare_flower.running(folder, len(SILOS)), watched(folder) as peaks:
            found = bare_flower.measured(folder, len(SILOS), repeats, megabytes * 10**6)
    return {**found, "peaks": peaks}


def measured(kit: Path, repeats: int, megabytes: int) -> dict[str, Any]:
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
        for _ in range(repeats):
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
        body = Blob({f"t{i}": torch.rand(megabytes * 250_000 // count) for i in range(count)})
        began = time.perf_counter()
        for reply in one.reach(1)(echo, body):
            assert all(torch.equal(reply.body.tensors[name], tensor) for name, tensor in body.tensors.items()), reply.silo
            del reply  # as `Reach.total`: a large one is not held while the next one is read
        large, most = time.perf_counter() - began, peak.megabytes()
        assert one.rejected == [], one.rejected
        experiment.run(spec, engine("rounds"))
        after = engine("after")
        after._open(SILOS, 60, {})
    loads = {silo: found.loads for silo, found in after.opened.items()}
    return {"trivial": statistics.median(took), "large": large, "peaks": {"server program": most}, "loads": loads}


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[dict[str, float]]:
    """The highest resident memory of every kind of process that works in this folder, in MB, while this lasts."""
    import psutil

    peaks: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in psutil.process_iter(["cmdline", "cwd"]):
                line = process.info["cmdline"] or []
                here = str(folder) in str(process.info["cwd"]) or any(str(folder) in word for word in line)
                if here and not any("--program" in word for word in line):
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


KINDS = {
    "server_train": "server", "client_train": "silo's engine", "runner_process": "server's job",
    "worker_process": "silo's job", "silo": "worker", "flower_gate": "gate",
    "flower-superlink": "superlink", "flower-supernode": "supernode", "flower-superexec": "superexec",
    "flwr-serverapp": "serverapp", "flwr-clientapp": "clientapp",
}  # fmt: skip


def kind(line: list[str]) -> str:
    """What a process of a federation is, by its command."""
    words = (word.rpartition(".")[2].rpartition("/")[2] for word in line)
    return next((KINDS[word] for word in words if word in KINDS), "other")


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
            worker.desks["run"] = Desk(name, SiloData((), (), ()), {}, 0)
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
