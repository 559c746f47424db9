"""The Kubernetes manifests are consistent: rules that no schema has, checked on each rendered overlay.

Rendering takes kubectl alone, so that `make test` checks it too; the schemas are for `make test-deploy`.
"""

import json
import re
from base64 import b64decode
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import service
from service.config.settings import OPTIONS
from tests.deploy.documented import block_with, line_with
from tests.deploy.kubernetes import (
    CUSTOM_KINDS,
    OVERLAYS,
    Manifest,
    containers,
    documents,
    is_selected,
    of_kind,
    pod_templates,
    pods_ports,
    quantities,
    quantity,
    services_ports,
)
from workers.runner import STOP_SECONDS

# Names of other programs' variables.
FOREIGN = {"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA", "PGSSLROOTCERT"}
OLDEST = (1, 32)


@pytest.fixture(scope="module")
def render(tool, root) -> Callable[[str], str]:
    """Return a function that renders an overlay as kubectl would apply it."""

    @cache
    def rendered(overlay: str) -> str:
        result = tool("kubectl", "kustomize", root / "deploy" / "kubernetes" / "overlays" / overlay)
        if result.returncode != 0:
            raise AssertionError(result.stderr)
        return str(result.stdout)

    return rendered


@pytest.fixture(params=OVERLAYS)
def overlay(request, render) -> list[Manifest]:
    """Return one rendered overlay after the other."""
    return documents(render(request.param))


@pytest.mark.deploy
@pytest.mark.timeout(400)
def test_the_overlays_meet_the_schemas_of_every_version_the_validator_knows(render, tool, tmp_path: Path) -> None:
    known = tool("python", "-c", "import kubernetes_validate.utils as utils; print(*utils.all_versions())").stdout
    versions = sorted({tuple(map(int, version.split("."))) for version in known.split()})
    supported = [f"{major}.{minor}" for major, minor, _ in versions if (major, minor) >= OLDEST]
    files = [tmp_path / f"{overlay}.yaml" for overlay in OVERLAYS]
    for file in files:
        file.write_text(render(file.stem), encoding="utf-8")

    assert len(supported) >= 6
    for version in supported:
        result = tool("kubernetes-validate", "--strict", "--kubernetes-version", version, *files)
        warnings = [line for line in (result.stdout + result.stderr).splitlines() if "WARN" in line]
        unknown = [line for line in warnings if not any(kind in line for kind in CUSTOM_KINDS)]
        assert (result.returncode, unknown) == (0, []), result.stdout + result.stderr


def test_every_selector_picks_pods_that_are_there(overlay: list[Manifest]) -> None:
    labels = [template["metadata"]["labels"] for _, template in pod_templates(overlay)]

    for manifest in of_kind(overlay, "Service"):
        assert any(is_selected(item, {"matchLabels": manifest["spec"]["selector"]}) for item in labels)
    for manifest in of_kind(overlay, "NetworkPolicy"):
        assert any(is_selected(item, manifest["spec"]["podSelector"]) for item in labels)
    for manifest in of_kind(overlay, "PodDisruptionBudget", "Deployment", "StatefulSet"):
        picked = [item for item in labels if is_selected(item, manifest["spec"]["selector"])]
        assert len(picked) == 1, manifest["metadata"]["name"]
    for manifest in of_kind(overlay, "ServiceMonitor"):
        services = [item["metadata"]["labels"] for item in of_kind(overlay, "Service")]
        assert any(is_selected(item, manifest["spec"]["selector"]) for item in services)
    for manifest in of_kind(overlay, "PodMonitor"):
        assert any(is_selected(item, manifest["spec"]["selector"]) for item in labels)


def test_scalers_and_routes_name_what_is_there(overlay: list[Manifest]) -> None:
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in overlay}

    for manifest in of_kind(overlay, "HorizontalPodAutoscaler", "ScaledObject"):
        target = manifest["spec"]["scaleTargetRef"]
        assert (target.get("kind", "Deployment"), target["name"]) in names
    for manifest in of_kind(overlay, "Ingress"):
        paths = [path for rule in manifest["spec"]["rules"] for path in rule["http"]["paths"]]
        assert [path["path"] for path in paths] == ["/webhooks/sync"]
        assert all(("Service", path["backend"]["service"]["name"]) in names for path in paths)


