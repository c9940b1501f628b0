"""Checks that every machine needs: versions, a folder for stored files, and a device to compute on."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedclip_flwr.base import content, files, plugins
from fedclip_flwr.base.errors import FaultError
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.flower import lines
from fedclip_flwr.operations.doctor.findings import Examination

NAME = "fedclip-flwr"
SHOWN = ("flwr", "grpcio", "torch", "transformers")
"""Packages whose versions are shown."""
SPARE = 500 * 10**6
"""Bytes that should be free in addition to what encoding needs."""
DRIVER = Path("/proc/driver/nvidia/version")


def examine(ex: Examination) -> None:
    ex.look("Python", _python, ex)
    ex.look("packages", _packages, ex)
    ex.look("Flower", _flower, ex)
    ex.look("this package", _package, ex)
    ex.look("plug-in", _plugins, ex)
    ex.look("FEDCLIP_HOME", _home, ex)
    ex.look("GPU", _gpus, ex)


def _python(ex: Examination) -> None:
    needed, own = _about("Requires-Python") or "", platform.python_version()
    if not SpecifierSet(needed).contains(own, prereleases=True):
        raise FaultError(f"{own}, but {needed} is required", f"install {NAME} with another Python")
    ex.ok("Python", f"{own} in {sys.prefix}")


def _about(key: str) -> str | None:
    try:
        return metadata.metadata(NAME)[key]
    except metadata.PackageNotFoundError:
        raise FaultError(
            f"{NAME} is not installed in {sys.prefix}", "install it there, and run fedclip from there"
        ) from None


def _packages(ex: Examination) -> None:
    """Checks the versions that this package requires."""
    _about("Version")
    needs = [Requirement(text) for text in metadata.requires(NAME) or ()]
    needs = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    found = {need.name: _version(need.name) for need in needs}
    wrong = [need for need in needs if not need.specifier.contains(found[need.name] or "0", prereleases=True)]
    if wrong:
        text = ", ".join(f"{need.name} is {found[need.name] or 'missing'}, needed {need.specifier}" for need in wrong)
        wanted = " ".join(shlex.quote(str(need).partition(";")[0].strip()) for need in wrong)
        raise FaultError(text, f"{shlex.quote(sys.executable)} -m pip install {wanted}")
    ex.ok("packages", f"{', '.join(f'{name} {_version(name)}' for name in SHOWN)}; all {len(needs)} as needed")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _flower(ex: Examination) -> None:
    """Reports which line of Flower this machine has: all of a federation need the same."""
    found = f"{lines.installed()}, {lines.line().transport} between sites and server"
    if warning := lines.untested():
        ex.note("Flower", found, warning)
    else:
        ex.ok("Flower", found)


def _package(ex: Examination) -> None:
    """Reports the package's content hash, which must be the same at server and sites."""
    own = content.of_package(content.memory())[:12]
    ex.ok("this package", f"{NAME} {_version(NAME)}, content {own}: must be the same at the server and all sites")


def _plugins(ex: Examination) -> None:
    """Reports the plug-ins that a server may use."""
    for name, version in plugins.allowed().items():
        if version:
            ex.ok("plug-in", f"{name} {version}: must be the same at the server and all sites that use it")
        else:
            ex.note("plug-in", f"{name} is not installed here", f"install it, or take it out of {plugins.ALLOWED}")


def _home(ex: Examination) -> None:
    home = files.home()
    with files.writing_to(home), tempfile.TemporaryFile(dir=home) as file:
        file.write(b"x")
    ex.ok("FEDCLIP_HOME", f"{home} is writable")


def _gpus(ex: Examination) -> None:
    count = torch.cuda.device_count()
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        ex.ok("GPU", f"cuda:{number}, {name}, {bytes_of(free)} of {bytes_of(total)} free")
    if not count and DRIVER.exists() and not torch.version.cuda:
        ex.note("GPU", f"not used: torch {torch.__version__} is for CPUs only", "install torch with CUDA, if wanted")
    elif not count:
        ex.note("GPU", "CUDA finds none: encoding and training run on the CPU")


def free(ex: Examination, needed: int) -> None:
    """Checks that the disk has room for `needed` bytes and some spare."""
    home = files.home()
    there = next((folder for folder in (home, *home.parents) if folder.is_dir()), Path("/"))
    have = shutil.disk_usage(there).free
    found = f"{bytes_of(have)} free at {home}" + (f", encoding needs {bytes_of(needed)}" if needed else "")
    if have < needed + SPARE:
        raise FaultError(found, f"make room for {bytes_of(needed + SPARE)}, or set FEDCLIP_HOME to a larger disk")
    ex.ok("disk", found)
