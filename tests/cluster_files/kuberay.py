"""The fields of KubeRay's ray.io/v1 that our files use, closed: an unknown or misspelt key is refused.

Kubernetes itself drops unknown keys of a custom resource without a word. Written from KubeRay's API reference (1.6);
`authOptions` and the groups' `labels` came with 1.5.1 and 1.5. Pod templates are Kubernetes' own: see `pod_template`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

KUBERNETES = "1.37"
DNS_LABEL = r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"


def pod_template(template: dict[str, Any]) -> dict[str, Any]:
    """The template, if Kubernetes' schema has all of its keys."""
    try:
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "PodTemplate", "template": template}, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return template


PodTemplate = Annotated[dict[str, Any], AfterValidator(pod_template)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(_Closed):
    name: str = Field(pattern=DNS_LABEL)
    namespace: str | None = None
    labels: dict[str, str] = {}


class AuthOptions(_Closed):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(_Closed):
    idleTimeoutSeconds: int = Field(ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]


class HeadGroup(_Closed):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(_Closed):
    groupName: str = Field(pattern=DNS_LABEL)
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)
    labels: dict[str, str]
    rayStartParams: dict[str, str]
    template: PodTemplate


class ClusterSpec(_Closed):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class RayCluster(_Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(_Closed):
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    rayClusterSpec: ClusterSpec


class RayJob(_Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
