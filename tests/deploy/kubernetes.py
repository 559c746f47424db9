"""Kubernetes manifests as data: rendering an overlay, walking pods and containers, reading quantities."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec

OVERLAYS = ("dry-run", "minimal", "production", "keda", "example")
# Kinds of add-ons whose schemas the validator does not carry.
CUSTOM_KINDS = {"ScaledObject", "TriggerAuthentication", "ServiceMonitor", "PodMonitor", "PrometheusRule"}

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_SUFFIXES = {"": Decimal(1), "m": Decimal("0.001")}
_SUFFIXES |= {name: Decimal(1000) ** power for power, name in enumerate("kMGT", 1)}
_SUFFIXES |= {f"{name}i": Decimal(1024) ** power for power, name in enumerate("KMGT", 1)}

Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    """Return the documents of a stream of YAML."""
    parts = [part for part in re.split(r"^---$", text, flags=re.MULTILINE) if part.strip()]
    return [msgspec.yaml.decode(part) for part in parts]


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    """Return the manifests of *kinds*."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield each workload's name with the template of its pods."""
    for manifest in of_kind(manifests, "Deployment", "StatefulSet", "Job"):
        yield f"{manifest['kind']}/{manifest['metadata']['name']}", manifest["spec"]["template"]


def containers(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield each container with the name of its workload."""
    for name, template in pod_templates(manifests):
        for kind in ("initContainers", "containers"):
            for container in template["spec"].get(kind, ()):
                yield name, container


def quantity(text: str) -> Decimal:
    """Read a quantity such as ``100m`` or ``64Mi``.

    Raises: ValueError for what the API server would refuse.
    """
    parts = _QUANTITY.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text!r} is not a quantity")
    return Decimal(parts[1]) * _SUFFIXES[parts[2] or ""]


def quantities(value: object, key: str = "") -> Iterator[str]:
    """Yield every text in *value* that stands where a quantity is expected."""
    if isinstance(value, dict):
        for name, inner in value.items():
            is_resources = key in ("requests", "limits") and not isinstance(inner, dict)
            if is_resources or name == "sizeLimit":
                yield str(inner)
            yield from quantities(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from quantities(inner, key)


def services_ports(manifests: list[Manifest]) -> dict[str, set[str]]:
    """Return the names of each service's ports."""
    services = of_kind(manifests, "Service")
    return {service["metadata"]["name"]: {port["name"] for port in service["spec"]["ports"]} for service in services}


def pods_ports(manifests: list[Manifest], selector: Manifest) -> set[str]:
    """Return the names of the ports of the pods that *selector* picks."""
    picked = [
        template for _, template in pod_templates(manifests) if is_selected(template["metadata"]["labels"], selector)
    ]
    return {
        port["name"]
        for template in picked
        for container in template["spec"]["containers"]
        for port in container.get("ports", ())
    }


def is_selected(labels: Manifest, selector: Manifest) -> bool:
    """Tell whether a label selector picks what carries *labels*."""
    if any(labels.get(name) != value for name, value in selector.get("matchLabels", {}).items()):
        return False
    expressions = selector.get("matchExpressions", [])
    if any(expression["operator"] != "In" for expression in expressions):
        raise ValueError("only the operator In is known here")
    return all(labels.get(expression["key"]) in expression["values"] for expression in expressions)
