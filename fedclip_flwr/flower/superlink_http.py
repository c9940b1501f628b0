"""The SuperLink of the HTTP line, with a listener of its own for each API.

Flower serves all of its APIs on one port: anyone who can reach it could register nodes, start runs, and take the tasks
of a run, with nothing but the authority's certificate. Here each API has its own port, with no routes but its own and
one that says that it is up:

- Fleet, for the sites: no proxy, path or header leads from its port to another API.
- Control, for Flower's commands, and ServerAppIo (Flower calls it Runtime), for a run's processes: on this machine
  only. A task is given only to a process that knows a secret, made anew at each start.

To the Fleet API are added: no node can answer in another's name, a request has a size limit, and answers tell Flower's
version, for `fedclip doctor`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from flwr.common.constant import ISOLATION_MODE_SUBPROCESS  # tasks are taken by a child of the SuperLink
from flwr.supercore.address import parse_address  # addresses, as the flags are read
from flwr.supercore.constant import FLWR_PACKAGE_VERSION_METADATA_KEY as VERSION  # how Flower's clients tell theirs
from flwr.supercore.http_logging import get_uvicorn_log_config  # the SuperLink's own log
from flwr.supercore.logger import console_handler  # its level
from flwr.supercore.routers import health  # a route that says that it is up
from flwr.supercore.routers.runtime import create_runtime_router, responses_router  # the API of a run's processes
from flwr.superlink import main as flower  # the whole application: no part can be left out
from flwr.superlink.routers.control import router as control  # the API of Flower's commands
from flwr.superlink.routers.fleet.router import router as fleet  # the API of the sites
from flwr.superlink.servicer.fleet import fleet_handlers  # its functions: an answer's sender is not compared

from fedclip_flwr.base import UserError
from fedclip_flwr.flower import lines
from fedclip_flwr.flower.patching import replace
from fedclip_flwr.flower.superlink import objection

cli: Any = import_module("flwr.superlink.cli.flower_superlink")
"""The command, and what it starts: a function has the same name there."""
LARGEST = 2**26
"""Maximum bytes of a request, which Flower reads before it checks who sends it; its own have 20 MB at most."""
PATIENCE = 75
"""Seconds for which an idle connection is kept: longer than the 30 between two heartbeats."""
LAST = 5
"""Seconds that open requests get when the SuperLink is asked to stop."""
DEFAULTS = {"fleet": "0.0.0.0:9092", "control": "127.0.0.1:9093", "serverappio": "127.0.0.1:9091"}


def parsed(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The addresses of the three APIs, and the options that are Flower's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for api, default in DEFAULTS.items():
        parser.add_argument(f"--{api}-api-address", dest=api, default=default)
    addresses, theirs = parser.parse_known_args(options)
    return vars(addresses), theirs


def check(options: Sequence[str]) -> None:
    """Raise if other machines would reach more than the Fleet API."""
    addresses, theirs = parsed(options)
    if given := {option.partition("=")[0] for option in theirs} & {"--host", "--port"}:
        raise UserError(
            f"{' and '.join(sorted(given))}: each API has its own address here; give --fleet-api-address for the "
            "sites, --control-api-address for Flower's commands, --serverappio-api-address for a run's processes"
        )
    for api, text in addresses.items():
        if not (found := parse_address(text)) or not found[0]:
            raise UserError(f"--{api}-api-address {text!r}: expected HOST:PORT, such as {DEFAULTS[api]}")
        if api != "fleet" and not lines.is_loopback(found[0]):
            raise UserError(
                f"--{api}-api-address {text}: anyone who reaches it can start runs; give an address of this machine "
                f"only, such as {DEFAULTS[api]}, and reach it from elsewhere by `ssh -L`"
            )


def bound(api: str, text: str) -> socket.socket:
    """A socket that listens at that address."""
    host, port, six = parse_address(text) or ("", 0, None)
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if six else socket.AF_INET, backlog=2048)
    except OSError as error:
        raise UserError(f"--{api}-api-address {text}: can't listen there ({error.strerror or error})") from None


class Listener(uvicorn.Server):
    """One of several servers in this process, which stop together."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(listeners: Sequence[tuple[Listener, socket.socket]]) -> None:
    """Run the servers until this process is asked to stop, or one of them ends; the last one ends last."""
    *others, last = listeners

    def stop() -> None:
        for listener, _ in others:
            listener.should_exit = True

    async def run(listener: Listener, at: socket.socket) -> None:
        try:
            await listener.serve([at])
        finally:
            stop()

    async def run_others() -> None:
        try:
            await asyncio.gather(*(run(*one) for one in others))
        finally:
            last[0].should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await asyncio.gather(run_others(), run(*last))


