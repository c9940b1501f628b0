"""A federation of simulated sites on this machine, with a SuperLink of its own; or a run on one that is there.

`flwr run` reports success even when the app failed, and uses a background SuperLink that keeps the environment of the
moment it was started. Here the SuperLink lives for one run, on ports and in a folder of its own, and the run's status
is looked up at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from fedclip_flwr.base import Settings, UserError, files
from fedclip_flwr.base.settings import unusable
from fedclip_flwr.runs import read_settings

CONNECTION = "fedclip"
"""What Flower's configuration calls our SuperLink."""
RAY_IS_LATE = "The current node timed out during startup"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(nodes: int | None, given: Sequence[str]) -> int:
    """Runs the federation and shows what it shows; 0 only if the run was completed."""
    stop_in_order("Stopped: all that was started is ended. `fedclip run resume=latest` goes on with the run.")
    settings, checked, nodes = prepared(nodes, given)
    with temporary() as folder, superlink(Path(folder), checked.device.startswith("cuda")) as env:
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-log-to-driver=false"
        return submit(CONNECTION, settings, env, Path(folder), "--federation-config", federation)


def prepared(nodes: int | None, given: Sequence[str]) -> tuple[dict[str, Any], Settings, int]:
    """The settings for so many sites here, as given and as a whole; what is wrong is told before anything starts.

    A run that goes on has the settings that it was begun with, and as many sites, unless others are given.
    """
    from fedclip_flwr.runs.folder import begun_with
    from fedclip_flwr.runs.opening import open_run  # these bring torch, which most of this file has no use for

    if not find_spec("ray"):
        raise UserError(
            "Ray, which simulates sites, is not installed here: install this package with its extra `simulation`, or "
            "give --on NAME for a SuperLink with real sites"
        )
    settings, problems = read_settings(given)
    if settings.get("resume") and not {"resume", "results-dir"} & problems.keys():
        begun, sites = begun_with(Settings(resume=settings["resume"], results_dir=settings.get("results-dir", "")))
        settings, nodes = begun | settings, nodes or sites
        if nodes is None:
            problems["nodes"] = (
                f"resume = {settings['resume']!r}: it was stopped before it met its sites: say how many with --nodes"
            )
    nodes = 10 if nodes is None else nodes
    if nodes < 1:
        problems["nodes"] = f"--nodes {nodes}: expected at least 1"
    checked, _, _ = open_run({**_described(app_folder())["config"], **settings}, problems)
    if (least := checked.least_sites) > nodes:
        setting = "min-sites" if least == checked.min_sites else "secure-aggregation = true, which needs min-sites"
        raise unusable([f"{setting} = {least}: there are {nodes} sites; give as many with --nodes"])
    return settings, checked, nodes


def run_on(connection: str, given: Sequence[str]) -> int:
    """The same with the SuperLink of that name in Flower's configuration, and with the sites that it has."""
    stop_in_order(
        f"No longer shown, but the run goes on: `flwr list {connection}` tells how, `flwr stop RUN {connection}` ends "
        "it."
    )
    settings, problems = read_settings(given, here=False)
    problems |= Settings.read({**_described(app_folder())["config"], **settings})[1]
    if problems:
        raise unusable(problems.values())
    with temporary() as folder:
        return submit(connection, settings, commands_found(os.environ), Path(folder))


def submit(connection: str, settings: Mapping[str, Any], env: Mapping[str, str], place: Path, *options: str) -> int:
    """Hands the run over and shows it to its end; 0 only if it was completed."""
    found = app_folder()
    app = _copied(found, place / "app", _described(found).get("fab-include", []))
    overrides = place / "settings.toml"
    overrides.write_text("".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in settings.items()))
    number = _show(["flwr", "run", str(app), connection, "--run-config", str(overrides), "--stream", *options], env)
    status = status_of(number, env, connection) if number else "not started"
    if status != "finished:completed":
        print(
            f"The run did not complete: {status}. If it came to a round, resume=latest goes on with it.",
            file=sys.stderr,
        )
        return 1
    return 0


def stop_in_order(word: str) -> None:
    """From now on this process leaves in order when it is told to stop, so that all that it started is ended too."""

    def stopped(number: int, frame: object) -> NoReturn:
        for stop_signal in STOPS:  # however often the user asks
            signal.signal(stop_signal, signal.SIG_IGN)
        print(f"\n{word}", file=sys.stderr)
        sys.exit(128 + number)

    for stop_signal in STOPS:
        signal.signal(stop_signal, stopped)


def temporary() -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone afterwards, with a path short enough for the sockets that Ray makes in it."""
    place = tempfile.gettempdir()
    return tempfile.TemporaryDirectory(
        prefix="fedclip-", dir=place if len(place) < 30 else "/tmp", ignore_cleanup_errors=True
    )


def app_folder() -> Path:
    """The folder of the Flower app: the current one if it holds one, else this project's."""
    here, known = Path.cwd(), Settings.keys().keys()
    with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError):
        settings = _described(here)["config"].keys()
        if known <= settings:
            return here
        if len(known & settings) > len(known) / 2:  # an app of ours, and not of somebody else
            lacking = ", ".join(sorted(known - settings))
            raise UserError(
                f"{here / 'pyproject.toml'} is of another version of fedclip-flwr: it lacks the settings {lacking}; "
                "add them as a new folder of `fedclip init` has them, or run elsewhere"
            )
    return files.own_app()


