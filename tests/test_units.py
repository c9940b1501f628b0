"""The systemd units: that systemd understands them, and that what they start does start."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deploy.processes import SuperLink, SuperNode
from fedclip_flwr.operations import keys, simulation
from fedclip_flwr.operations.ports import free_ports
from tests import units

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = ("superlink", "supernode")


def unit(name: str) -> str:
    """The unit for this environment instead of /opt/fedclip."""
    text = (DEPLOY / f"fedclip-{name}.service").read_text()
    return text.replace("/opt/fedclip/bin", str(Path(sys.executable).parent))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_to_say_about_a_unit(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"fedclip-{name}.service"
    path.write_text(unit(name))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_starts_again_however_often_and_leaves_gpus_alone(name: str) -> None:
    lines = unit(name).splitlines()
    assert {"Restart=always", "RestartSec=10", "StartLimitIntervalSec=0", "NoNewPrivileges=yes"} <= {*lines}
    keys_of = {line.partition("=")[0] for line in lines}
    assert not keys_of & {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"}  # each hides GPUs


def started_by(name: str, more: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """A unit's command and environment; `more` stands in for the example file's variables."""
    given = units.variables((DEPLOY / f"{name}.env").read_text())
    assert more.keys() <= given.keys()
    return units.started_by(unit(name), {**given, **more})


@pytest.mark.federation
def test_what_the_units_start_finds_each_other(tmp_path: Path) -> None:
    """With the folders and ports of a test, but else as they are."""
    keys.make(tmp_path / "keys", "localhost", ["north"])
    fleet, control, apps, own = free_ports(4)
    config = tmp_path / "etc"
    config.mkdir()
    for file in [*(tmp_path / "keys" / "server").iterdir(), *(tmp_path / "keys" / "sites" / "north").iterdir()]:
        shutil.copy(file, config)
    (tmp_path / "lib").mkdir()
    (tmp_path / "flower").mkdir()
    simulation.connect(tmp_path / "flower", control, f'root-certificates = "{config / "ca.crt"}"')

    def here(name: str, **more: str) -> tuple[list[str], dict[str, str], Path]:
        places = {"/etc/fedclip": str(config), "/var/lib/fedclip": str(tmp_path / "lib")}
        places |= {"127.0.0.1:9093": f"127.0.0.1:{control}", "127.0.0.1:9091": f"127.0.0.1:{apps}"}
        command, env = started_by(name, more)
        for place, other in places.items():
            command = [word.replace(place, other) for word in command]
            env = {key: value.replace(place, other) for key, value in env.items()}
        return command, env, tmp_path / f"{name}.log"

    with simulation.started(*here("superlink", FLEET_ADDRESS=f"127.0.0.1:{fleet}")) as process:
        simulation.wait_for(fleet, process, tmp_path / "superlink.log")
        env = simulation.environment(tmp_path / "flower")
        link = SuperLink(tmp_path, env, fleet, control, apps, tmp_path / "keys", process)
        link.register("north")
        site = here("supernode", SUPERLINK=f"localhost:{fleet}", MORE=f"--clientappio-api-address 127.0.0.1:{own}")
        with simulation.started(*site) as node:
            link.wait_for([SuperNode("north", node, tmp_path / "supernode.log")])
    assert (tmp_path / "lib" / "superlink.db").is_file()
