"""docs/deploy.md, followed to the letter: a server, two sites, and a new server, each on a machine of its own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedclip_flwr.data.drawn import picture
from fedclip_flwr.flower import lines
from tests.documentation import session
from tests.documentation.machine import SERVER, Hall, why_not
from tests.documentation.pages import ROOT, blocks
from tests.documentation.shell import Course, Shell

SITES = {"north": 2, "south": 3}
"""With the last number of their machines' addresses."""
CLASSES = {"benign": "cat", "malignant": "fish"}
CONSTRAINTS = "constraints-http.txt" if lines.line() is lines.HTTP else "constraints.txt"
"""Of the line of Flower that is installed here, as on the machines: the page says where to write which."""
NAME = ("-c", "user.name=a reader", "-c", "user.email=reader@example.org")


class Guide:
    """The commands of the page, block by block; it knows which were asked for."""

    def __init__(self) -> None:
        self.blocks = [block for block in blocks(ROOT / "docs" / "deploy.md") if block.language == "bash"]
        self.asked: set[str] = set()

    def __call__(self, words: str, site: str = "north", but: str = "\0", more: str = "", **given: str) -> str:
        """Those of the one block with these words `but` not these, for that site.

        `given` is what stands for a placeholder, `more` the words that are added, instead of the page's own.
        """
        (block,) = [block for block in self.blocks if words in block.text and but not in block.text]
        self.asked.add(block.place)
        text = block.text.rstrip().replace("north", site).replace("constraints.txt", CONSTRAINTS)
        for placeholder, value in given.items():
            assert placeholder in text
            text = text.replace(placeholder, value)
        more = more or block.said.get("with", "")
        return f"{text} {more}" if more else text

    @property
    def forgotten(self) -> list[str]:
        return [block.place for block in self.blocks if block.place not in self.asked]


