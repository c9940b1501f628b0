"""A federation of simulated sites on this machine, with its own SuperLink; or a run on an existing SuperLink.

`flwr run` reports success even if the app failed, and uses a background SuperLink that keeps the environment in which
it was started. Here the SuperLink lives for one run, with its own ports and folder, and the run's status is checked at
the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fedclip_flwr.base import Settings, UserError, files
from fedclip_flwr.base.settings import unusable
from fedclip_flwr.flower import lines
from fedclip_flwr.operations.ports import free_ports
from fedclip_flwr.runs import read_settings

CONNECTION = "fedclip"
"""The name of our SuperLink in Flower's configuration."""
RAY_IS_LATE = "The current node timed out during startup"
STARTED = "FEDCLIP_STARTED"
"""The variable by which all processes are found that a process of ours has started."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(nodes: int | None, given: Sequence[str]) -> int:
    """Runs the federation and shows its output; returns 0 only if the run was completed."""
    stop_in_order("Stopped: all processes have ended. `fedclip run resume=latest` resumes the run.")
    settings, checked, nodes = prepared(nodes, given)
    with temporary() as folder, superlink(Path(folder), checked.device.startswith("cuda")) as env:
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-log-to-driver=false"
        return submit(CONNECTION, settings, env, Path(folder), "--federation-config", federation)


def prepared(nodes: int | None, given: Sequence[str]) -> tuple[dict[str, Any], Settings, int]:
    """The settings as given and complete, and the number of sites; raises before anything starts if they are invalid.

    A resumed run has the settings and the number of sites that it was started with, unless others are given.
    """
    from fedclip_flwr.runs.folder import saved_settings
    from fedclip_flwr.runs.opening import open_run  # these import torch, which most of this file does not need

    if not find_spec("ray"):
        raise UserError(
            "Ray, which simulates sites, is not installed: install this package with its extra `simulation`, or "
            "give --on NAME for a SuperLink with real sites"
        )
    settings, problems = read_settings(given)
    if earlier := _named(settings, problems):
        saved, sites = saved_settings(earlier)
        settings, nodes = saved | settings, sites if nodes is None else nodes
        if settings.get("update") and sites and nodes is not None and 0 < nodes < sites:
            problems["nodes"] = (
                f"--nodes {nodes}: {settings['update']} had {sites} sites; fewer would have other images, and those of "
                f"the rest would count twice: give at least {sites}"
            )
        if nodes is None:
            key = "resume" if settings.get("resume") else "update"
            problems["nodes"] = f"{key} = {settings[key]!r}: it was stopped before its sites connected: set --nodes"
    nodes = 10 if nodes is None else nodes
    if nodes < 1:
        problems["nodes"] = f"--nodes {nodes}: expected at least 1"
    checked, _, _ = open_run({**_described(app_folder())["config"], **settings}, problems)
    if (least := checked.least_sites) > nodes:
        setting = "min-sites" if least == checked.min_sites else "secure-aggregation = true, which needs min-sites"
        raise unusable([f"{setting} = {least}: there are {nodes} sites; give at least {least} with --nodes"])
    return settings, checked, nodes


def _named(settings: Mapping[str, Any], problems: Mapping[str, str]) -> Settings | None:
    """The settings that name an earlier run, to resume or to update."""
    keys = ("resume", "update", "results-dir")
    if {*keys} & problems.keys() or not (settings.get("resume") or settings.get("update")):
        return None
    return Settings(**{key.replace("-", "_"): settings[key] for key in keys if key in settings})


def update(on: str, nodes: int | None, given: Sequence[str]) -> int:
    """Updates a run, with simulated sites or on a SuperLink; returns as `run`.

    On a SuperLink the run has the settings of the one to update if that is on this machine, too.
    """
    if not on:
        return run(nodes, given)
    settings, problems = read_settings(given, here=False)
    if earlier := _named(settings, problems):
        from fedclip_flwr.runs.folder import saved_settings  # see above

        with contextlib.suppress(UserError):  # the SuperLink's machine has it, and says which settings differ
            saved = {**saved_settings(earlier)[0], **settings}
            default = Settings().as_run_config()
            needed = {key: value for key, value in saved.items() if key in settings or value != default[key]}
            given = [f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in needed.items()]
    return run_on(on, given)


def run_on(connection: str, given: Sequence[str]) -> int:
    """Runs a federation on the SuperLink of that name in Flower's configuration, with its sites; returns as `run`."""
    stop_in_order(
        f"No longer shown, but the run continues: `flwr list {connection}` shows its status, `flwr stop RUN "
        f"{connection}` ends it."
    )
    settings, problems = read_settings(given, here=False)
    problems |= Settings.read({**_described(app_folder())["config"], **settings})[1]
    if problems:
        raise unusable(problems.values())
    with temporary() as folder:
        return submit(connection, settings, commands_found(os.environ), Path(folder))


