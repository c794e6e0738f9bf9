"""The part of KubeRay's `RayService` (ray.io/v1) that our manifests use, as JSON Schema.

Unknown fields are errors, since the API server drops them silently or refuses them. Fields, types and what
is required are those of KubeRay's API types `RayServiceSpec` and `RayClusterSpec` and of Kubernetes' `v1`.
"""

from __future__ import annotations

from typing import Any


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string"}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 0}
QUANTITY = {"anyOf": [{"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}, COUNT]}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
STRINGS = {"type": "object", "additionalProperties": TEXT}
META = _object({"name": NAME, "labels": STRINGS, "annotations": STRINGS})

VARIABLE = _object(
    {
        "name": TEXT,
        "value": TEXT,
        "valueFrom": _object({"secretKeyRef": _object({"name": NAME, "key": TEXT}, "name", "key")}),
    },
    "name",
)
CONTAINER = _object(
    {
        "name": NAME,
        "image": TEXT,
        "ports": _list(_object({"containerPort": COUNT, "name": {**NAME, "maxLength": 15}}, "containerPort")),
        "env": _list(VARIABLE),
        "resources": _object({"requests": QUANTITIES, "limits": QUANTITIES}),
        "volumeMounts": _list(_object({"name": NAME, "mountPath": TEXT}, "name", "mountPath")),
    },
    "name",
    "image",
)
VOLUME = _object(
    {
        "name": NAME,
        "persistentVolumeClaim": _object({"claimName": NAME}, "claimName"),
        "emptyDir": _object({"medium": {"enum": ["", "Memory"]}, "sizeLimit": QUANTITY}),
    },
    "name",
)
TOLERATION = _object(
    {
        "key": TEXT,
        "operator": {"enum": ["Exists", "Equal"]},
        "value": TEXT,
        "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    }
)
TEMPLATE = _object(
    {
        "metadata": META,
        "spec": _object(
            {
                "containers": _list(CONTAINER),
                "volumes": _list(VOLUME),
                "tolerations": _list(TOLERATION),
                "terminationGracePeriodSeconds": COUNT,
            },
            "containers",
        ),
    },
    "spec",
)
GROUP = _object(
    {
        "groupName": NAME,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "numOfHosts": COUNT,
        "rayStartParams": STRINGS,
        "template": TEMPLATE,
    },
    "groupName",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
)
CLUSTER = _object(
    {
        "rayVersion": TEXT,
        "authOptions": _object({"mode": {"enum": ["token", "disabled"]}}, "mode"),
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": _object(
            {
                "idleTimeoutSeconds": COUNT,
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
            }
        ),
        "headGroupSpec": _object(
            {"rayStartParams": STRINGS, "template": TEMPLATE}, "rayStartParams", "template"
        ),
        "workerGroupSpecs": _list(GROUP),
    },
    "headGroupSpec",
)
RAY_SERVICE = _object(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": _object({"name": NAME, "labels": STRINGS, "annotations": STRINGS}, "name"),
        "spec": _object(
            {"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER}, "serveConfigV2", "rayClusterConfig"
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)