def test_what_a_scaler_owns_has_no_replica_count_of_its_own(overlay: list[Manifest]) -> None:
    scalers = of_kind(overlay, "HorizontalPodAutoscaler", "ScaledObject")
    scaled = {manifest["spec"]["scaleTargetRef"]["name"] for manifest in scalers}

    for manifest in of_kind(overlay, "Deployment"):
        assert ("replicas" in manifest["spec"]) != (manifest["metadata"]["name"] in scaled)


def test_every_resource_quantity_is_valid(overlay: list[Manifest]) -> None:
    found = [text for manifest in overlay for text in quantities(manifest)]

    assert len(found) > 10
    assert all(quantity(text) > 0 for text in found)


def test_requests_do_not_exceed_limits(overlay: list[Manifest]) -> None:
    for name, container in containers(overlay):
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]

        assert {"cpu", "memory"} <= requests.keys(), name
        assert "memory" in limits, name
        assert all(quantity(requests[kind]) <= quantity(limits[kind]) for kind in limits), name


def test_every_variable_is_one_that_mayfly_reads(overlay: list[Manifest]) -> None:
    known = {option.name for option in OPTIONS.values()} | FOREIGN
    named = {item["name"] for _, container in containers(overlay) for item in container.get("env", ())}
    named |= {name for manifest in of_kind(overlay, "ConfigMap") for name in manifest["data"]}

    assert {"SYNC_API_KEY", "SYNC_WEBHOOK_SECRET", "MAYFLY_DATABASE_URL", "MAYFLY_REDIS_URL"} <= named <= known


def test_secrets_are_referred_to_and_never_written_down(overlay: list[Manifest]) -> None:
    secret = {option.name for option in OPTIONS.values() if option.is_secret} | {"POSTGRES_PASSWORD"}
    given = [item for _, container in containers(overlay) for item in container.get("env", ())]
    plain = {name for manifest in of_kind(overlay, "ConfigMap") for name in manifest["data"]}

    assert not of_kind(overlay, "Secret")
    assert not plain & secret
    assert all("secretKeyRef" in item["valueFrom"] for item in given if item["name"] in secret)


def test_each_role_gets_no_more_secrets_than_it_needs(overlay: list[Manifest]) -> None:
    given = {
        container["name"]: {item["name"] for item in container.get("env", ()) if "valueFrom" in item}
        for _, container in containers(overlay)
    }

    assert "SYNC_API_KEY" not in given["api"]
    assert "SYNC_WEBHOOK_SECRET" not in given["worker"]
    assert given["migrate"] == {"MAYFLY_DATABASE_URL"}


def test_every_image_has_a_version_and_ours_is_this_one(overlay: list[Manifest]) -> None:
    images = {container["image"] for _, container in containers(overlay)}
    ours = {image for image in images if re.search(r"(^|/)mayfly[:@]", image)}

    assert {image.rpartition(":")[2] for image in ours} == {service.__version__}
    for image in images:
        tag = image.rpartition(":")[2]
        assert re.match(r"\d", tag), image


