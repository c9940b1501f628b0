"""What any machine needs: versions, a place for what is kept, and a device to compute on."""

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

from fedclip_flwr.base import content, files
from fedclip_flwr.base.errors import FaultError
from fedclip_flwr.base.text import bytes_of
from fedclip_flwr.operations.doctor.findings import Examination

NAME = "fedclip-flwr"
TOLD = ("flwr", "grpcio", "torch", "transformers")
"""Packages whose versions are worth a word."""
SPARE = 500 * 10**6
"""Bytes that should be free besides what encoding takes."""
DRIVER = Path("/proc/driver/nvidia/version")


def examine(ex: Examination) -> None:
    ex.look("Python", _python, ex)
    ex.look("packages", _packages, ex)
    ex.look("this package", _package, ex)
    ex.look("FEDCLIP_HOME", _home, ex)
    ex.look("GPU", _gpus, ex)


def _python(ex: Examination) -> None:
    needed, own = _about("Requires-Python") or "", platform.python_version()
    if not SpecifierSet(needed).contains(own, prereleases=True):
        raise FaultError(f"{own}, and {needed} is needed", f"install {NAME} with another Python")
    ex.ok("Python", f"{own} in {sys.prefix}")


def _about(key: str) -> str | None:
    try:
        return metadata.metadata(NAME)[key]
    except metadata.PackageNotFoundError:
        raise FaultError(
            f"{NAME} is not installed in {sys.prefix}", "install it there, and call its own fedclip"
        ) from None


def _packages(ex: Examination) -> None:
    """The versions that this package asks for."""
    _about("Version")
    needs = [Requirement(text) for text in metadata.requires(NAME) or ()]
    needs = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    found = {need.name: _version(need.name) for need in needs}
    wrong = [need for need in needs if not need.specifier.contains(found[need.name] or "0", prereleases=True)]
    if wrong:
        told = ", ".join(f"{need.name} is {found[need.name] or 'missing'}, needed {need.specifier}" for need in wrong)
        wanted = " ".join(shlex.quote(str(need).partition(";")[0].strip()) for need in wrong)
        raise FaultError(told, f"{shlex.quote(sys.executable)} -m pip install {wanted}")
    ex.ok("packages", f"{', '.join(f'{name} {_version(name)}' for name in TOLD)}; all {len(needs)} as needed")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package(ex: Examination) -> None:
    """Its content is what server and sites compare."""
    own = content.of_package(content.memory())[:12]
    ex.ok("this package", f"{NAME} {_version(NAME)}, content {own}: the same at the server and at every site")


def _home(ex: Examination) -> None:
    home = files.home()
    with files.writing_to(home), tempfile.TemporaryFile(dir=home) as file:
        file.write(b"x")
    ex.ok("FEDCLIP_HOME", f"{home} can be written to")


def _gpus(ex: Examination) -> None:
    count = torch.cuda.device_count()
    for number in range(count):
        free, whole = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        ex.ok("GPU", f"cuda:{number}, {name}, {bytes_of(free)} of {bytes_of(whole)} free")
    if not count and DRIVER.exists() and not torch.version.cuda:
        ex.note("GPU", f"not used: torch {torch.__version__} is one for CPUs", "install the torch for CUDA, if wanted")
    elif not count:
        ex.note("GPU", "none that CUDA finds: encoding and learning are done by the CPU")


def free(ex: Examination, needed: int) -> None:
    """Whether there is room for so many bytes more, and some."""
    home = files.home()
    there = next((folder for folder in (home, *home.parents) if folder.is_dir()), Path("/"))
    have = shutil.disk_usage(there).free
    told = f"{bytes_of(have)} free at {home}" + (f", encoding takes {bytes_of(needed)}" if needed else "")
    if have < needed + SPARE:
        raise FaultError(told, f"make room for {bytes_of(needed + SPARE)}, or let FEDCLIP_HOME name a larger disk")
    ex.ok("disk", told)