def _described(app: Path) -> dict[str, Any]:
    """What the app's pyproject.toml tells Flower."""
    described: dict[str, Any] = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return described


def _copied(app: Path, to: Path, include: Sequence[str]) -> Path:
    """A copy of what goes into the bundle: Flower would look at every file beside it, environments too."""
    if not include:
        return app
    for name in ("pyproject.toml", *include):
        for file in app.glob(name):
            (to / file.relative_to(app)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / file.relative_to(app))
    return to


@contextlib.contextmanager
def superlink(folder: Path, sites_see_gpus: bool = False) -> Iterator[dict[str, str]]:
    """A SuperLink that runs meanwhile; the environment in which Flower's commands find it.

    Simulated sites see no GPU unless asked: each of their processes would take memory of it for itself alone.
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
    command += ["--control-api-address", f"127.0.0.1:{port}", "--serverappio-api-address", "127.0.0.1:0"]
    log = folder / "superlink.log"
    with started(command, env, log) as process:
        wait_for(port, process, log)
        yield env


def free_ports(count: int) -> list[int]:
    """Of this machine, to be used at once."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def connect(folder: Path, port: int, trust: str) -> None:
    """Flower's configuration in that folder: our SuperLink, and how it is trusted."""
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\n{trust}\n'
    )


def environment(folder: Path) -> dict[str, str]:
    """The one in which Flower's commands are this Python's, are quiet, and find their configuration in the folder."""
    return {
        **commands_found(os.environ),
        "FLWR_HOME": str(folder),
        "FLWR_LOG_LEVEL": "WARNING",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # Ray's start forks: gRPC's part in that hangs once in some hundred times
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }


def commands_found(env: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Flower's commands are those of this Python's."""
    return {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"}


@contextlib.contextmanager
def started(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended at the end, and whatever it started."""
    process = None
    try:
        with log.open("wb") as file, undisturbed():
            process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        yield process
    finally:
        if process:
            stop(process)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """When this process is told to stop meanwhile, it hears of it afterwards: what is half started is never ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which alone hears of signals
        return
    come: list[int] = []
    before = {number: signal.signal(number, lambda number, _: come.append(number)) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if come:
            signal.raise_signal(come[0])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the SuperLink takes connections."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"Flower's SuperLink could not be started: {last_words(log)}")
        time.sleep(0.05)


def last_words(log: Path) -> str:
    """The last line of what a process said."""
    return (log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"])[0]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and then all that it started, which may put its things in order first."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # a simulation's SIGTERM is Ray's
    deadline = time.monotonic() + 10
    while _works(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _works(group: int) -> bool:
    """Whether a process of the group has not ended, as far as the system tells."""
    for told in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = told.read_text().rpartition(") ")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                return True
    return False


def _show(command: list[str], env: Mapping[str, str]) -> str | None:
    """Runs `flwr run --stream` and passes on what the app says; the run's number, if one was started."""
    number, shown, late = None, 0.0, False
    env = {**env, "PYTHONUNBUFFERED": "1"}  # what comes is shown when it comes
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        for line in io.TextIOWrapper(process.stdout, "utf-8", "replace", newline=""):  # a line may end with \r
            if not number and (started := re.search(r"Successfully started run (\d+)", line)):
                number = started[1]
            elif not line.startswith("Successfully installed "):  # the bundle: no user can use that
                if line.endswith("\r") and not sys.stdout.isatty():  # a progress bar into a file: now and then
                    if time.monotonic() < shown + 10:
                        continue
                    line, shown = line[:-1] + "\n", time.monotonic()
                print(line, end="", flush=True)
                late = late or RAY_IS_LATE in line
        if late:  # far above in its trace
            word = "Ray, which simulates sites, did not start in time: is this machine busy? Try again."
            print(word, file=sys.stderr)
    finally:
        process.terminate()
        process.wait()
    return number


def status_of(number: str, env: Mapping[str, str], connection: str = CONNECTION) -> str:
    """The run's status as the SuperLink tells it; with the reason, unless the app has told that itself."""
    command = ["flwr", "list", connection, "--run-id", number, "--format", "json"]
    answer = subprocess.run(command, env=env, capture_output=True, text=True)
    with contextlib.suppress(json.JSONDecodeError, LookupError, TypeError):
        run = json.loads(answer.stdout)["runs"][0]
        why = run["status-details"]
        told = why in ("", "N/A") or " failed with exception: " in why
        return f"{run['status']}" if told else f"{run['status']} ({why})"
    said = answer.stdout.strip() or answer.stderr.strip()
    with contextlib.suppress(json.JSONDecodeError, LookupError, TypeError):
        said = str(json.loads(answer.stdout)["error-message"])
    return f"unknown ({' '.join(said.split())})"
