"""`qaq status`: what runs, how busy it is, and why something does not run."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from services.cli.options import JsonPath
from services.cli.running import Address, where
from services.cli.terminal import screen, size

if TYPE_CHECKING:
    from services.cluster.state import StackSettings, StackState
    from services.cluster.status import StackStatus
    from services.cluster.survey import Survey


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Stack")(status)


def status(json_path: JsonPath = None, address: Address = None) -> None:
    """Shows the servers and their load; on a Ray cluster the nodes, too."""
    from services.cluster import control

    stack = where(address)
    if isinstance(stack, str) or stack.address is not None:
        _show_survey(control.survey(stack), json_path)
    else:
        _show_local(stack, json_path)
    if isinstance(stack, str) or any(served.max_workers for served in stack.settings.models):
        for model, told in control.scaled(stack).items():
            screen.print(f"{model}: {told}", highlight=False, soft_wrap=True)


def _show_local(running: StackState, json_path: Path | None) -> None:
    from services.cluster import restarts, state
    from services.cluster.status import stack_status

    again = restarts.restarted(running.directory)
    found = asyncio.run(stack_status(running.access))
    if json_path is not None:
        _write(
            json_path,
            _load(found)
            | {
                "redis": running.redis["description"],
                "restarts": {name: record.model_dump() for name, record in again.items()},
                "ca": str(state.ca()) if running.certificates else None,
                "keys": str(running.keys) if running.keys else None,
            },
        )
    screen.print(_table(running, found))
    for name, record in again.items():
        times = "once" if record.restarts == 1 else f"{record.restarts} times, the last time"
        when = time.strftime("%H:%M:%S", time.localtime(record.ended))
        screen.print(f"{name} was started again {times} after {when}: {record.why}", highlight=False, soft_wrap=True)


def _show_survey(survey: Survey, json_path: Path | None) -> None:
    from dataclasses import asdict

    if json_path is not None:
        servers = {server.name: {k: v for k, v in asdict(server).items() if k != "name"} for server in survey.servers}
        there = {node.id: {k: v for k, v in asdict(node).items() if k != "id"} for node in survey.nodes}
        _write(json_path, _load(survey.load) | {"redis": survey.redis, "servers": servers, "nodes": there})
    table = Table(title=_title(survey.settings, survey.load), title_justify="left")
    for column in ("role", "address", "node", "state"):
        table.add_column(column)
    for server in survey.servers:
        state = server.why or _of(server.address, survey.load)
        if server.restarts:
            state += f"; started again {'once' if server.restarts == 1 else f'{server.restarts} times'}"
        table.add_row(server.name, server.address, server.node[:8], state)
    table.add_row("redis", survey.redis, "", survey.why)
    screen.print(table)
    for node in survey.nodes:
        runs = [server.name for server in survey.servers if server.node == node.id]
        gpus = f", {node.gpus:g} GPUs" if node.gpus else ""
        drained = ", drained" if node.drained else ""
        what = ", ".join(runs) or "nothing"
        screen.print(f"node {node.id} at {node.address}{gpus}{drained}: {what}", highlight=False, soft_wrap=True)
    workers = sum(server.name.startswith("worker") and not server.why for server in survey.servers)
    wanted = sum(served.workers for served in survey.settings.models)
    if workers < wanted:
        screen.print(f"{workers} of {wanted} workers serve.", highlight=False)


def _title(settings: StackSettings, found: StackStatus) -> str:
    """The models that are served."""
    return ", ".join(_models(found)) or ", ".join(served.model for served in settings.models)


def _models(found: StackStatus) -> list[str]:
    return sorted({worker.model.name for worker in found.workers.values() if worker})


def _load(found: StackStatus) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return {
        "routers": found.routers,
        "workers": {a: MessageToDict(w) if w else None for a, w in found.workers.items()},
        "draining": sorted(found.draining),
        "originals": {a: MessageToDict(o) if o else None for a, o in found.originals.items()},
    }


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def _of(address: str, found: StackStatus) -> str:
    """What a server says of its load."""
    if address in found.workers:
        worker = found.workers[address]
        load = (
            f"{worker.running} running, {worker.waiting} waiting, {worker.sessions} sessions, "
            f"{size(worker.kv_bytes)} of cache"
            if worker
            else "does not answer"
        )
        if worker and len(_models(found)) > 1:
            load = f"{worker.model.name}: {load}"
        if address in found.draining:
            return f"draining: {load}" if worker and worker.running + worker.waiting else "drained; it can be stopped"
        return load
    if address in found.originals:
        store = found.originals[address]
        return f"{store.pages} pages, {size(store.bytes)}" if store else "does not answer"
    return "running"


def _table(running: StackState, found: StackStatus) -> Table:
    from services.cluster import state

    table = Table(title=_title(running.settings, found), title_justify="left")
    for column in ("role", "address", "state"):
        table.add_column(column)
    for address in found.routers:
        table.add_row("router", address, _of(address, found))
    if running.gateway is not None:
        table.add_row("gateway", running.gateway, "")
    for address in found.workers:
        table.add_row("worker", address, _of(address, found))
    for address in found.originals:
        table.add_row("originals", address, _of(address, found))
    table.add_row("redis", "", running.redis["description"])
    if running.certificates is not None:
        table.add_row("CA", "", str(state.ca()))
    without = "of QAQ_TENANTS_FILE" if running.settings.keys else "not asked for"
    table.add_row("keys", "", f"in {running.keys}" if running.keys else without)
    return table
