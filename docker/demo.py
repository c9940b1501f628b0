"""A server and three sites in containers, each site with its own network and keys: runs once, then removes all.

    python3 docker/demo.py [--rounds N] [--keep]

Needs only a Docker engine and Compose. It builds the image, lets `compose.yml` make the keys, start the server,
register the sites and start them, runs a federation, and copies its run folder to docker-run/. With
CONSTRAINTS=constraints-http.txt in the environment it takes Flower's HTTP line.
However it ends, only that folder remains; with --keep also the image, so that the next run is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

PROJECT = Path(__file__).resolve().parent.parent
SITES = ("photo", "art", "cartoon")
RUNS = "/var/lib/fedclip/runs"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """An error, in one line that says what to do."""


class Shown:
    """Shows progress of a long step: on a terminal in one line, else as a line every ten seconds."""

    def __init__(self, title: str) -> None:
        self._title, self._begun = title, time.monotonic()
        self._next, self._live = 2.0, sys.stdout.isatty()

    def tell(self, news: str = "") -> None:
        seconds = time.monotonic() - self._begun
        if seconds >= self._next:
            self._next = seconds + (1 if self._live else 10)
            width = shutil.get_terminal_size().columns - 1
            text = f"{self._title} … {seconds:.0f} s  {news}"[:width]
            print(f"\r{text:<{width}}" if self._live else text, end="" if self._live else "\n", flush=True)

    def end(self, how: str = "") -> None:
        width = shutil.get_terminal_size().columns - 1 if self._live else 0
        text = f"{self._title}: {how or 'done'}, {time.monotonic() - self._begun:.0f} s"
        print(f"\r{text:<{width}}" if self._live else text, flush=True)


class Federation:
    """The containers of one compose project, with a unique name and image."""

    def __init__(self, log: Path, name: str = "", image: str = "") -> None:
        self.name = name or f"fedclip-demo-{secrets.token_hex(3)}"
        self.image = image or self.name
        self.log = log
        self._compose = [*compose(), "-p", self.name, "-f", str(PROJECT / "docker" / "compose.yml")]
        self.env = {**os.environ, "FEDCLIP_IMAGE": self.image}

    def build(self) -> None:
        """Builds the image; `built` finds in its log which images to remove."""
        index = f"TORCH_INDEX={os.environ.get('TORCH_INDEX', '')}"
        pinned = f"CONSTRAINTS={os.environ.get('CONSTRAINTS', 'constraints.txt')}"
        command = ["docker", "build", "--force-rm", "--file", "docker/Dockerfile", "--tag", self.image]
        command += ["--build-arg", index, "--build-arg", pinned, "."]
        self._do("building the image, minutes the first time", command)

    def up(self) -> None:
        """Makes keys, starts the server, registers and starts the sites, and waits until they are connected."""
        try:
            self._do("starting a server and three sites", self.command("up", "--detach", "--no-build"))
            self.wait_for_sites()
        except DemoError:
            print(self.last_words(8), file=sys.stderr)
            raise

    def last_words(self, lines: int) -> str:
        """The last lines of each container's log."""
        logs = quietly(self.command("logs", "--no-color", "--tail", str(lines)), self.env)
        return logs.stdout + logs.stderr

    def wait_for_sites(self, seconds: float = 180) -> None:
        shown, deadline = Shown(f"{len(SITES)} sites connect"), time.monotonic() + seconds
        while (there := self.online()) < len(SITES):
            if time.monotonic() > deadline:
                raise DemoError(f"{there} of {len(SITES)} sites are connected after {seconds:.0f} s: try again")
            shown.tell(f"{there} of {len(SITES)}")
            time.sleep(0.5)
        shown.end()

    def online(self) -> int:
        """The number of sites connected to the server."""
        nodes = self.flwr("supernode", "list").get("nodes", [])
        return sum(node["status"] == "online" for node in nodes)

    def flwr(self, *words: str) -> Any:
        """The answer of one of Flower's commands on the server; empty while the server is not running."""
        command = ["timeout", "30", "flwr", *words, "--format", "json"]  # a server that restarts may never answer
        output = self.execute("superlink", *command).stdout
        with contextlib.suppress(ValueError):
            return json.loads(output[output.index("{") :])
        return {}

    def execute(self, service: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a service's container."""
        return quietly(["docker", "exec", self.container(service), *words])

    def command(self, *words: str) -> list[str]:
        return [*self._compose, *words]

    def start_run(self, *settings: str, output: Any = None) -> subprocess.Popen[bytes]:
        """Starts a run on the server, which writes to `output`."""
        words = ["fedclip", "run", "--on", "superlink", *settings]
        return _popen(["docker", "exec", self.container("superlink"), *words], self.env, output)

    def container(self, service: str) -> str:
        """The id of that service's container."""
        wanted = (f"project={self.name}", f"service={service}", "oneoff=False")
        filters = [f"--filter=label=com.docker.compose.{label}" for label in wanted]
        return quietly(["docker", "ps", "--all", "--quiet", *filters]).stdout.strip()

    def fetch(self, folder: Path) -> Path:
        """Copies the newest run's folder out of the server's container."""
        name = self.execute("superlink", "readlink", f"{RUNS}/latest").stdout.strip()
        folder.mkdir(parents=True, exist_ok=True)
        done = quietly(["docker", "cp", f"{self.container('superlink')}:{RUNS}/{name}", str(folder / name)])
        if done.returncode:
            raise DemoError(f"the run's folder could not be copied to {folder}: {last_line(done.stderr)}")
        return folder / name

    def down(self, keep: bool = False) -> None:
        """Removes containers, networks and volumes; unless `keep`, also the images."""
        self._do("removing containers", self.command("down", "--volumes", "--remove-orphans", "--timeout", "5"))
        if not keep:
            for image in [self.image, *built(self.log.read_text(errors="replace"))]:
                quietly(["docker", "image", "rm", image])
        if found := self.leftovers(keep):
            raise DemoError(
                f"not removed: {', '.join(found)}; remove it with docker rm, network rm, volume rm, image rm"
            )

    def leftovers(self, keep: bool = False) -> list[str]:
        """The names of all that this project has."""
        own = f"--filter=label=com.docker.compose.project={self.name}"
        kinds = (
            ["ps", "--all", "--format={{.Names}}"],
            ["network", "ls", "--format={{.Name}}"],
            ["volume", "ls", "-q"],
        )
        found = [name for kind in kinds for name in quietly(["docker", *kind, own]).stdout.split()]
        images = [] if keep else [self.image, *built(self.log.read_text(errors="replace"))]
        return found + [i for i in images if not quietly(["docker", "image", "inspect", i]).returncode]

    def _do(self, title: str, command: Sequence[str]) -> None:
        """Runs a command with its output in the log; shows the last line of it, and its end if the command fails."""
        shown = Shown(title)
        with self.log.open("ab") as log, _ended(_popen(command, self.env, log)) as process:
            begun = log.tell()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                    break
                shown.tell(last_line(self._said(begun)))
        if process.returncode:
            print("\n" + "\n".join(self._said(begun).splitlines()[-15:]), file=sys.stderr)
            raise DemoError(f"{title}: failed, see above; fix that and try again")
        shown.end()

    def _said(self, begun: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begun)
            return log.read().decode(errors="replace")


def compose() -> list[str]:
    """The command for Compose; raises if no Docker engine answers."""
    if not shutil.which("docker"):
        raise DemoError("the command docker was not found: install Docker with Compose, then try again")
    done = quietly(["docker", "version", "--format", "{{.Server.Version}}"])
    if done.returncode:
        raise DemoError(
            f"no Docker engine answers ({last_line(done.stderr)}): start it, or set DOCKER_HOST to a running one"
        )
    if not quietly(["docker", "compose", "version"]).returncode:
        return ["docker", "compose"]
    if not shutil.which("docker-compose"):
        raise DemoError(
            "neither `docker compose` nor docker-compose was found: install Docker's Compose, then try again"
        )
    version = quietly(["docker-compose", "version", "--short"]).stdout.strip()
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < [1, 29]:
        raise DemoError(f"docker-compose {version} is too old: expected 1.29 or newer")
    return ["docker-compose"]


def built(log: str) -> list[str]:
    """The images in the log of Docker's classic builder, newest first; none for BuildKit's log."""
    steps = [step for step in re.split(r"^Step ", log, flags=re.MULTILINE)[1:] if "---> Using cache" not in step]
    own = [step for step in steps if not re.match(r"\S+ : FROM ", step)]
    return [made for step in reversed(own) for made in re.findall(r"^ ---> ([0-9a-f]{12})$", step, re.MULTILINE)]


def quietly(command: Sequence[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end and captures its output."""
    return subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _popen(command: Sequence[str], env: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    """Starts a command in the project's folder; Ctrl-C does not reach it."""
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends the process at the end of the block."""
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def last_line(text: str) -> str:
    """The last line that says something, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return next((line.strip() for line in reversed(re.split(r"[\r\n]", plain)) if line.strip()), "")


@contextlib.contextmanager
def stopping_in_order() -> Iterator[None]:
    """Turns a stop signal into SystemExit; signals after the first one are ignored."""

    def stop(number: int, frame: object) -> NoReturn:
        undisturbed()
        sys.exit(128 + number)

    def undisturbed() -> None:
        for each in STOPS:
            signal.signal(each, lambda *_: None)

    for each in STOPS:
        signal.signal(each, stop)
    try:
        yield
    finally:
        undisturbed()


def demonstrate(federation: Federation, rounds: int) -> None:
    """Builds the image, runs a federation, and copies its run folder."""
    federation.build()
    federation.up()
    with _ended(federation.start_run(f"num-server-rounds={rounds}")) as run:
        if run.wait():
            raise DemoError("the run was not completed: its last lines say why")
    print(f"Run folder, copied: {federation.fetch(PROJECT / 'docker-run')}")


def succeeds(step: Callable[[], object]) -> bool:
    """Runs the step; prints an error and returns False if it fails."""
    try:
        step()
    except DemoError as error:
        print(error, file=sys.stderr)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="docker/demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds (default: 10)")
    parser.add_argument("--keep", action="store_true", help="keep the image, as fedclip, so that the next run is quick")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        try:
            federation = Federation(Path(place) / "log", image="fedclip" if given.keep else "")
        except DemoError as error:
            sys.exit(str(error))
        try:
            with stopping_in_order():
                completed = succeeds(lambda: demonstrate(federation, given.rounds))
        finally:
            removed = succeeds(lambda: federation.down(given.keep))
    return 0 if completed and removed else 1


if __name__ == "__main__":
    sys.exit(main())