def test_every_pod_meets_the_restricted_profile(overlay: list[Manifest]) -> None:
    for name, template in pod_templates(overlay):
        pod = template["spec"]
        security = pod["securityContext"]

        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        # Kubernetes would set MAYFLY_API_PORT and the like for the service mayfly-api.
        assert pod["enableServiceLinks"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        kinds = {kind for volume in pod.get("volumes", ()) for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "configMap", "secret", "projected", "persistentVolumeClaim"}, name
    for name, container in containers(overlay):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name


def test_every_namespaced_object_is_in_our_namespace(overlay: list[Manifest]) -> None:
    inside = [manifest for manifest in overlay if manifest["kind"] != "Namespace"]

    assert {manifest["metadata"].get("namespace") for manifest in inside} == {"mayfly"}
    labels = of_kind(overlay, "Namespace")[0]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_mounts_and_volumes_belong_together(overlay: list[Manifest]) -> None:
    claims = {
        manifest["metadata"]["name"]: {claim["metadata"]["name"] for claim in manifest["spec"]["volumeClaimTemplates"]}
        for manifest in of_kind(overlay, "StatefulSet")
    }

    for name, template in pod_templates(overlay):
        pod = template["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())} | claims.get(name.partition("/")[2], set())
        mounts = {mount["name"] for item in pod["containers"] for mount in item.get("volumeMounts", ())}
        assert volumes == mounts, name


def test_named_ports_exist(overlay: list[Manifest]) -> None:
    for name, container in containers(overlay):
        ports = {port["name"] for port in container.get("ports", ())}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            for way in ("httpGet", "tcpSocket"):
                assert way not in probe or probe[way]["port"] in ports, name


def test_services_routes_monitors_and_policies_name_ports_that_are_there(overlay: list[Manifest]) -> None:
    services = services_ports(overlay)

    for manifest in of_kind(overlay, "Service"):
        ports = {port["targetPort"] for port in manifest["spec"]["ports"]}
        assert ports <= pods_ports(overlay, {"matchLabels": manifest["spec"]["selector"]})
    for manifest in of_kind(overlay, "Ingress"):
        paths = [path for rule in manifest["spec"]["rules"] for path in rule["http"]["paths"]]
        backends = [path["backend"]["service"] for path in paths]
        assert all(backend["port"]["name"] in services[backend["name"]] for backend in backends)
    for manifest in of_kind(overlay, "ServiceMonitor"):
        assert {endpoint["port"] for endpoint in manifest["spec"]["endpoints"]} <= services["mayfly-api"]
    for manifest in of_kind(overlay, "PodMonitor"):
        scraped = {endpoint["port"] for endpoint in manifest["spec"]["podMetricsEndpoints"]}
        assert scraped <= pods_ports(overlay, manifest["spec"]["selector"])
    for manifest in of_kind(overlay, "NetworkPolicy"):
        ways = [way for kind in ("ingress", "egress") for way in manifest["spec"].get(kind, ())]
        named = {port["port"] for way in ways for port in way["ports"] if isinstance(port["port"], str)}
        assert named <= pods_ports(overlay, manifest["spec"]["podSelector"])


def test_a_stopped_worker_has_time_to_finish_its_jobs(overlay: list[Manifest]) -> None:
    pods = {name: template["spec"] for name, template in pod_templates(overlay)}

    assert pods["Deployment/mayfly-worker"]["terminationGracePeriodSeconds"] >= STOP_SECONDS + 10


def test_api_and_worker_are_asked_for_their_health(overlay: list[Manifest]) -> None:
    asked = {
        container["name"]: {kind: container[kind]["httpGet"]["path"] for kind in container if kind.endswith("Probe")}
        for _, container in containers(overlay)
        if container["name"] in {"api", "worker"}
    }

    live, ready = "/health/live", "/health/ready"
    probes = {"startupProbe": live, "livenessProbe": live, "readinessProbe": ready}
    assert asked == {"api": probes, "worker": probes}


def test_a_node_can_be_drained_of_pods_that_are_not_well(overlay: list[Manifest]) -> None:
    budgets = [manifest["spec"] for manifest in of_kind(overlay, "PodDisruptionBudget")]

    assert len(budgets) == 2
    assert all(budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow" for budget in budgets)


def test_the_migration_can_be_applied_by_itself(overlay: list[Manifest]) -> None:
    label = {"matchLabels": {"app.kubernetes.io/component": "migrate"}}
    picked = [manifest for manifest in overlay if is_selected(manifest["metadata"].get("labels", {}), label)]

    assert [(manifest["kind"], manifest["metadata"]["name"]) for manifest in picked] == [("Job", "mayfly-migrate")]


def test_the_scaler_counts_no_more_than_its_maximum_stands_for(render) -> None:
    scaler = next(item["spec"] for item in documents(render("keda")) if item["kind"] == "ScaledObject")
    asked = scaler["triggers"][0]["metadata"]

    limit = re.search(r" LIMIT (\d+)\)", asked["query"])

    assert limit is not None
    assert int(limit[1]) == scaler["maxReplicaCount"] * int(asked["targetQueryValue"])


def test_the_secret_of_the_readme_has_every_value_that_minimal_needs(render, tool, root: Path, tmp_path: Path) -> None:
    rendered = documents(render("minimal"))
    given = [item for _, container in containers(rendered) for item in container.get("env", ())]
    references = [item["valueFrom"]["secretKeyRef"] for item in given if "valueFrom" in item]
    file = tmp_path / "mayfly.env"
    file.write_text(block_with(root, "POSTGRES_PASSWORD="), encoding="utf-8")
    words = line_with(root, "create secret generic").replace("mayfly.env", str(file)).split()

    made = tool(*words, "--dry-run=client", "--output", "json")

    assert made.returncode == 0, made.stderr
    values = {name: b64decode(value).decode() for name, value in json.loads(made.stdout)["data"].items()}
    assert values.keys() == {item["key"] for item in references if not item.get("optional")}
    assert {item["name"] for item in references} == {"mayfly"}
    urls = [values["MAYFLY_DATABASE_URL"], values["MAYFLY_REDIS_URL"]]
    assert {urlsplit(url).hostname for url in urls} <= services_ports(rendered).keys()
    assert f":{values['POSTGRES_PASSWORD']}@" in values["MAYFLY_DATABASE_URL"]


def test_the_readme_names_overlays_and_files_that_are_there(root: Path) -> None:
    page = (root / "deploy" / "README.md").read_text(encoding="utf-8")

    overlays = set(re.findall(r"^\| `([a-z-]+)` \| [^|]+ \|$", page, re.MULTILINE))
    paths = set(re.findall(r"(?<![\w/])deploy/[\w./-]+", page))

    assert set(OVERLAYS) <= overlays
    assert [path for path in paths - {"deploy/.env"} if not (root / path).exists()] == []


def test_nothing_reaches_the_pods_but_what_a_policy_lets_in(overlay: list[Manifest]) -> None:
    policies = [manifest["spec"] for manifest in of_kind(overlay, "NetworkPolicy")]

    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    worker = {"app.kubernetes.io/name": "mayfly", "app.kubernetes.io/component": "worker"}
    (scrapes,) = [item for item in policies if "ingress" in item and is_selected(worker, item["podSelector"])]
    (way,) = scrapes["ingress"]
    assert len(way["from"]) == 1, "others than the monitoring reach the workers"


def test_the_first_overlay_deletes_nothing_and_is_minimal_otherwise(render) -> None:
    first, minimal = documents(render("dry-run")), documents(render("minimal"))
    settings = of_kind(first, "ConfigMap")[0]
    used = {source["configMapRef"]["name"] for _, item in containers(first) for source in item.get("envFrom", ())}
    kinds = [
        sorted((item["kind"], item["metadata"]["name"].rpartition("-")[0]) for item in of) for of in (first, minimal)
    ]

    assert settings["data"]["MAYFLY_DRY_RUN"] == "true"
    assert used == {settings["metadata"]["name"]}
    assert kinds[0] == kinds[1]


def test_no_other_overlay_is_in_dry_run(render) -> None:
    dry = [name for name in OVERLAYS if "MAYFLY_DRY_RUN" in of_kind(documents(render(name)), "ConfigMap")[0]["data"]]

    assert dry == ["dry-run"]


def test_production_starts_without_an_authority_of_its_own(render) -> None:
    needed = {
        volume["configMap"]["name"]
        for overlay in ("minimal", "production", "keda")
        for _, template in pod_templates(documents(render(overlay)))
        for volume in template["spec"].get("volumes", ())
        if "configMap" in volume
    }

    assert needed == set()


def test_the_component_for_a_private_authority_reaches_every_pod_of_ours(render) -> None:
    ours = [item for _, item in containers(documents(render("example")))]

    assert {item["name"] for item in ours} == {"api", "worker", "migrate"}
    for item in ours:
        assert {"name": "PGSSLROOTCERT", "value": "/etc/mayfly/ca/ca.crt"} in item["env"]
        assert {"name": "ca", "mountPath": "/etc/mayfly/ca", "readOnly": True} in item["volumeMounts"]


@pytest.mark.deploy
def test_the_validator_would_notice_a_mistake(render, tool) -> None:
    broken = render("minimal").replace("terminationGracePeriodSeconds: 90", "terminationGraceSeconds: 90")

    result = tool("kubernetes-validate", "--strict", "-", stdin=broken)

    assert result.returncode != 0
