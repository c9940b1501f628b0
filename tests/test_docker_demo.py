"""The demo of containers, as far as it goes without any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import demo


def test_of_a_classic_build_the_images_are_those_that_it_made() -> None:
    log = (
        "Sending build context\nStep 1/5 : FROM python AS build\n ---> 0c9b1a0abb0a\nStep 2/5 : WORKDIR /src\n"
        " ---> Using cache\n ---> aaaaaaaaaaaa\nStep 3/5 : RUN true\n ---> Running in 300ec262e776\n"
        "Removing intermediate container 300ec262e776\n ---> bbbbbbbbbbbb\nStep 4/5 : FROM python\n"
        " ---> 0c9b1a0abb0a\nStep 5/5 : COPY a b\n ---> cccccccccccc\nSuccessfully built cccccccccccc\n"
    )
    assert demo.built(log) == ["cccccccccccc", "bbbbbbbbbbbb"]


def test_without_an_engine_the_demo_says_so_in_a_line(tmp_path: Path) -> None:
    env = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/no.sock"}
    done = subprocess.run([sys.executable, demo.__file__], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = done.stderr.splitlines()
    assert "start it, or set DOCKER_HOST to" in said or "install Docker" in said
