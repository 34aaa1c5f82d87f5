"""What KubeRay 1.7 takes as a RayService, and the Prometheus operator as a PodMonitor, as strict JSON schemas.

The fields are those of their custom resource definitions; pods and services are Kubernetes' own, whose strict schemas
come with kubernetes-validate. The API server drops a field that it does not know; these refuse it.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
PERCENT: Schema = {"type": "integer", "minimum": 0, "maximum": 100}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def kubernetes(kind: str) -> Schema:
    """A definition of Kubernetes' API."""
    return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.{kind}"}


def block(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta")
# Of the metadata of an object within a custom resource, these are kept.
EMBEDDED = block(
    annotations=TEXTS, finalizers={"type": "array", "items": TEXT}, labels=TEXTS, name=TEXT, namespace=TEXT
)


def embedded(kind: str) -> Schema:
    return {"allOf": [kubernetes(kind), {"properties": {"metadata": EMBEDDED}}]}


POD = embedded("api.core.v1.PodTemplateSpec")
SERVICE = embedded("api.core.v1.Service")

CREDENTIAL = block(value=TEXT, valueFrom=kubernetes("api.core.v1.EnvVarSource"))

HEAD = block(
    "rayStartParams",
    "template",
    enableIngress=FLAG,
    headService=SERVICE,
    labels=TEXTS,
    rayStartParams=TEXTS,
    resources=TEXTS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    template=POD,
)

WORKERS = block(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    groupName=TEXT,
    idleTimeoutSeconds=COUNT,
    labels=TEXTS,
    maxReplicas=COUNT,
    minReplicas=COUNT,
    numOfHosts=COUNT,
    priority=COUNT,
    rayStartParams=TEXTS,
    replicas=COUNT,
    resources=TEXTS,
    scaleStrategy=block(workersToDelete={"type": "array", "items": TEXT}),
    suspend=FLAG,
    template=POD,
)

RAY_CLUSTER = block(
    "headGroupSpec",
    authOptions=block(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=block(
        env={"type": "array", "items": kubernetes("api.core.v1.EnvVar")},
        idleTimeoutSeconds=COUNT,
        image=TEXT,
        resources=kubernetes("api.core.v1.ResourceRequirements"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        version=one_of("v1", "v2"),
    ),
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=block(
        "redisAddress",
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
        redisPassword=CREDENTIAL,
        redisUsername=CREDENTIAL,
    ),
    headGroupSpec=HEAD,
    headServiceAnnotations=TEXTS,
    managedBy=TEXT,
    rayVersion=TEXT,
    suspend=FLAG,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)

UPGRADE = block(
    type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
    clusterUpgradeOptions=block(
        "gatewayClassName",
        "intervalSeconds",
        "stepSizePercent",
        gatewayClassName=TEXT,
        intervalSeconds=COUNT,
        maxSurgePercent=PERCENT,
        stepSizePercent=PERCENT,
    ),
)

RAY_SERVICE = block(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayService"),
    metadata=METADATA,
    spec=block(
        "rayClusterConfig",
        excludeHeadPodFromServeSvc=FLAG,
        managedBy=TEXT,
        rayClusterConfig=RAY_CLUSTER,
        rayClusterDeletionDelaySeconds=COUNT,
        serveConfigV2=TEXT,
        serveService=SERVICE,
        suspend=FLAG,
        upgradeStrategy=UPGRADE,
    ),
)

POD_MONITOR = block(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion=one_of("monitoring.coreos.com/v1"),
    kind=one_of("PodMonitor"),
    metadata=METADATA,
    spec=block(
        "selector",
        "podMetricsEndpoints",
        namespaceSelector=block(any=FLAG, matchNames={"type": "array", "items": TEXT}),
        podMetricsEndpoints={
            "type": "array",
            "items": block(
                honorLabels=FLAG,
                interval={"type": "string", "pattern": "^[0-9]+s$"},
                path=TEXT,
                port=TEXT,
                scrapeTimeout=TEXT,
            ),
        },
        selector=kubernetes("apimachinery.pkg.apis.meta.v1.LabelSelector"),
    ),
)

SCHEMAS = {"RayService": RAY_SERVICE, "PodMonitor": POD_MONITOR}
