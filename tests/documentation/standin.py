"""Systemd's commands where no systemd runs: what docs/deploy.md asks of them, done for real, with no package but this.

    python -m tests.documentation.standin systemctl start NAME

`systemctl` starts what a loaded unit says: as its user, with its environment and nothing else, again when it has ended,
and ends it with all that it started; `journalctl` prints what it said. What a unit forbids its service is left out
(Protect…, Restrict…, capabilities, system calls), and so is what happens when a machine starts.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tests import units

UNITS = Path("/etc/systemd/system")
WANTED = UNITS / "multi-user.target.wants"
LOADED = Path("/run/systemd/units")
"""Units as they were at the last `daemon-reload`, and beside them the numbers of the processes that keep them."""
LOGS = Path("/var/log/journal")


def systemctl(*words: str) -> None:
    now = "--now" in words
    verb, *names = [word for word in words if word != "--now"]
    if verb == "daemon-reload":
        LOADED.mkdir(parents=True, exist_ok=True)
        for unit in UNITS.glob("*.service"):
            shutil.copy(unit, LOADED)
        return
    (name,) = names
    if not (LOADED / f"{name}.service").exists():
        sys.exit(f"Unit {name}.service could not be found.")
    if verb == "status":
        print(f"{name}.service: {'active (running)' if runs(name) else 'inactive (dead)'}")
    if verb == "enable":
        WANTED.mkdir(exist_ok=True)
        (WANTED / f"{name}.service").symlink_to(UNITS / f"{name}.service")
    if verb == "disable":
        (WANTED / f"{name}.service").unlink()
    if verb in ("stop", "restart") or (verb == "disable" and now):
        stop(name)
    if verb in ("start", "restart") or (verb == "enable" and now):
        start(name)


def runs(name: str) -> bool:
    return (LOADED / f"{name}.pid").exists()


def start(name: str) -> None:
    if runs(name):
        return
    LOGS.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", __spec__.name, "keep", name]
    with (LOGS / name).open("ab") as log:
        keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    (LOADED / f"{name}.pid").write_text(str(keeper.pid))


def stop(name: str) -> None:
    if runs(name):
        keeper = int((LOADED / f"{name}.pid").read_text())
        os.kill(keeper, signal.SIGTERM)
        while Path(f"/proc/{keeper}").exists():
            time.sleep(0.05)
        (LOADED / f"{name}.pid").unlink()


def keep(name: str) -> None:
    """Starts the service whenever it has ended; its last act is to end it."""
    unit = (LOADED / f"{name}.service").read_text()
    said = {key: values[-1] for key, values in units.settings(unit).items()}
    command, env = units.started_by(unit, units.variables(Path(said["EnvironmentFile"]).read_text()))
    user = pwd.getpwnam(said["User"])
    state = Path("/var/lib", said["StateDirectory"])
    state.mkdir(exist_ok=True)
    state.chmod(int(said["StateDirectoryMode"], 8))
    os.chown(state, user.pw_uid, user.pw_gid)
    mark = f"INVOCATION_ID={os.urandom(16).hex()}"
    env = {"USER": user.pw_name, "LOGNAME": user.pw_name, "HOME": user.pw_dir, "SHELL": user.pw_shell} | env
    env["INVOCATION_ID"] = mark.partition("=")[2]

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit()

    signal.signal(signal.SIGTERM, leave)
    try:
        while True:
            process = subprocess.Popen(
                command,
                env=env,
                user=said["User"],
                group=said["Group"],
                extra_groups=[],
                umask=int(said["UMask"], 8),
                cwd=said["WorkingDirectory"],
                stdin=subprocess.DEVNULL,
            )
            process.wait()
            assert said["Restart"] == "always"
            end(mark, float(said["TimeoutStopSec"]))
            time.sleep(float(said["RestartSec"]))
    finally:
        end(mark, float(said["TimeoutStopSec"]))


def end(mark: str, patience: float) -> None:
    """Ends all processes that have the mark in their environment."""
    tell(mark, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while tell(mark, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    tell(mark, signal.SIGKILL)


def tell(mark: str, number: int) -> int:
    """Sends a signal to those that have the mark; how many there are."""
    written = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (process / "environ").read_text(errors="replace").split("\0"):
                os.kill(int(process.name), number)
                written += 1
    return written


def journalctl(*words: str) -> None:
    """What a unit said until now; `-f` does not wait for more."""
    name = words[words.index("-u") + 1]
    assert {*words} <= {"-a", "-f", "-u", name}
    print((LOGS / name).read_text(errors="replace"), end="")


def editor(file: str) -> None:
    """The reader's edit: the site is the one whose machine this is."""
    path = Path(file)
    path.write_text(path.read_text().replace("north", os.uname().nodename))


if __name__ == "__main__":
    {command.__name__: command for command in (systemctl, journalctl, editor, keep)}[sys.argv[1]](*sys.argv[2:])
