"""What is rendered: every model on every hardware, and every value of the chart at least once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from cluster.helm_values.resolved import merge
from cluster.plan import configs_path, preset_names

Values = dict[str, Any]
UPGRADES: dict[str, Values] = {
    "None": {"type": "None"},
    "NewCluster": {"type": "NewCluster"},
    "Incremental": {"type": "Incremental", "incremental": {"gatewayClassName": "istio"}},
}
WEIGHTS: dict[str, Values] = {
    "pvc": {"from": "pvc"},
    "image": {"from": "image", "ociImage": "example.org/weights:1"},
    "baked": {"from": "baked"},
    "ephemeral": {"from": "ephemeral"},
}
KEYS: Values = {"auth": {"apiKeys": {"existingSecret": "shoal-keys"}}}
FITS: dict[str, Any] = yaml.safe_load((configs_path() / "fits.yaml").read_text())
NO_REPOSITORY = {"demo"}


@dataclass(frozen=True)
class Case:
    name: str
    values: Values

    def __str__(self) -> str:
        return self.name


def served(model: str, hardware: str, **more: Any) -> Values:
    short = {"model": {"preset": model}, "hardware": {"preset": hardware}}
    return merge(merge(KEYS, short), more)


def _matrix() -> Iterator[Case]:
    places = product(preset_names("models"), preset_names("hardware"), UPGRADES, WEIGHTS)
    for model, hardware, upgrade, weights in places:
        downloads = weights in ("pvc", "ephemeral")
        if not FITS[model][hardware]["sizes"] or (downloads and model in NO_REPOSITORY):
            continue
        more = {"upgrade": UPGRADES[upgrade], "weights": WEIGHTS[weights]}
        name = f"{model}-{hardware}-{upgrade}-{weights}"
        yield Case(name, served(model, hardware, **more))


def _sizes() -> Iterator[Case]:
    for model, hardware in product(preset_names("models"), preset_names("hardware")):
        found = FITS[model][hardware]
        for size in found["sizes"]:
            if size != found["chosen"]:
                more = {"tensorParallel": int(size), "replicas": {"min": 1, "max": 3}}
                yield Case(f"{model}-{hardware}-tp{size}", served(model, hardware, **more))


SMALL = served("qwen2.5-0.5b-instruct", "cpu")
_FEATURES: dict[str, Values] = {
    "anonymous": {"auth": {"apiKeys": {"existingSecret": ""}, "allowAnonymous": True}},
    "ingress": {
        "expose": {"type": "ingress", "host": "llm.example", "ingress": {"tlsSecret": "tls"}},
        "service": {"port": 80, "type": "LoadBalancer", "annotations": {"a": "b"}},
    },
    "ingress-without-host": {"expose": {"type": "ingress", "ingress": {"className": "nginx"}}},
    "httproute": {
        "expose": {
            "type": "httproute",
            "host": "llm.example",
            "httproute": {"gateway": {"name": "edge", "namespace": "infra"}},
        }
    },
    "httproute-timeout": {
        "expose": {
            "type": "httproute",
            "httproute": {"gateway": {"name": "edge"}, "timeout": "30m"},
        }
    },
    "monitoring": {
        "monitoring": {
            "podMonitor": True,
            "rules": True,
            "dashboards": True,
            "labels": {"release": "prometheus"},
        }
    },
    "existing-claim": {"weights": {"pvc": {"existingClaim": "weights", "readOnly": True}}},
    "claim": {
        "weights": {"pvc": {"size": "100Gi", "storageClass": "fast", "accessMode": "ReadWriteMany"}}
    },
    "download": {
        "weights": {"download": {"endpoint": "https://hub.example"}},
        "auth": {"hfToken": {"existingSecret": "hub"}},
        "model": {"overrides": {"revision": "0123456"}},
    },
    "no-download": {"weights": {"download": {"enabled": False}}},
    "digest": {"image": {"digest": f"sha256:{'0' * 64}", "pullSecrets": ["registry"]}},
    "tag": {"image": {"tag": "1.2.3", "pullPolicy": "Always", "repository": "example.com/a/b"}},
    "fixed-size": {"autoscaler": {"enabled": False}, "replicas": {"min": 2, "max": 4}},
    "scaled": {"replicas": {"min": 2, "max": 40, "targetOngoing": 2.5}},
    "equal-bounds": {"replicas": {"min": 3, "max": 3}},
    "suspended": {"suspend": True},
    "open-network": {
        "security": {"networkPolicy": False},
        "podDisruptionBudget": {"enabled": False},
        "tests": {"enabled": False},
        "scheduling": {"topologySpread": False},
    },
    "guarded-network": {
        "security": {
            "allowFrom": [{"podSelector": {"matchLabels": {"app": "web"}}}],
            "operatorNamespace": "ray",
            "runAsUser": 1234,
        }
    },
    "scheduling": {
        "scheduling": {
            "priorityClassName": "high",
            "queueName": "team",
            "schedulerName": "volcano",
        }
    },
    "head": {
        "head": {
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "cpu", "operator": "Exists"}],
            "gcsFaultTolerance": {
                "enabled": True,
                "redisAddress": "redis:6379",
                "passwordSecret": "redis",
            },
        }
    },
    "extra": {
        "extra": {
            "env": [{"name": "A", "value": "1"}],
            "envFrom": [{"configMapRef": {"name": "more"}}],
            "volumes": [{"name": "scratch", "emptyDir": {}}],
            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
            "initContainers": [
                {
                    "name": "warm",
                    "image": "example.org/warm:1",
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
            "objects": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}},
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "most"}},
            ],
        },
        "podLabels": {"team": "search"},
        "podAnnotations": {"note": "1"},
    },
    "overrides": {
        "model": {
            "overrides": {
                "name": "house/assistant",
                "max_model_len": 4096,
                "yarn": False,
                "is_default": True,
                "longest_generation_s": 1200.5,
                "engine": {"max_running_sequences": 8, "kv_cache_tokens": 65536},
            }
        },
        "hardware": {
            "overrides": {
                "has_spare": False,
                "threads_per_shard": 3,
                "kernels": "avx2",
                "env": {"OMP_WAIT_POLICY": "passive"},
                "pod": {
                    "memory": "24Gi",
                    "node_selector": {"disk": "ssd"},
                    "tolerations": [{"key": "a", "operator": "Equal", "value": "b"}],
                    "runtime_class": "gvisor",
                },
            }
        },
    },
    "limits": {
        "maxBodyBytes": 16777216,
        "logLevel": "debug",
        "ingressCopies": 3,
        "web": {"enabled": False},
    },
    "two-models": {
        "models": [
            {"preset": "qwen2.5-1.5b-instruct", "replicas": {"min": 1, "max": 2}},
            {"preset": "qwen2.5-0.5b-instruct", "overrides": {"is_default": True}},
        ]
    },
    "same-model-twice": {
        "models": [
            {
                "preset": "demo",
                "tensorParallel": 1,
                "overrides": {"name": "long", "dtype": "float32"},
            },
            {"preset": "demo", "tensorParallel": 1, "overrides": {"name": "brief"}},
        ],
    },
    "test-key": {"tests": {"apiKey": {"existingSecret": "plain"}}},
    "own-token": {"auth": {"rayToken": {"existingSecret": "ray"}}},
    "other-name": {"fullnameOverride": "a" * 47},
}


def _features() -> Iterator[Case]:
    for name, values in _FEATURES.items():
        yield Case(name, merge(SMALL, values))


YARN_OFF = Case(
    "yarn-off",
    merge(
        served("qwen2.5-7b-instruct", "a100-80gb"),
        {"model": {"overrides": {"yarn": False, "max_model_len": 32768}}},
    ),
)
MATRIX = list(_matrix())
FEATURES = [*_features(), YARN_OFF]
CASES = [*MATRIX, *_sizes(), *FEATURES]
