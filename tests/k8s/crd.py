"""KubeRay's own CustomResourceDefinition as a closed JSON schema.

The CRDs are KubeRay's and not part of this repository: they are looked for in the folder that
KUBERAY_CRDS names, or in `shared/kuberay` beside the checkout.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from tests.k8s.overlays import ROOT, read_all

FILE = "ray.io_rayservices.yaml"
_KEPT = ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems")


def crd_file() -> Path | None:
    """Where RayService's CRD lies, if it does."""
    named = os.environ.get("KUBERAY_CRDS")
    folder = Path(named) if named else ROOT.parent / "shared" / "kuberay"
    return folder / FILE if (folder / FILE).exists() else None


@cache
def rayservice_schema(path: Path) -> dict[str, Any]:
    """JSON schema of a RayService of ray.io/v1."""
    (crd,) = read_all(path.read_text())
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = json_schema(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def json_schema(node: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI v3 node of a structural CRD schema as JSON schema.

    Objects are closed as the API server closes them under `fieldValidation=Strict`; a field with a
    default may be left out even where it is required.
    """
    out = {key: node[key] for key in _KEPT if key in node}
    properties = node.get("properties", {})
    if properties:
        out["properties"] = {name: json_schema(child) for name, child in properties.items()}
    if "required" in node:
        out["required"] = [n for n in node["required"] if "default" not in properties.get(n, {})]
    if "items" in node:
        out["items"] = json_schema(node["items"])
    if isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = json_schema(node["additionalProperties"])
    elif properties and not node.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if node.get("x-kubernetes-int-or-string"):
        out = {**out, "type": ["integer", "string"]}
    if node.get("nullable") and "type" in out:
        out = {"anyOf": [out, {"type": "null"}]}
    return out
