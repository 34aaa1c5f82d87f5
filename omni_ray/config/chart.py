"""The values of the Helm chart: its file is checked by a schema made from here.

``python -m omni_ray.config.chart > helm/omni-ray/values.schema.json``

Names are Helm's way (camelCase), apart from ``args``, which is the spec. Helm's schemas know no rule about two keys, so
those of the chart are in its ``templates/_checks.tpl``, and those of the spec are checked when Ray Serve builds it.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from omni_ray.config.block import Block, Positive
from omni_ray.config.spec import OmniSpec

Text = Annotated[str, Field(min_length=1)]
# What Kubernetes takes as a name of an object.
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class Image(Block):
    """The image that every pod runs, made by `docker/Dockerfile`."""

    repository: Text = "omni-ray"
    build: Literal["cpu", "gpu"] = Field("cpu", description="Of the two images the one with these builds.")
    tag: str = Field("", description="Empty: the chart's appVersion and the build, such as 0.1.0-cpu.")
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pullSecrets: list[Text] = Field([], description="Secrets of the registry.")


class Http(Block):
    """Where requests are answered."""

    port: int = Field(8000, ge=1024, le=65535)
    requestTimeoutSeconds: float | None = Field(None, gt=0, description="null: a request may take any time.")
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    serviceAnnotations: dict[str, str] = Field({})


class Toleration(Block):
    """As in a pod's spec."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


class Pod(Block):
    """What a pod asks for, and which machines may run it. Memory is asked for and not exceeded; CPUs may be."""

    cpus: Positive = Field(1, description="Whole CPUs; Ray counts them.")
    memoryGiB: Positive = Field(4, description="Shared memory is part of it.")
    sharedMemoryGiB: Positive = Field(1, description="/dev/shm: half for Ray's object store, half for the ranks.")
    nodeSelector: dict[str, str] = Field({})
    tolerations: list[Toleration] = Field([])
    affinity: dict[str, Any] = Field({}, description="As in a pod's spec.")
    priorityClassName: str = ""
    annotations: dict[str, str] = Field({})
    labels: dict[str, str] = Field({})


class Workers(Pod):
    """A group of equal pods that run the models."""

    name: Label = Field(description="Unique in the list.")
    replicas: int = Field(1, ge=0, description="Pods.")
    minReplicas: int | None = Field(None, ge=0, description="With the autoscaler; null: as replicas.")
    maxReplicas: int | None = Field(None, ge=1, description="With the autoscaler; null: as replicas.")
    gpus: int = Field(0, ge=0, description="Of each pod. A replica on one node needs all its GPUs in one pod.")
    gpuResource: Text = Field("nvidia.com/gpu", description="What the device plugin calls a GPU.")
    spread: bool = Field(False, description="Evenly over machines.")


class Autoscaler(Block):
    """Ray's autoscaler, which adds worker pods when replicas find no room, and removes idle ones."""

    enabled: bool = False
    idleTimeoutSeconds: int = Field(300, ge=0)
    upscalingMode: Literal["Default", "Conservative", "Aggressive"] = "Default"


class CacheVolume(Block):
    """One volume for all workers: weights (HF_HOME) and what torch and vLLM compiled."""

    kind: Literal["claim", "existingClaim", "hostPath", "emptyDir"] = Field(
        "claim", description="`claim`: the chart makes a PersistentVolumeClaim; `emptyDir`: each pod its own."
    )
    size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi|Ti|k|M|G|T)?$")] = "10Gi"
    storageClass: str = Field("", description="Empty: the cluster's default.")
    accessMode: Literal["ReadWriteOnce", "ReadWriteMany"] = Field(
        "ReadWriteOnce", description="Workers on several machines need ReadWriteMany."
    )
    keep: bool = Field(False, description="`helm uninstall` leaves the claim.")
    existingClaim: str = Field("", description="Name of the claim, for the kind of this name.")
    hostPath: str = Field("", description="Folder of every machine, for the kind of this name.")


class Secret(Block):
    """A key of a Secret of the namespace."""

    secretName: str = Field("", description="Empty: none.")
    key: Text = "value"


class Auth(Block):
    """Ray's own authentication, between its processes and to the dashboard."""

    mode: Literal["token", "disabled"] = "token"
    secretName: str = Field("", description="A Secret with the key auth_token; empty: KubeRay makes one.")


