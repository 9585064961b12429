"""A federation on this machine, killed again and again: does the run end, and in the same tensors as an undisturbed one?

    python benchmarks/chaos.py [--rounds 50] [--strikes 5] [--seed 0]

Four silos over NVFlare, every part a process as in production, started again when it ends as systemd would. A seeded dice
sends SIGKILL to each kind of process, `--strikes` times each, at a moment within a round: before a worker gets its
message, after it has answered, or some time later. A relay in front of each worker delays messages, loses them, and
loses replies whose work is done. At the end the tensors, the adapter and the log are compared with those of the same
experiment in one process. Prints one table; exit code 1 where anything is not equal. Needs fedtailor[nvflare].
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedtailor import wire
from fedtailor.engines import courier, frames
from fedtailor.engines.keeping import listen
from fedtailor.generations import Generations

FEDTAILOR = [sys.executable, "-c", "from fedtailor.cli import main; main()"]
SILOS = ("bar", "cafe", "clinic", "shop")
WAIT = 120.0  # seconds in which what is to be killed must be there
ENDING = 60.0  # seconds: a courier whose worker was killed waits for another one
RESTART = 1.0  # seconds, as a unit's RestartSec
MOMENTS = ("before", "after", "later")  # of a message to a worker
MISHAPS = {"messages delayed": 0.03, "messages lost": 0.02, "replies lost": 0.02}  # shares of the messages to a worker

# kind -> whose process it is, and a word of its command line
KINDS = {
    "worker": ("silo", "silo"),
    "courier": ("silo", "courier"),
    "silo's engine": ("silo", "nvflare.private.fed.app.client.client_train"),
    "silo's job": ("silo", "nvflare.private.fed.app.client.worker_process"),
    "server": ("server", "server"),
    "server's engine": ("server", "nvflare.private.fed.app.server.server_train"),
    "server's job": ("server", "nvflare.private.fed.app.server.runner_process"),
    "program": ("server", "run"),
}

EXPERIMENT = """
rounds = {rounds}
rows = ["federated"]
[engine]
threads = 1
cohort = 1
deadline = 1800
[model]
name = "tiny"
dtype = "float32"
[data]
source = "rows.jsonl"
template = "{{text}}\\nSentiment:"
label = "mood"
labels = ["bad", "good"]
silo_column = "site"
val_fraction = 0.2
test_fraction = 0.2
[method]
name = "prefix"
virtual_tokens = 4
local_steps = 2
batch_size = 2
optimizer_state = "keep"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--strikes", type=int, default=5, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the dice")
    parser.add_argument("--keep", type=Path, help="copy kits and logs here at the end")
    given = parser.parse_args()
    if given.strikes * len(KINDS) > given.rounds:
        parser.error(f"at most one kill a round: --rounds must be {given.strikes * len(KINDS)} at least")
    with tempfile.TemporaryDirectory(prefix="ft") as name:  # a short path: sockets lie in it
        folder = Path(name).resolve()
        try:
            return chaos(folder, given.rounds, given.strikes, given.seed)
        finally:
            if given.keep is not None:
                ignored = shutil.ignore_patterns("*.sock")
                shutil.copytree(folder, given.keep, ignore=ignored, dirs_exist_ok=True)


