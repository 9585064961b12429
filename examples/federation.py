"""A whole federation on this machine: a server and silos, each a process, over mutual TLS; one run; everything stopped.

    python examples/federation.py experiments/tiny.toml --silo cafe --silo clinic --silo shop --set 'data.labels=["bad", "good"]'

What docs/federation.md does between organisations, with the same commands. `--silo NAME=ROWS` gives a silo a file of its own;
without, it takes its rows from the experiment's data. Needs fedtailor[nvflare].
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

FEDTAILOR = [sys.executable, "-c", "from fedtailor.cli import main; main()"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--silo", action="append", required=True, dest="silos", metavar="NAME[=ROWS]")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--out", type=Path, help="the run's folder")
    given = parser.parse_args()
    rows = {name: source for name, _, source in (silo.partition("=") for silo in given.silos)}
    with tempfile.TemporaryDirectory(prefix="ft") as folder:  # a short path: sockets lie in it
        kits = Path(folder) / "kits"
        init = ["federation", "init", str(kits), "--server", f"localhost:{free_port()}"]
        subprocess.run([*FEDTAILOR, *init, *(f"--silo={silo}" for silo in rows)], check=True)
        for silo in (silo for silo, source in rows.items() if not source):  # it takes its own of the experiment's rows
            file = kits / silo / "silo.toml"
            file.write_text(f"server_names_data = true\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
        running: list[subprocess.Popen[bytes]] = []
        try:
            running.append(start(kits / "server", "server"))
            for silo, source in rows.items():
                running.append(start(kits / silo, "silo", *([f"--data={source}"] if source else [])))
            run = ["run", str(given.experiment), "--federation", str(kits / "server"), *(f"--set={s}" for s in given.sets)]
            run += [f"--out={given.out}"] if given.out else []
            return subprocess.run([*FEDTAILOR, *run]).returncode
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()


def start(kit: Path, what: str, *more: str) -> subprocess.Popen[bytes]:
    """`fedtailor server KIT` or `fedtailor silo KIT --data ROWS`, its log in the kit."""
    with (kit / "process.log").open("w") as log:
        return subprocess.Popen([*FEDTAILOR, what, str(kit), *more], stdout=log, stderr=log)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
