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

PLAIN = {"insecure": True}
MANAGED_TLS = {"enabled": True, "certManager": {"enabled": True, "issuerName": "ca"}}

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
    "everything at once": {
        "tls": {"enabled": True, "certManager": {"enabled": True, "issuerName": "ca", "issuerKind": "ClusterIssuer"}},
        "tokensSecret": "espalier-tokens",
        "testTokenSecret": "espalier-reader",
        "postgres": {"secret": "pg"},
        "objectStore": {"roots": ["s3://runs/team"], "secret": "s3", "endpoint": "https://minio.example.com"},
        "coordinator": {
            "checkpointDir": "s3://runs/team/checkpoints",
            "persistence": {"enabled": False},
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "host": "espalier.example.com",
                "tlsSecret": "espalier-example-com",
                "annotations": {"nginx.ingress.kubernetes.io/backend-protocol": "GRPCS"},
            },
        },
        "workerPools": {
            "cpu": {},
            "gpu": {**GPU_POOL, "rdmaResource": "rdma/hca", "nccl": {"NCCL_IB_HCA": "mlx5"}, "temporarySize": "200Gi"},
            "gang": {**GPU_POOL, "gang": {"type": "volcano", "queue": "team"}},
        },
        "telemetry": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboards": {"enabled": True},
        },
    },
    "certificates from given secrets": {
        "tls": {"enabled": True, "coordinatorSecret": "coordinator-tls", "workerSecret": "worker-tls"},
        "tokensSecret": "espalier-tokens",
        "telemetry": {"metrics": {"enabled": False, "port": 9500}},
    },
    "GPUs in groups that live and die together": {
        "workerPools": {"cpu": None, "gpu": {**GPU_POOL, "gang": {"type": "leaderWorkerSet", "groups": 2}}},
    },
    "GPUs queued by Kueue": {
        "workerPools": {"cpu": None, "gpu": {**GPU_POOL, "gang": {"type": "kueue", "queue": "team"}}},
    },
    "models fetched by each pod": {
        "volumes": {
            "models": {
                "download": {
                    "image": "amazon/aws-cli:2.31.0",
                    "command": ["aws", "s3", "sync", "s3://models/llama-13b", "/models/llama-13b"],
                    "env": [{"name": "AWS_REGION", "value": "eu-west-1"}],
                }
            }
        }
    },
    "an Ingress without TLS of its own": {
        "coordinator": {"ingress": {"enabled": True, "host": "espalier.example.com"}},
    },
    "an object store by the pods' own rights": {
        "objectStore": {"roots": ["s3://runs"]},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/espalier"}},
    },
    "no metrics": {"telemetry": {"metrics": {"enabled": False}}},
    "tokens in plain text": {"tokensSecret": "espalier-tokens"},
    "tokens in plain text, and one for the test": {"tokensSecret": "espalier-tokens", "testTokenSecret": "espalier-reader"},
    "models from a store over TLS with certificates of cert-manager": {
        "tls": MANAGED_TLS,
        "tokensSecret": "espalier-tokens",
        "objectStore": {"roots": ["s3://runs"], "secret": "s3", "endpoint": "http://minio.storage:9000"},
        "volumes": {
            "models": {"download": {"image": "amazon/aws-cli:2.31.0", "command": ["aws", "s3", "sync", "s3://models", "/models"]}}
        },
    },
    "one pool for each model size": {
        "workerPools": {
            "cpu": None,
            "l7b": {**GPU_POOL, "replicas": 1},
            "l13b": {**GPU_POOL, "replicas": 4},
            "l65b": {**GPU_POOL, "replicas": 8},
        }
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
    "a scheduler of gangs that is not known": ({"workerDefaults": {"gang": {"type": "slurm"}}}, "workerDefaults.gang.type"),
    "an Ingress without a host": ({"coordinator": {"ingress": {"enabled": True}}}, "coordinator.ingress"),
    "TLS without certificates": ({"tls": {"enabled": True}, "tokensSecret": "t"}, "tls.workerSecret"),
    "cert-manager without an issuer": (
        {"tokensSecret": "t", "tls": {"enabled": True, "certManager": {"enabled": True}}},
        "tls.certManager.issuerName",
    ),
    "an object store that is no S3": ({"objectStore": {"roots": ["gs://runs"]}}, "objectStore.roots"),
    "a variable that is not NCCL's": ({"workerDefaults": {"nccl": {"PATH": "/"}}}, "workerDefaults.nccl"),
    "a download without a command": ({"volumes": {"models": {"download": {"image": "x"}}}}, "volumes.models"),
    "a lifetime that is no duration": ({"tls": {"certManager": {"duration": "90 days"}}}, "tls.certManager.duration"),
    "resources of no such kind": ({"coordinator": {"resources": {"limit": {"cpu": "1"}}}}, "coordinator.resources"),
    "neither TLS nor plain text": ({"insecure": False}, "insecure"),
    "TLS and plain text": ({"insecure": True, "tls": MANAGED_TLS, "tokensSecret": "t"}, "insecure"),
    "TLS without tokens": ({"tls": MANAGED_TLS}, "tokensSecret"),
    "a token for the test where none is looked at": ({"testTokenSecret": "t"}, "testTokenSecret"),
    "no time for a checkpoint": ({"workerPools": {"cpu": {"drainSeconds": 300}}}, "workerPools.cpu.drainSeconds"),
    "Kueue without a queue": ({"workerPools": {"cpu": {"gang": {"type": "kueue"}}}}, "workerPools.cpu.gang.queue"),
    "checkpoints where nobody may write": ({"coordinator": {"checkpointDir": "/models/states"}}, "coordinator.checkpointDir"),
    "checkpoints in no volume": ({"coordinator": {"checkpointDir": "/output/states"}}, "coordinator.checkpointDir"),
    "two volumes at one place": ({"volumes": {"data": {"mountPath": "/models"}}}, "volumes.models.mountPath"),
    "a download that each pod would write to": (
        {"volumes": {"out": {"download": {"image": "x", "command": ["fetch"]}}}},
        "volumes.out.download",
    ),
    "a monitor without metrics": (
        {"telemetry": {"metrics": {"enabled": False}, "serviceMonitor": {"enabled": True}}},
        "telemetry.serviceMonitor.enabled",
    ),
    "an interval that Prometheus would not take": (
        {"telemetry": {"serviceMonitor": {"enabled": True, "interval": "5s1m"}}},
        "telemetry.serviceMonitor.interval",
    ),
    "a label that the chart sets itself": ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "commonLabels"),
    "a policy for addresses that are no peers": ({"networkPolicy": {"services": [{"cidr": "::/0"}]}}, "networkPolicy.services"),
}

# What is not about encryption is tried in plain text, which must be said.
for values in [*ACCEPTED.values(), *(values for values, _ in REFUSED.values())]:
    values.setdefault("insecure", "tls" not in values)