def submit(connection: str, settings: Mapping[str, Any], env: Mapping[str, str], place: Path, *options: str) -> int:
    """Submits the run and shows its output to the end; returns 0 only if it was completed."""
    found = app_folder()
    app = _copied(found, place / "app", _described(found).get("fab-include", []))
    overrides = place / "settings.toml"
    overrides.write_text("".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items()))
    number = _show(["flwr", "run", str(app), connection, "--run-config", str(overrides), "--stream", *options], env)
    status = status_of(number, env, connection) if number else "not started"
    if status != "finished:completed":
        print(
            f"The run did not complete: {status}. If it completed a round, resume=latest resumes it.",
            file=sys.stderr,
        )
        return 1
    return 0


def stop_in_order(message: str) -> None:
    """From now on a stop signal prints the message and exits in order, so that all child processes end, too."""

    def stopped(number: int, frame: object) -> NoReturn:
        for stop_signal in STOPS:  # further signals are ignored
            signal.signal(stop_signal, signal.SIG_IGN)
        print(f"\n{message}", file=sys.stderr)
        sys.exit(128 + number)

    for stop_signal in STOPS:
        signal.signal(stop_signal, stopped)


def temporary() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder with a path short enough for the sockets that Ray makes in it."""
    place = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(
        prefix="fedclip-", dir=place if len(place) < 30 else "/tmp", ignore_cleanup_errors=True
    )


def app_folder() -> Path:
    """The folder of the Flower app: the current folder if it has one, else this project's."""
    here, known = Path.cwd(), Settings.keys().keys()
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError):
        settings = _described(here)["config"].keys()
        if known <= settings:
            return here
        if len(known & settings) > len(known) / 2:  # one of our apps, of another version
            lacking = ", ".join(sorted(known - settings))
            raise UserError(
                f"{here / 'pyproject.toml'} is of another version of fedclip-flwr: it lacks the settings {lacking}; "
                "copy them from a new folder of `fedclip init`, or run elsewhere"
            )
    return files.own_app()


def _described(app: Path) -> dict[str, Any]:
    """The app's part of its pyproject.toml."""
    described: dict[str, Any] = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return described


def _copied(app: Path, to: Path, include: Sequence[str]) -> Path:
    """A copy of the bundle's files: Flower would scan all files of the folder, environments too."""
    if not include:
        return app
    for name in ("pyproject.toml", *include):
        for file in app.glob(name):
            (to / file.relative_to(app)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / file.relative_to(app))
    return to


