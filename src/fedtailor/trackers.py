"""Experiment trackers, one function each, found by name: (run) -> its `tracking.Tracker`. Each imports its library when called.

Where the figures go is the library's own affair: its default place, or what its environment variables say. What a library
would tell of by itself (the machine's name and load, the command line, git, installed packages) is switched off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtailor.tracking import Figures, Tracked

PROJECT = "fedtailor"  # where the library's own variable names none; what is to be compared stands in one project
MOST = 100  # settings in one message, and letters of one: what MLflow's servers take
LETTERS = 500


@dataclass(frozen=True)
class Calls:
    """A tracker of two functions."""

    log: Callable[[int, Figures], Any]
    end: Callable[[Figures | None], Any]


def trackio(run: Tracked) -> Calls:
    """Into its SQLite files, or to TRACKIO_SERVER_URL or TRACKIO_SPACE_ID; `trackio show` shows it."""
    import trackio as library

    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    one = library.init(
        project=project, name=f"{run.name}-{run.id}", group=run.group, config=dict(run.config), resume="allow",
        embed=False, auto_log_cpu=False, auto_log_gpu=False,
    )  # fmt: skip

    def end(figures: Figures | None) -> None:
        if figures:
            one.log(dict(figures), step=run.rounds)
        library.finish()  # its own run: `one.finish` would leave it the current one, to be finished again

    return Calls(lambda number, figures: one.log(dict(figures), step=number), end)


def mlflow(run: Tracked) -> Calls:
    """To MLFLOW_TRACKING_URI, or its local default, into the experiment of MLFLOW_EXPERIMENT_ID or _NAME. By its client: the
    fluent calls would add the user's name and the program's path. A server that does not answer is asked again by MLflow for
    four minutes, or as MLFLOW_HTTP_REQUEST_MAX_RETRIES says, and the run waits."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    place = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not place:
        known = client.get_experiment_by_name(name)
        place = known.experiment_id if known else client.create_experiment(name)
    tags = {"fedtailor.run": run.id, "fedtailor.group": run.group}
    before = client.search_runs([place], f"tags.`fedtailor.run` = '{run.id}'", max_results=1)
    if before:
        one = before[0].info.run_id
        client.update_run(one, status="RUNNING")
    else:
        one = client.create_run(place, tags=tags, run_name=run.name).info.run_id
        told = [Param(key, str(value)[:LETTERS]) for key, value in run.config.items()]
        for i in range(0, len(told), MOST):
            client.log_batch(one, params=told[i : i + MOST])

    def log(number: int, figures: Figures) -> None:
        now = int(time.time() * 1000)
        client.log_batch(one, metrics=[Metric(key, value, now, number) for key, value in figures.items()])

    def end(figures: Figures | None) -> None:
        if figures:
            log(run.rounds, figures)
        client.set_terminated(one, "FINISHED" if figures is not None else "KILLED")

    return Calls(log, end)


def tensorboard(run: Tracked) -> Calls:
    """Event files in the row's own folder: `tensorboard --logdir runs` shows all rows of all runs."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"))
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in run.config.items()]
    text = "\n".join(["| setting | value |", "|---|---|", *lines])
    writer.add_text("settings", text, 0)

    def log(number: int, figures: Figures) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, number)
        writer.flush()

    def end(figures: Figures | None) -> None:
        log(run.rounds, figures or {})
        writer.close()

    return Calls(log, end)


def wandb(run: Tracked) -> Calls:
    """To the server that `wandb login` or WANDB_BASE_URL names; WANDB_MODE=offline: into ./wandb, for `wandb sync`."""
    import wandb as library

    quiet: Mapping[str, Any] = {
        "console": "off", "quiet": True, "save_code": False, "disable_git": True, "x_disable_stats": True, "x_disable_meta": True,
        "x_disable_machine_info": True, "x_save_requirements": False,
    }  # fmt: skip
    one = library.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT, name=run.name, group=run.group, id=run.id, resume="allow",
        config=dict(run.config), settings=library.Settings(**quiet),
    )  # fmt: skip

    def end(figures: Figures | None) -> None:
        one.summary.update(dict(figures or {}))
        one.finish(exit_code=0 if figures is not None else 1)

    return Calls(lambda number, figures: one.log(dict(figures), step=number), end)
