"""docker-compose.yml and what goes over it, without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from services.common.settings import GatewaySettings, OriginalsSettings, RouterSettings, WorkerSettings

from .engine import DOCKERFILE, ROOT

FILES = [ROOT / "docker-compose.yml", ROOT / "docker-compose.gpu.yml"]
COMPOSE, GPU = (yaml.safe_load(path.read_text()) for path in FILES)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SETTINGS = {
    "router": RouterSettings,
    "worker": WorkerSettings,
    "originals": OriginalsSettings,
    "gateway": GatewaySettings,
}


def test_they_are_valid_by_the_compose_specification() -> None:
    """check-jsonschema brings the specification's own schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, *FILES], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_no_command_and_no_environment_holds_a_secret() -> None:
    for path in FILES:
        assert not re.search(r"requirepass|redis://|rediss://|HF_TOKEN:|PASSWORD:", path.read_text())


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits_few_rights_and_a_health_check(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there_or_made(name: str) -> None:
    for volume in SERVICES[name]["volumes"]:
        source = volume.partition(":")[0]
        if not source.startswith("./"):
            assert source in COMPOSE["volumes"]
        elif not source.startswith("./deploy/secrets/"):
            assert (ROOT / source).exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_role_is_given_only_settings_that_it_has(name: str) -> None:
    for variable in SERVICES[name]["environment"]:
        if variable.startswith("QAQ_"):
            assert variable.removeprefix("QAQ_").lower() in SETTINGS[name].model_fields


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "redis"])
def test_who_is_needed_is_healthy_before(name: str) -> None:
    needed = SERVICES[name].get("depends_on", {})
    assert all(needs == {"condition": "service_healthy"} for needs in needed.values())
    assert name in ("prometheus", "grafana") or "redis" in needed


def test_images_are_pinned() -> None:
    bases = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    given = [service["image"].partition(":-")[2].rstrip("}") for service in SERVICES.values()]
    for image in [*bases, *(image for image in given if not image.startswith("qaq"))]:
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d+\.\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", image), image


def test_targets_are_in_the_dockerfile() -> None:
    targets = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert SERVICES["worker"]["build"]["target"] == "cpu"
    assert GPU["services"]["worker"]["build"]["target"] == "cuda"
    assert {"cpu", "cuda"} <= set(targets)


def test_both_targets_fail_without_the_kernels() -> None:
    """`make compose` builds; this holds that neither target loses its check."""
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)
    for target in ("cpu", "cuda"):
        stage = next(stage for stage in stages if stage.partition("\n")[0].endswith(f" AS {target}"))
        assert "assert load_library() is not None" in stage


def test_a_worker_of_the_override_has_a_gpu() -> None:
    worker = GPU["services"]["worker"]
    assert worker["environment"]["QAQ_DEVICE"] == "cuda"
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
