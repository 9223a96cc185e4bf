"""Values that the chart is rendered with, by what they stand for."""

GPU_POOL = {
    "device": "cuda",
    "replicas": 4,
    "port": 9000,
    "threads": 8,
    "sharedMemory": "8Gi",
    "runtimeClassName": "nvidia",
    "image": {"repository": "espalier-worker-cuda", "digest": "sha256:" + "0" * 64},
    "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"cpu": "8", "memory": "64Gi"}},
    "nodeSelector": {"accelerator": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"espalier/pool": "gpu"}},
        }
    ],
    "extraEnv": [{"name": "NCCL_DEBUG", "value": "INFO"}],
}

ACCEPTED = {
    "defaults": {},
    "one GPU pool, no CPU pool": {"workerPools": {"cpu": None, "gpu": GPU_POOL}},
    "two pools": {"workerPools": {"cpu": {"replicas": 3}, "gpu": GPU_POOL}},
    "no pool": {"workerPools": {"cpu": None}},
    "claims that exist": {
        "volumes": {name: {"existingClaim": f"team-{name}"} for name in ("models", "data", "out")},
        "coordinator": {"persistence": {"existingClaim": "espalier-state"}},
    },
    "state that dies with the pod, one shared folder": {
        "coordinator": {"persistence": {"enabled": False}},
        "volumes": {"models": None, "data": None, "out": {"accessModes": ["ReadWriteOnce"], "storageClassName": "fast"}},
    },
    "registry, digests and pull secrets": {
        "image": {
            "registry": "registry.example.com:5000/ml",
            "pullPolicy": "Always",
            "pullSecrets": ["registry-login"],
            "coordinator": {"digest": "sha256:" + "a" * 64},
            "worker": {"tag": "0.1.0-rc.1"},
        },
    },
    "telemetry to a collector": {
        "telemetry": {"logFormat": "text", "otlpEndpoint": "http://collector.monitoring:4317"},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "argo"}}}],
            "extraEgress": [
                {
                    "to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
                    "ports": [{"protocol": "TCP", "port": 4317}],
                }
            ],
        },
    },
    "given service account, no policies": {
        "serviceAccount": {"create": False, "name": "pruner"},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
    "names, labels and other ports": {
        "fullnameOverride": "a-name-that-is-much-longer-than-what-a-label-of-dns-takes",
        "commonLabels": {"team": "ml-platform", "cost-center": "42"},
        "clusterDomain": "k8s.example.com",
        "coordinator": {
            "port": 8070,
            "podAnnotations": {"sidecar.istio.io/inject": "false"},
            "service": {"type": "LoadBalancer", "annotations": {"example.com/internal": "true"}},
            "priorityClassName": "high",
            "tolerations": [{"operator": "Exists"}],
        },
        "workerDefaults": {"port": 8071, "extraEnv": [{"name": "OMP_NUM_THREADS", "value": "2"}]},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "serviceAccount": {"annotations": {"example.com/owner": "ml"}},
    },
    "another user, slow nodes": {
        "securityContext": {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001},
        "probes": {"periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 5, "startupFailureThreshold": 60},
    },
}

# Values that must be refused, with what the message must name.
REFUSED = {
    "an unknown top-level value": ({"replicas": 2}, "replicas"),
    "a misspelt value of a pool": ({"workerPools": {"cpu": {"devcie": "cuda"}}}, "workerPools.cpu"),
    "a device that is neither cpu nor cuda": ({"workerDefaults": {"device": "tpu"}}, "workerDefaults.device"),
    "a negative number of workers": ({"workerDefaults": {"replicas": -1}}, "workerDefaults.replicas"),
    "a count that is text": ({"workerPools": {"cpu": {"replicas": "two"}}}, "workerPools.cpu.replicas"),
    "no compute thread": ({"workerDefaults": {"threads": 0}}, "workerDefaults.threads"),
    "a privileged port": ({"coordinator": {"port": 443}}, "coordinator.port"),
    "the root user": ({"securityContext": {"runAsUser": 0}}, "securityContext.runAsUser"),
    "a size that is no quantity": ({"volumes": {"out": {"size": "50 GB"}}}, "volumes.out.size"),
    "an access mode of no such name": ({"volumes": {"out": {"accessModes": ["RWX"]}}}, "volumes.out.accessModes"),
    "a mount over the state": ({"volumes": {"out": {"mountPath": "/var/lib/espalier"}}}, "volumes.out.mountPath"),
    "a relative mount path": ({"volumes": {"out": {"mountPath": "out"}}}, "volumes.out.mountPath"),
    "a pool name that is no label of DNS": ({"workerPools": {"GPU_pool": {}}}, "GPU_pool"),
    "a log format of no such name": ({"telemetry": {"logFormat": "xml"}}, "telemetry.logFormat"),
    "a collector without a scheme": ({"telemetry": {"otlpEndpoint": "collector:4317"}}, "telemetry.otlpEndpoint"),
    "a digest that is none": ({"image": {"worker": {"digest": "sha256:abc"}}}, "image.worker.digest"),
    "yes for true": ({"networkPolicy": {"enabled": "yes"}}, "networkPolicy.enabled"),
    "a given service account without a name": ({"serviceAccount": {"create": False}}, "serviceAccount.name"),
    "resources of no such kind": ({"coordinator": {"resources": {"limit": {"cpu": "1"}}}}, "coordinator.resources"),
}