class Federation:
    """The machines, and what their administrators do again and again."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.guide = Guide()
        self.stack = stack
        self.hall = stack.enter_context(closing(Hall(place)))
        self.at: dict[str, Shell] = {}
        self.package = ""

    def machine(self, name: str, number: int, called: str = "", like: str = "") -> Shell:
        self.at[name] = self.stack.enter_context(closing(self.hall.machine(called or name, number, like)))
        return self.at[name]

    def log_in(self, name: str) -> None:
        """In the clone, with the `PATH` that a new login needs."""
        path, _, _ = self.guide("export PATH").partition("\n")
        self.at[name].run(f"cd ~/fedclip-flwr; {path}")

    def until(self, name: str, condition: str) -> None:
        """Waits for what somebody who types does not notice: a server that starts, a site that connects."""
        self.at[name].run(f"until {condition}; do sleep 0.2; done")

    def begin(self, command: str, words: str) -> None:
        """At the server, as one that goes on beside the next; until it says that."""
        self.at["server"].run(f"set -m; {{ {command}\n}} >/tmp/shown 2>&1 </dev/null &")
        self.until("server", f"grep {words} /tmp/shown || ! kill -0 %1")

    def shown(self) -> str:
        """What that shows until its end."""
        return self.at["server"].run("wait %1 || true; set +m; cat /tmp/shown")

    def number(self, status: str) -> str:
        """That of the latest run, which has this status."""
        output = self.at["server"].run(self.guide("flwr list"))
        latest = re.search(r"^│ (\d+) +│ \S+ +│ \S+ +│ (\S+) +│", output, re.MULTILINE)
        assert latest
        assert latest[2] == status
        return latest[1]

    def result(self) -> dict[str, Any]:
        """The summary of the latest run, which both sites have completed."""
        summary: dict[str, Any] = json.loads(self.at["server"].run("cat /var/lib/fedclip/runs/latest/summary.json"))
        assert summary["status"] == "completed"
        assert summary["adapted"]["sites"].keys() == {*SITES}
        return summary

    def connected(self, *sites: str) -> None:
        """Waits until these have a connection, and as many are online (which a new SuperLink believes at first)."""
        for site in sites:
            self.until("server", f"ss -Htn state established sport = :9092 | grep -q '10.9.0.{SITES[site]}\\b'")
        self.until("server", f"[ $(flwr supernode list hospitals | grep -c online) = {len(sites)} ]")

    def online(self, *sites: str) -> str:
        """What `doctor` tells at the server as soon as these sites are there, and none that is not."""
        self.connected(*sites)
        for _ in range(30):  # one whose time ran out with the old SuperLink is offline until its next heartbeat
            output = self.at["server"].run(self.guide("fedclip doctor server"))
            assert output.endswith(" 0 to fix\n"), output
            if re.findall(r"^ok +(\w+) +node \d+ is online$", output, re.MULTILINE) == [*sites]:
                return output
        raise AssertionError(output)


def package(output: str) -> str:
    """The hash of the package, as `doctor` tells it."""
    (found,) = re.findall(r"^ok +this package .* content (\w+):", output, re.MULTILINE)
    return str(found)


def origin(place: Path) -> Path:
    """This tree as a repository that can be cloned."""
    session.clone(place)
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "The agreed one"]):
        subprocess.run(["git", *NAME, *words], cwd=place, check=True)
    return place


def wheels(place: Path) -> Path:
    """What builds the package: pip would fetch it, but machines have no way out."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(place)]
    done = subprocess.run([*pip, *needed], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        pytest.fail(f"pip can't fetch what builds the package; it needs a package index:\n{done.stderr}", False)
    return place


def images(place: Path) -> Path:
    for site in SITES:
        for name, figure in CLASSES.items():
            (place / site / name).mkdir(parents=True)
            for number in range(20):
                seed = 5 + SITES[site]
                picture(seed, "photo", figure, number)[0].save(place / site / name / f"{number}.png")
    return place


def install(federation: Federation) -> None:
    """Once: the other machines have a copy of that disk."""
    new = federation.machine("new", 9)
    new.run("git clone --quiet /mnt/origin fedclip-flwr; cd fedclip-flwr")
    output = new.run(federation.guide("python3 -m venv"))
    assert "Successfully installed fedclip-flwr" in output
    federation.package = package(new.run(federation.guide("export PATH")))
    federation.at.pop("new").close()


def server(federation: Federation) -> None:
    guide, at = federation.guide, federation.machine("server", 1, like="new")
    federation.log_in("server")
    at.run(guide("server/* /etc/fedclip"))
    at.run(guide("deploy/superlink.env"))
    federation.until("server", "ss -tln | grep -q :9092")
    at.run(guide("[superlink.hospitals]"))
    output = at.run(guide("fedclip doctor server"))
    assert output.endswith(" 0 to fix\n"), output


def join(federation: Federation, site: str) -> None:
    """A site, as both its administrator and the server's do it."""
    guide, server = federation.guide, federation.at["server"]
    at = federation.machine(site, SITES[site], like="new")
    federation.log_in(site)
    at.run(guide("fedclip keys ~/fedclip-keys --site", site))
    at.run(f"cp ~/fedclip-keys/sites/{site}/node.pub /mnt/")
    server.run("cp /mnt/node.pub ~; cp /etc/fedclip/ca.crt /mnt/")
    server.run(guide("flwr supernode register", site))
    at.run("cp /mnt/ca.crt ~")
    at.run(guide("node.* ~/ca.crt", site))
    at.run(f"cp -r /mnt/images/{site} /data/")
    at.run(guide("editor", site))
    output = at.run(guide("as=", site))
    assert output.endswith(" 0 to fix\n"), output
    assert re.search("^ok +registration ", output, re.MULTILINE)
    at.run(guide("fedclip encode", site))
    at.run(guide("journalctl -a", site))


def run(federation: Federation) -> None:
    """Until there is something to see."""
    federation.online(*SITES)
    command = federation.guide("fedclip run --on hospitals", but="resume", more="num-server-rounds=100")
    federation.begin(command, "zero-shot")


def restart(federation: Federation) -> None:
    """The run ends with its server, which is started anew."""
    guide, at = federation.guide, federation.at["server"]
    at.run(guide("systemctl restart fedclip-superlink", but="mv"))
    output = federation.shown()
    assert re.search(r"^The run did not complete: .*\. If it completed a round, resume=latest", output, re.MULTILINE)
    federation.connected(*SITES)


def go_on(federation: Federation) -> None:
    """The run comes to its end, though Ctrl-C ends what shows it."""
    guide, at = federation.guide, federation.at["server"]
    federation.begin(guide("resume=latest"), "'resuming after round'")
    at.run("kill -INT %1")
    assert "No longer shown, but the run continues" in federation.shown()
    output = at.run(guide("flwr log RUN", RUN=federation.number("running")))
    assert "selected by validation" in output
    federation.number("finished:completed")
    assert federation.result()["rounds"] == 3


def verify(federation: Federation) -> None:
    """What a site's administrator looks at."""
    guide, at = federation.guide, federation.at["north"]
    output = at.run(guide("git status"))
    assert "The agreed one" in output
    assert "nothing to commit" in output
    assert package(output) == federation.package
    outgoing = at.run(guide("--show-outgoing"))
    assert "bytes" in outgoing
    assert re.fullmatch(rf"(ESTAB .*{SERVER}\]?:9092 .*\n)+", at.run(guide("ss -tpn")))
    came = at.run(guide("journalctl -u fedclip-supernode"))
    assert "Receiving: train message" in came


def renew(federation: Federation) -> None:
    """The certificate is another one; sites come back."""
    federation.at["server"].run(federation.guide("server.crt.old"))
    output = federation.at["server"].run("cmp ~/fedclip-keys/server/server.crt.old /etc/fedclip/server.crt || true")
    assert " differ: " in output
    federation.connected(*SITES)


def move(federation: Federation) -> None:
    """To a new machine, which has another address: sites find it by its name."""
    guide, old = federation.guide, federation.at["server"]
    runs = old.run("ls /var/lib/fedclip/runs")
    old.run(guide("umask 077"))
    old.run("cp ~/fedclip-backup.tar.gz /mnt/")
    old.close()
    new = federation.machine("server", 4, "new-server", like="new")
    for at in federation.at.values():
        at.run(f"sed -i s/{SERVER}/10.9.0.4/ /etc/hosts")
    federation.log_in("server")
    new.run("cp /mnt/fedclip-backup.tar.gz ~")
    new.run(guide("tar -C / -xzf"))
    federation.online(*SITES)
    assert new.run("ls /var/lib/fedclip/runs") == runs


def update(federation: Federation) -> None:
    """All come to another version, the sites after the server, so that it hears from them that they are stopped."""
    guide = federation.guide
    origin = f"{federation.hall.place}/post/origin"
    federation.hall.shell.run(f"cd {origin}; echo '# later' >> fedclip_flwr/base/errors.py")
    federation.hall.shell.run(f"git {shlex.join(NAME)} commit --quiet --all --message Later")
    commands = {name: guide("git pull") for name in federation.at}
    outputs = [federation.at["server"].run(commands.pop("server").replace("supernode", "superlink"))]
    federation.connected(*SITES)
    with ThreadPoolExecutor() as pool:
        outputs += pool.map(lambda name: federation.at[name].run(commands[name]), commands)
    (found,) = {package(one) for one in outputs}
    assert found != federation.package


def stop(federation: Federation) -> None:
    """A run, for which they find each other again; it is stopped."""
    guide = federation.guide
    federation.begin(guide("fedclip run --on", but="resume", more="num-server-rounds=100"), "zero-shot")
    federation.at["server"].run(guide("flwr stop", RUN=federation.number("running")))
    shown = federation.shown()
    assert "The run did not complete: finished:stopped" in shown
    for site in SITES:
        assert re.search(rf"^ +{site} +{site} +24 ", shown, re.MULTILINE)


def leave(federation: Federation) -> None:
    """For good."""
    guide, at = federation.guide, federation.at["server"]
    federation.at["south"].run(guide("systemctl disable"))
    federation.connected("north")  # and nobody else: Flower has noticed
    output = at.run(guide("fedclip doctor server"))
    left = re.search(r"south +node (\d+) is offline", output)
    assert left, output
    at.run(guide("unregister", NUMBER=left[1]))
    federation.online("north")


def nothing_forgotten(federation: Federation) -> None:
    """All blocks of the page were given."""
    assert not federation.guide.forgotten


STEPS: dict[str, Callable[[Federation], None]] = {
    "install": install,
    "server": server,
    **{f"join-{site}": partial(join, site=site) for site in SITES},
    "run": run,
    "restart": restart,
    "go-on": go_on,
    "verify": verify,
    "renew": renew,
    "move": move,
    "update": update,
    "stop": stop,
    "leave": leave,
    "nothing-forgotten": nothing_forgotten,
}


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """The steps, for machines that are there until the last one."""
    if why := why_not():
        pytest.skip(why)
    place = tmp_path_factory.mktemp("guide")
    with ExitStack() as stack:
        hall = place / "hall"
        hall.mkdir()
        federation = Federation(hall, stack)
        for folder in (origin(place / "origin"), wheels(place / "wheels"), images(place / "images")):
            federation.hall.post(folder)
        yield Course({name: partial(step, federation) for name, step in STEPS.items()})


@pytest.mark.documentation
@pytest.mark.parametrize("step", STEPS)
def test_who_follows_the_guide_has_a_federation_and_keeps_it(guide: Course, step: str) -> None:
    guide.take(step)
