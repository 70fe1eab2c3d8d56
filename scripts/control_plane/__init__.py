"""A real Kubernetes API server on loopback, for tests and for trying the chart by hand.

etcd and kube-apiserver as they are shipped, with RBAC, Pod Security admission and the CRDs that
the chart uses; on request kube-scheduler and kwok, which plays nodes. Not a cluster: no kubelet, no
controllers and no KubeRay operator, so nothing reacts to an object but the API server itself and
the scheduler. The decision behind it: what the server refuses, a test learns from the server.
"""

from .api import Api, NotFoundError, RefusedError
from .crds import find_crds, install_crds
from .nodes import Nodes, refusal
from .server import ApiServer
from .tools import ToolMissingError, find_tool

__all__ = [
    "Api",
    "ApiServer",
    "Nodes",
    "NotFoundError",
    "RefusedError",
    "ToolMissingError",
    "find_crds",
    "find_tool",
    "install_crds",
    "refusal",
]