class GcsFaultTolerance(Block):
    """The head's state in a Redis, so that a new head finds the cluster as it was."""

    redisAddress: str = Field("", description="host:port; this one value turns it on.")
    redisPassword: Secret = Secret(key="password")


class Upgrade(Block):
    """What happens when the pods of a running release change."""

    strategy: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"] = Field(
        "NewCluster", description="Incremental: through the Gateway API, in steps; it needs the autoscaler."
    )
    gatewayClassName: str = Field("", description="Incremental: the cluster's gateway class.")
    stepSizePercent: int = Field(10, ge=1, le=100, description="Incremental: traffic that moves in a step.")
    intervalSeconds: Positive = Field(60, description="Incremental: between two steps.")
    maxSurgePercent: int = Field(25, ge=1, le=100, description="Incremental: capacity that is there twice.")
    deletionDelaySeconds: int = Field(60, ge=0, description="How long the old cluster stays.")


class NetworkPolicy(Block):
    """Who may open connections to the pods; what they open themselves is not limited."""

    enabled: bool = False
    clients: list[dict[str, Any]] = Field([], description="Peers of a NetworkPolicy that may send requests; []: all.")
    operator: dict[str, str] = Field({"app.kubernetes.io/name": "kuberay-operator"}, description="Labels of its pods.")
    prometheus: dict[str, str] = Field({"app.kubernetes.io/name": "prometheus"}, description="Labels of its pods.")


class PodMonitor(Block):
    """Of the Prometheus operator: every pod's metrics."""

    enabled: bool = False
    intervalSeconds: Positive = 15
    labels: dict[str, str] = Field({}, description="That your Prometheus selects by.")


class Dashboards(Block):
    """The files in `dashboards/`, in a ConfigMap that Grafana's sidecar loads."""

    enabled: bool = False
    labels: dict[str, str] = Field({"grafana_dashboard": "1"}, description="That the sidecar selects by.")


class Metrics(Block):
    """What watches the release."""

    podMonitor: PodMonitor = PodMonitor()
    dashboards: Dashboards = Dashboards()


class DisruptionBudget(Block):
    """Keeps the draining of machines from taking all workers at once."""

    enabled: bool = False
    maxUnavailable: Positive = 1


class ChartValues(Block):
    """Everything in a values file."""

    args: OmniSpec = Field(description="What is served: the `args` of a deployment file, as they are.")
    deployments: list[dict[str, Any]] = Field(
        [], description="What changes in place, as in a deployment file: `user_config` by deployment."
    )
    nameOverride: str = ""
    fullnameOverride: str = ""
    image: Image = Image()
    http: Http = Http()
    head: Pod = Pod(memoryGiB=3)
    workers: list[Workers] = Field([Workers(name="cpu", cpus=2, memoryGiB=8, sharedMemoryGiB=2)], min_length=1)
    autoscaler: Autoscaler = Autoscaler()
    cache: CacheVolume = CacheVolume()
    env: dict[str, str] = Field({}, description="Further environment variables of every pod.")
    envFromSecrets: list[Text] = Field([], description="Secrets whose keys are environment variables of every pod.")
    huggingFaceToken: Secret = Secret(key="token")
    apiKeys: Secret = Field(Secret(key="keys"), description="The file of API keys; see api.keys_file of the spec.")
    auth: Auth = Auth()
    gcsFaultTolerance: GcsFaultTolerance = GcsFaultTolerance()
    upgrade: Upgrade = Upgrade()
    serviceAccountName: str = ""
    terminationGracePeriodSeconds: Positive = Field(60, description="For running requests, when a pod ends.")
    networkPolicy: NetworkPolicy = NetworkPolicy()
    disruptionBudget: DisruptionBudget = DisruptionBudget()
    metrics: Metrics = Metrics()


def schema() -> dict[str, Any]:
    """The JSON schema. The type of a model chooses its properties by conditions, so that Helm names the wrong key."""
    made = ChartValues.model_json_schema()
    models = made["$defs"]["OmniSpec"]["properties"]["models"]["items"]
    choices: dict[str, str] = models.pop("discriminator")["mapping"]
    del models["oneOf"]
    models |= {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": list(choices)}},
        "allOf": [
            {"if": {"properties": {"type": {"const": type_}}, "required": ["type"]}, "then": {"$ref": reference}}
            for type_, reference in choices.items()
        ],
    }
    # Helm hands it to charts that are part of another.
    made["properties"]["global"] = {"type": "object"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