@contextlib.contextmanager
def superlink(folder: Path, sites_see_gpus: bool = False) -> Iterator[dict[str, str]]:
    """Runs a SuperLink; yields the environment in which Flower's commands find it.

    Simulated sites see no GPU by default: each of their processes would reserve GPU memory for itself.
    """
    (port,) = free_ports(1)
    connect(folder, port, "insecure = true")
    env = {
        **environment(folder),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0" if sites_see_gpus else "1",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += lines.address(lines.line().simulation_address, f"127.0.0.1:{port}")
    log = folder / "superlink.log"
    with started(command, env, log) as process:
        wait_for(port, process, log)
        yield env


def connect(folder: Path, port: int, trust: str) -> None:
    """Writes Flower's configuration in that folder: our SuperLink's address, and `trust`, its TLS settings."""
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n{trust}\n'
    )


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Flower's commands are this Python's, quiet, and configured in the folder."""
    return {
        **commands_found(os.environ),
        **lines.NO_INSTALLATION,
        "FLWR_HOME": str(folder),
        "FLWR_LOG_LEVEL": "WARNING",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # Ray's start forks: gRPC's fork handlers hang about once in a hundred times
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }


def commands_found(env: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Flower's commands are this Python's."""
    return {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"}


@contextlib.contextmanager
def started(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a process; ends it at the end, with all that it has started."""
    mark, process = secrets.token_hex(8), None
    try:
        with log.open("wb") as file, signals_deferred():
            marked = {**env, STARTED: f"{env.get(STARTED, '')} {mark}"}
            process = subprocess.Popen(command, env=marked, stdout=file, stderr=file, start_new_session=True)
        yield process
    finally:
        if process:
            stop(process, mark)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defers stop signals to the end of the block: so a process that is being started is always ended, too."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the SuperLink accepts connections."""
    deadline = time.monotonic() + 180
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"Flower's SuperLink could not be started: {last_words(log)}")
        time.sleep(0.05)


def last_words(log: Path) -> str:
    """The last line of a process's output."""
    return (log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"])[0]


def stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends the process, then all that it has started, which get time to clean up first."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
        _signal(marked(mark), signal.SIGINT)  # a simulation's SIGTERM is Ray's
    deadline = time.monotonic() + 10
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(marked(mark), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # where there is no /proc
    process.wait()


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def marked(mark: str) -> list[int]:
    """The processes with that mark in their environment; none if the system has no /proc.

    Flower's start their children in sessions of their own. A process that has ended has no environment.
    """
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def _show(command: list[str], env: Mapping[str, str]) -> str | None:
    """Runs `flwr run --stream` and prints the app's output; returns the run's number, if a run was started."""
    number, shown, late = None, 0.0, False
    env = {**env, "PYTHONUNBUFFERED": "1"}  # so that output is shown at once
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        for line in io.TextIOWrapper(process.stdout, "utf-8", "replace", newline=""):  # a line may end with \r
            if not number and (started := re.search(r"Successfully started run (\d+)", line)):
                number = started[1]
            elif not line.startswith("Successfully installed "):  # about the bundle: of no use to users
                if line.endswith("\r") and not sys.stdout.isatty():  # a progress bar in a file: now and then
                    if time.monotonic() < shown + 10:
                        continue
                    line, shown = line[:-1] + "\n", time.monotonic()
                print(line, end="", flush=True)
                late = late or RAY_IS_LATE in line
        if late:  # repeated here: Ray's line is far above, in its trace
            hint = "Ray, which simulates sites, did not start in time: is this machine busy? Try again."
            print(hint, file=sys.stderr)
    finally:
        process.terminate()
        process.wait()
    return number


def status_of(number: str, env: Mapping[str, str], connection: str = CONNECTION) -> str:
    """The run's status at the SuperLink; with the reason, unless the app has already shown it."""
    command = ["flwr", "list", connection, "--run-id", number, "--format", "json"]
    answer = subprocess.run(command, env=env, capture_output=True, text=True)
    with contextlib.suppress(json.JSONDecodeError, LookupError, TypeError):
        run = json.loads(answer.stdout)["runs"][0]
        why = run["status-details"]
        shown = why in ("", "N/A") or " failed with exception: " in why
        return f"{run['status']}" if shown else f"{run['status']} ({why})"
    output = answer.stdout.strip() or answer.stderr.strip()
    with contextlib.suppress(json.JSONDecodeError, LookupError, TypeError):
        output = str(json.loads(answer.stdout)["error-message"])
    return f"unknown ({' '.join(output.split())})"
