"""Throw-away machines: each has the disk of this one, but writes in memory, and a network with the others alone.

A `Hall` is a set of namespaces in which a shell waits; machines are further ones in it. All of it, mounts and
processes, is gone when that shell ends, which it does with the test's process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.documentation.pages import ROOT
from tests.documentation.shell import Shell

TOOLS = ("unshare", "nsenter", "ip", "mount", "git", "runuser", "useradd", "install", "tar", "ss")
EMPTY = ("root", "tmp", "run", "data", "opt", "mnt", "srv")
"""Folders of this machine that are empty in the others."""
COMMANDS = ("systemctl", "journalctl", "editor")
SERVER = "10.9.0.1"
BASE = Path(sys.base_prefix)
BUILT_IN = Path("/usr")
_TRIAL = """
cd $1
mount -t tmpfs hall .
mkdir disk work root
mount -t overlay disk -o lowerdir=/,upperdir=disk,workdir=work root
ip link add hub type bridge
ip link add one type veth peer name other
"""


class Hall:
    """Where machines stand, on a network of their own; `post` is a folder that all of them have as /mnt."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.shell = Shell("hall", ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "bash"])
        holder = self.shell.process.pid
        (self.init,) = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        self.inside = Path(f"/proc/{self.init}/root{place}")
        self.shell.run(
            f"""
            mount -t tmpfs hall {place}
            mkdir {place}/post
            mount -t tmpfs run /run
            ip link add hub type bridge
            ip link set hub up
            """
        )

    def post(self, folder: Path) -> None:
        """Lays a folder where all machines see it."""
        shutil.copytree(folder, self.inside / "post" / folder.name)

    def machine(self, name: str, number: int, like: str = "") -> Shell:
        """The session of root on a new machine, 10.9.0.`number`; `like`: with what was done on one that is closed."""
        disks = [f"{self.place}/{like}/disk"] if like else []
        packages = [f"{self.place}/{like}/packages"] if like else []
        self.shell.run(
            f"""
            cd {self.place}
            mkdir -p {name}/disk {name}/packages {name}/work {name}/more {name}/root
            ip netns add {name}
            ip link add {name} type veth peer name eth0 netns {name}
            ip link set {name} master hub up
            ip -n {name} link set lo up
            ip -n {name} addr add 10.9.0.{number}/24 dev eth0
            ip -n {name} link set eth0 up
            """
        )
        start = _start(self.place / name, name, [*disks, "/"], [*packages, sys.prefix], new=not like)
        (self.inside / name / "start").write_text(start)
        enter = ["nsenter", f"--target={self.init}", "--mount", "--pid", "nsenter", f"--net=/run/netns/{name}"]
        own = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
        return Shell(name, [*enter, *own, "bash", f"{self.place}/{name}/start"])

    def close(self) -> None:
        self.shell.close()


def _start(here: Path, name: str, disks: Sequence[str], packages: Sequence[str], *, new: bool) -> str:
    """The script that makes a machine of its namespaces, and then is its shell."""
    lines = ["set -e", f"cd {here}"]
    if new:
        lines += [f"mknod disk/{folder} c 0 0" for folder in EMPTY]  # which is how an overlay says: it is not there
    lines += [
        f"mount -t overlay disk -o lowerdir={':'.join(disks)},upperdir={here}/disk,workdir={here}/work root",
        "cd root",
        f"mkdir -p {' '.join(EMPTY)} opt/fedclip",
        "chmod 1777 tmp; chmod 700 root",
        "mount -t proc proc proc; mount -t sysfs -o ro sys sys; mount --rbind /dev dev; mount -t tmpfs shm dev/shm",
        f"mount --bind {here.parent}/post mnt",
        f"mount -t overlay packages -o "
        f"lowerdir={':'.join(packages)},upperdir={here}/packages,workdir={here}/more opt/fedclip",
        f"hostname {name}",
        f"printf '127.0.0.1 localhost\\n{SERVER} fl.example.org\\n' > etc/hosts",
    ]
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    if not BASE.is_relative_to(BUILT_IN):
        lines += [f"mkdir -p .{BASE}", f"mount --bind {BASE} .{BASE}", f"mount -o remount,bind,ro .{BASE}"]
        lines += ["chmod 711 root"] if BASE.is_relative_to("/root") else []
        path = f"{BASE}/bin:{path}"
    if new:
        lines.append(_laid_out())
    env = {"HOME": "/root", "LANG": "C.UTF-8", "PATH": path, "TERM": "dumb", "COLUMNS": "200"}
    env |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/mnt/wheels"}
    given = " ".join(f"{key}={value}" for key, value in env.items())
    # A script is read as it goes: from here on the shell's is what the test sends.
    return "\n".join([*lines, f"exec chroot . env -i {given} bash -c 'cd; exec bash'"])


def _laid_out() -> str:
    """What is done once: the commands that stand in for systemd's, and this environment's packages in /opt/fedclip."""
    lines = ["mkdir -p usr/local/lib/standin/tests/documentation"]
    for file in ("__init__", "units", "documentation/__init__", "documentation/standin"):
        lines.append(f"cp {ROOT}/tests/{file}.py usr/local/lib/standin/tests/{file}.py")
    for command in COMMANDS:
        run = f"PYTHONPATH=/usr/local/lib/standin exec {BASE}/bin/python3 -P -m tests.documentation.standin"
        lines.append(f"printf '#!/bin/sh\\n{run} {command} \"$@\"\\n' > usr/local/sbin/{command}")
        lines.append(f"chmod 755 usr/local/sbin/{command}")
    lines += [
        "rm -rf etc/fedclip var/lib/fedclip",
        f"grep -lIr {sys.prefix}/bin/python opt/fedclip/bin | xargs sed -i s:{sys.prefix}/bin:/opt/fedclip/bin:",
        "chroot . /opt/fedclip/bin/python -m pip uninstall --quiet --yes --root-user-action=ignore fedclip-flwr",
        "rm -f opt/fedclip/ready",
    ]
    return "\n".join(lines)


def why_not() -> str:
    """Why there can be no machines here; nothing if there can."""
    if os.geteuid() != 0:
        return "only root makes machines of namespaces"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"not installed here: {', '.join(missing)}"
    with tempfile.TemporaryDirectory() as place:
        trial = ["unshare", "--mount", "--net", "bash", "-ec", _TRIAL, "trial", place]
        done = subprocess.run(trial, capture_output=True, text=True)
    return f"no machines of namespaces here: {done.stderr.strip()}" if done.returncode else ""