def chaos(folder: Path, rounds: int, strikes: int, seed: int) -> int:
    write_experiment(folder, rounds)
    done = subprocess.run([*FEDTAILOR, "run", folder / "chaos.toml", "--out", folder / "here"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    kits = folder / "kits"
    init = ["federation", "init", str(kits), "--server", f"localhost:{free_port()}"]
    subprocess.run([*FEDTAILOR, *init, *(f"--silo={silo}" for silo in SILOS)], check=True, stdout=subprocess.DEVNULL)
    for silo in SILOS:
        (kits / silo / "local" / "worker").write_text("relay.sock\n", encoding="utf-8")
        own = kits / silo / "silo.toml"  # rows come from the file that chaos.toml names
        own.write_text(f"server_names_data = true\n{own.read_text(encoding='utf-8')}", encoding="utf-8")
    dice = Dice(kits, rounds, strikes, random.Random(seed))
    relays = [Relay(kits / silo, dice) for silo in SILOS]
    server, out = str(kits / "server"), str(folder / "afar")
    begin = ["run", str(folder / "chaos.toml"), "--out", out, "--federation", server]
    go_on = ["run", "--resume", out, "--federation", server]
    parts = [Part("server", ["server", server], kits / "server")]
    parts += [Part(silo, ["silo", str(kits / silo)], kits / silo) for silo in SILOS]
    program = Part("program", begin, folder, lambda: go_on if (folder / "afar/experiment.toml").exists() else begin)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for part in (*parts, program):
            part.start()
        code = program.ended()
        took = time.monotonic() - began
    finally:
        for part in (*parts, program):
            part.stop()
        for relay in relays:
            relay.close()
        left = outliving(kits)
    if code:
        print((folder / "program.log").read_text()[-3000:], file=sys.stderr)
    wrong = [f"the program ended with {code}"] if code else compared(folder / "afar", folder / "here", rounds)
    wrong += [f"{part.name} ended by itself: {part.unasked}" for part in (*parts, program) if part.unasked]
    wrong += [f"{kind}: killed {dice.struck[kind]} of {strikes} times" for kind in KINDS if dice.struck[kind] < strikes]
    wrong += [f"outlived its federation: {' '.join(line_of(process))[:200]}" for process in left]
    told(dice, rounds, seed, took, wrong)
    return 1 if wrong else 0


def outliving(kits: Path) -> list[psutil.Process]:
    """What of a stopped federation still runs when all its time to end is over. It is killed."""
    end = time.monotonic() + ENDING
    while True:
        everyone = psutil.process_iter(["cmdline"])
        left = [process for process in everyone if any(str(kits) in word for word in line_of(process))]
        if not left or time.monotonic() > end:
            break
        time.sleep(1.0)
    for process in left:
        process.kill()
    return left


def write_experiment(folder: Path, rounds: int) -> None:
    (folder / "chaos.toml").write_text(EXPERIMENT.format(rounds=rounds), encoding="utf-8")
    words = {"good": ("lovely", "calm", "bright", "fresh", "kind"), "bad": ("late", "cold", "stale", "broken", "loud")}
    things = {"bar": ("drink", "stool", "song"), "cafe": ("cake", "tea", "table"), "clinic": ("nurse", "bed", "visit"),
              "shop": ("parcel", "shirt", "clerk")}  # fmt: skip
    rows = [
        {"site": silo, "text": f"The {thing} was {word}.", "mood": mood}
        for silo in SILOS for thing in things[silo] for mood in words for word in words[mood]
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Dice:
    """Who is killed in which round, and what befalls each message: the same plan for the same seed."""

    def __init__(self, kits: Path, rounds: int, strikes: int, random: random.Random) -> None:
        self.kits, self.random, self.lock = kits, random, threading.Lock()
        self.struck: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        kinds = [kind for kind in KINDS for _ in range(strikes)]
        numbers = random.sample(range(1, rounds + 1), len(kinds))
        drawn = [(kind, random.choice(MOMENTS), random.choice(SILOS)) for kind in kinds]
        self.plan = dict(zip(numbers, drawn, strict=True))  # round -> kind, moment, silo

    def mishap(self) -> str:
        """What befalls the next message; "" for most."""
        with self.lock:
            drawn, kinds = self.random.random(), list(MISHAPS)
            for kind in kinds:
                drawn -= MISHAPS[kind]
                if drawn < 0:
                    self.messages[kind] += 1
                    return kind
            self.messages[""] += 1
            return ""

    def strike(self, number: int, moment: str) -> None:
        """Kill who is to be killed in this round at this moment of a message, once."""
        with self.lock:
            planned = self.plan.get(number)
            if planned is None or planned[1] not in (moment, "later"):
                return
            del self.plan[number]
        kind, when, silo = planned
        if when == "later":
            threading.Timer(self.random.uniform(0.0, 2.0), self._kill, (number, kind, silo)).start()
        else:
            self._kill(number, kind, silo)

    def _kill(self, number: int, kind: str, silo: str) -> None:
        whose, word = KINDS[kind]
        kit, end = str(self.kits / (silo if whose == "silo" else "server")), time.monotonic() + WAIT
        while time.monotonic() < end:
            found = [process for process in psutil.process_iter(["cmdline"]) if {kit, word} <= set(line_of(process))]
            for process in found:
                process.kill()
            if found:
                with self.lock:
                    self.struck[kind] += 1
                of = f" of {silo}" if whose == "silo" else ""
                print(f"{time.strftime('%X')} round {number}: killed {kind}{of}", flush=True)
                return
            time.sleep(0.05)
        print(f"round {number}: no {kind} to kill within {WAIT:.0f} s", flush=True)


class Relay:
    """Stands where a silo's courier looks for its worker, and passes messages on: late, once, or not at all."""

    def __init__(self, kit: Path, dice: Dice) -> None:
        self.dice, self.worker = dice, kit / "silo" / "worker.sock"
        self.listening = listen(kit / "relay.sock")
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()

    def _serve(self) -> None:
        while True:
            try:
                link = self.listening.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._talk, args=(link,), daemon=True).start()

    def _talk(self, link: socket.socket) -> None:
        with link:
            try:
                with courier.connect(self.worker, 600.0) as worker:
                    while self._passed(link, worker):
                        pass
            except (OSError, frames.FrameError):
                pass  # either side has ended, or was killed: the other one sees a broken link

    def _passed(self, link: socket.socket, worker: socket.socket) -> bool:
        """One message and its reply. False where one of them is lost."""
        head, body = frames.receive(link)
        asked = head.get("kind") == "ask"
        mishap = self.dice.mishap() if asked else ""
        if mishap == "messages delayed":
            time.sleep(self.dice.random.uniform(0.2, 3.0))
        if asked:
            self.dice.strike(head["round"], "before")
        if mishap == "messages lost":
            return False
        frames.send(worker, head, body)
        answer = frames.receive(worker)
        if asked:
            self.dice.strike(head["round"], "after")
        if mishap == "replies lost":
            return False
        frames.send(link, *answer)
        return True


@dataclass
class Part:
    """A process that is started again whenever it ends, until it ends well or is stopped."""

    name: str
    command: Sequence[str]
    folder: Path
    again: Callable[[], Sequence[str]] | None = None  # another command once it was killed
    unasked: list[int] = field(default_factory=list)  # exit codes that no kill of ours explains
    process: Any = None

    def start(self) -> None:
        self._stopping = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        command = self.command
        while not self._stopping.is_set():
            with (self.folder / f"{self.name}.log").open("a") as log:
                self.process = subprocess.Popen([*FEDTAILOR, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            code = self.process.wait()
            if code == 0 or self._stopping.is_set():
                return
            if code != -signal.SIGKILL:
                self.unasked.append(code)
                if self.again is not None and len(self.unasked) > 2:
                    return
            self._stopping.wait(RESTART)
            command = self.command if self.again is None else self.again()

    def ended(self) -> int:
        self._watching.join()
        return int(self.process.returncode)

    def stop(self) -> None:
        self._stopping.set()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self._watching.join(60)


def compared(afar: Path, here: Path, rounds: int) -> list[str]:
    """What is not the same in the two runs, bit for bit; their logs but for times and bytes."""
    wrong = []
    states = [Generations(run / "rows" / "federated").newest() for run in (afar, here)]
    for what in ("round", "state", "best"):
        one, other = (getattr(state, what) for state in states)
        if (one if what == "round" else wire.pack(one)) != (other if what == "round" else wire.pack(other)):
            wrong.append(f"the {what} is another one")
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (afar, here)]
    if adapters[0] != adapters[1]:
        wrong.append("the adapter is another one")
    texts = [(run / "rows" / "federated" / "rounds.jsonl").read_text() for run in (afar, here)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    numbers = [entry["round"] for entry in logs[0]]
    if numbers != list(range(rounds + 1)):
        wrong.append(f"the rounds in the log are {numbers}")
    wrong += [f"round {entry['round']}: rejected {entry['rejected']}" for entry in logs[0] if entry["rejected"]]
    for one, other in zip(*logs, strict=False):
        differing = [what for what in ("val", "train_loss", "silos") if one.get(what) != other.get(what)]
        wrong += [f"round {one['round']}: {what} differs" for what in differing]
    results = [json.loads((run / "result.json").read_text())["rows"]["federated"] for run in (afar, here)]
    wrong += [f"{what} on test rows differs" for what in ("accuracy", "loss") if results[0][what] != results[1][what]]
    return wrong


def told(dice: Dice, rounds: int, seed: int, took: float, wrong: Sequence[str]) -> None:
    print(f"\n{rounds} rounds on {len(SILOS)} silos, seed {seed}")
    rows = [(f"killed: {kind}", dice.struck[kind]) for kind in KINDS]
    rows += [(kind, dice.messages[kind]) for kind in MISHAPS]
    rows += [("messages undisturbed", dice.messages[""]), ("seconds", round(took)), ("equal", "no" if wrong else "yes")]
    for what, value in rows:
        print(f"{what:<24}{value:>8}")
    for line in wrong:
        print(f"WRONG: {line}")


def line_of(process: psutil.Process) -> list[str]:
    return process.info["cmdline"] or []


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