def guarded(app: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an application for requests from anywhere: their size is limited, and answers tell Flower's version."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_version(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (VERSION.encode(), lines.installed().encode())]
            await send(message)

        if scope["type"] == "http":
            headers = dict(scope["headers"])
            size = headers.get(b"content-length", b"0" if scope["method"] in ("GET", "HEAD") else b"")
            if not size.isdigit() or int(size) > LARGEST or b"transfer-encoding" in headers:
                status = 413 if size.isdigit() else 411
                await send_with_version({"type": "http.response.start", "status": status, "headers": []})
                await send_with_version({"type": "http.response.body"})
                return
        await app(scope, receive, send_with_version)

    return call


def applications(config: Any) -> dict[str, Callable[..., Any]]:
    """An application for each API; they share the SuperLink's state, which lives with the one of ServerAppIo."""
    whole = flower.create_app(config, cli.SuperLinkLifespan)
    routers = {
        "fleet": [fleet],
        "control": [control],
        "serverappio": [create_runtime_router("SuperLink"), responses_router],
    }
    made: dict[str, Callable[..., Any]] = {}
    for api, routes in routers.items():
        lifespan = whole.router.lifespan_context if api == "serverappio" else None
        app = FastAPI(openapi_url=None, lifespan=lifespan, middleware=flower._get_middleware())
        app.state = whole.state
        for router in (health.router, *routes):
            app.include_router(router)
        made[api] = guarded(app) if api == "fleet" else app
    return made


def run(addresses: dict[str, str], config: Any, secret: Path) -> None:
    """Serve all APIs with that configuration; processes that take tasks show the secret."""
    sockets = {api: bound(api, text) for api, text in addresses.items()}
    config.host, config.port = sockets["serverappio"].getsockname()[:2]
    if config.isolation == ISOLATION_MODE_SUBPROCESS:
        config.superexec_auth_secret = secrets.token_bytes(32)
        secret.write_bytes(config.superexec_auth_secret)
    listeners = []
    for api, app in applications(config).items():
        secured = (
            {} if api == "serverappio" else {"ssl_keyfile": config.ssl_keyfile, "ssl_certfile": config.ssl_certfile}
        )
        settings = uvicorn.Config(
            app,
            lifespan="on" if api == "serverappio" else "off",
            access_log=console_handler.level <= logging.DEBUG,
            log_config=get_uvicorn_log_config(console_handler.level),
            timeout_keep_alive=PATIENCE,
            timeout_graceful_shutdown=LAST,
            **secured,
        )
        listeners.append((Listener(settings), sockets[api]))
        logging.getLogger("flwr").info("The %s API listens at %s", api, addresses[api])
    asyncio.run(serve(listeners))
    if not all(listener.started for listener, _ in listeners):
        raise UserError("the SuperLink did not start: the lines above say why")


def owned(push: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Flower's handler of answers: it refuses those in another node's name."""

    @functools.wraps(push)
    def pushed(request: Any, state: Any) -> Any:
        if why := objection(request, b""):
            raise HTTPException(401, why)
        return push(request, state)

    return pushed


def main(options: Sequence[str]) -> None:
    addresses, theirs = parsed(options)
    with tempfile.TemporaryDirectory(prefix="fedclip-") as folder:
        secret = Path(folder, "secret")

        def superexec(*, runtime_address: str, parent_pid: int, **_: Any) -> list[str]:
            command = ["flower-superexec", "--insecure", "--runtime-api-address", runtime_address]
            return [*command, "--parent-pid", str(parent_pid), "--superexec-auth-secret-file", str(secret)]

        def serve_apart(lifespan_config: Any) -> None:
            run(addresses, lifespan_config, secret)

        replace(fleet_handlers, push_messages=owned(fleet_handlers.push_messages))
        replace(cli, _get_superexec_command=superexec, _run_superlink_http_api=serve_apart)
        sys.argv = ["flower-superlink", *theirs]
        try:
            cli.flower_superlink()
        except UserError as error:
            sys.exit(str(error))
