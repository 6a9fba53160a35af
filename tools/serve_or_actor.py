"""What a deployment of Ray Serve costs beside a plain actor, both of an empty class, on a Ray of this machine.

python tools/serve_or_actor.py prints, as JSON, seconds until each answers, its processes' processor time, and their
memory (unique set size), of which Serve's controller and HTTP proxy are there once and the replica for each worker.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import psutil

from services.cluster.slow_start import patient
from services.cluster.stack import ray_environment


class Empty:
    async def hello(self) -> int:
        return 1

    async def __call__(self) -> int:
        return 1


def processes() -> dict[int, dict[str, float | str]]:
    """Of this one's descendants, by pid."""
    found: dict[int, dict[str, float | str]] = {}
    for process in psutil.Process().children(recursive=True):
        times, title = process.cpu_times(), " ".join(process.cmdline())
        cpu, memory = times.user + times.system, process.memory_full_info().uss / 1e6
        found[process.pid] = {"title": title.strip()[:60], "cpu_s": round(cpu, 2), "uss_mb": round(memory, 1)}
    return found


def new(before: dict[int, dict[str, float | str]]) -> list[dict[str, float | str]]:
    """The actors that were not there before."""
    now = processes()
    return [now[pid] for pid in now if str(now[pid]["title"]).startswith("ray::") and now[pid] != before.get(pid)]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="qaqm-", dir="/tmp") as place:
        (Path(place) / "token").write_text("t" * 64)
        ray_environment(Path(place))
        import ray
        from ray import serve

        with patient(180):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=80 << 20,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=f"{place}/r",
                _node_ip_address="127.0.0.1",
            )
        result: dict[str, object] = {"load": os.getloadavg()[0]}
        for name in ("warm", "actor"):  # the first finds nothing in the file cache
            before, began = processes(), time.monotonic()
            actor = ray.remote(Empty).options(num_cpus=0, name=name, lifetime="detached", namespace="m").remote()
            ray.get(actor.hello.remote())
            result[name] = {"seconds": round(time.monotonic() - began, 2), "processes": new(before)}
        before, began = processes(), time.monotonic()
        serve.start(proxy_location="HeadOnly", http_options={"port": 0})
        deployment = serve.deployment(Empty, ray_actor_options={"num_cpus": 0})
        serve.run(deployment.bind(), route_prefix=None).remote().result()
        result["serve"] = {"seconds": round(time.monotonic() - began, 2), "processes": new(before)}
        print(json.dumps(result, indent=1))
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
