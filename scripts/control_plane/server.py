"""etcd and kube-apiserver in a folder, on free ports of loopback.

What a cluster would run beside them is absent on purpose (see the package). `close` ends both; a
killed parent takes them along.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from cluster.local.ports import find_free_ports, is_port_free

from .api import Api, Object
from .certificates import Authority, Credentials
from .processes import NotReadyError, Program
from .tools import find_tool

_START_S = 120.0
_HEARD_S = 60.0
_ADMIN, _ADMIN_GROUPS = "shoal-admin", ("system:masters",)
RESTRICTED = {
    f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")
}


class ApiServer:
    """A running API server; `kubeconfig` signs in as its administrator.

    Attributes:
        url: `https://127.0.0.1:PORT`.
        kubeconfig: file with one context, "shoal".
        api: the administrator's view.
        folder: certificates, data and logs; the caller's to delete.

    Raises:
        ToolMissingError: from the constructor, before anything is started.
        NotReadyError: from the constructor, when a program does not start.
    """

    def __init__(self, folder: Path) -> None:
        etcd, kube_apiserver = find_tool("etcd"), find_tool("kube-apiserver")
        self.folder = folder
        etcd_port, peer_port, port = find_free_ports(3)
        self.url = f"https://127.0.0.1:{port}"
        self._authority = Authority(folder)
        admin = self._authority.sign_user(_ADMIN, _ADMIN_GROUPS)
        self.kubeconfig = self._write_kubeconfig("admin.kubeconfig", _ADMIN, admin)
        self.api = Api(self.url, self._authority.certificate, admin)
        self._programs: list[Program] = []
        try:
            storage = self.start(_etcd_command(etcd, folder, etcd_port, peer_port))
            storage.wait_until(lambda: not is_port_free(etcd_port), timeout_s=_START_S)
            server = self.start(self._apiserver_command(kube_apiserver, etcd_port, port))
            server.wait_until(lambda: self.api.is_up("/readyz"), timeout_s=_START_S)
        except BaseException:
            self.close()
            raise

    def write_kubeconfig(
        self, user: str, groups: Sequence[str] = (), *, namespace: str = "default"
    ) -> Path:
        """A kubeconfig that signs in as `user`, who may do nothing until a binding says so."""
        credentials = self._authority.sign_user(user, groups)
        name = f"{credentials.key.stem}.kubeconfig"
        return self._write_kubeconfig(name, user, credentials, namespace=namespace)

    def api_of(self, user: str, groups: Sequence[str] = ()) -> Api:
        """`user`'s view of the server; the caller closes it."""
        credentials = self._authority.sign_user(user, groups)
        return Api(self.url, self._authority.certificate, credentials)

    def create_namespace(self, name: str) -> str:
        """A namespace that enforces restricted pod security, with its `default` ServiceAccount.

        The account is a controller's work in a cluster; without it no pod is admitted.
        """
        metadata = {"name": name, "labels": RESTRICTED}
        self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        account = {"name": "default", "namespace": name}
        self.api.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
        return name

    def grant(self, user: str, namespace: str, rules: Sequence[Object]) -> None:
        """Lets `user` do what `rules` (of a Role) say, in `namespace` alone; returns once it may.

        Raises:
            NotReadyError: the server did not hear of it.
        """
        group = "rbac.authorization.k8s.io"
        metadata = {"name": user, "namespace": namespace}
        role = {"kind": "Role", "metadata": metadata, "rules": list(rules)}
        binding = {
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": user},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
        }
        for item in (role, binding):
            self.api.create({"apiVersion": f"{group}/v1", **item})
        deadline = time.monotonic() + _HEARD_S
        while not self._may(user, namespace, rules[0]):
            if time.monotonic() > deadline:
                raise NotReadyError(f"{user} may still not do in {namespace} what was granted")
            time.sleep(0.02)

    def _may(self, user: str, namespace: str, rule: Object) -> bool:
        """Whether `user` may do what `rule` says: the server reads roles in its own time."""
        resource, _, subresource = rule["resources"][0].partition("/")
        asked = {
            "namespace": namespace,
            "verb": rule["verbs"][0],
            "group": rule["apiGroups"][0],
            "resource": resource,
            "subresource": subresource,
            "name": rule.get("resourceNames", [""])[0],
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": user, "resourceAttributes": asked},
        }
        return bool(self.api.create(review)["status"]["allowed"])

    def start(self, command: Sequence[str | Path]) -> Program:
        """Runs a program beside the server, until `close`."""
        name = Path(command[0]).name
        program = Program(command, log=self.folder / f"{name}.log")
        self._programs.append(program)
        return program

    def close(self) -> None:
        """Ends every program, the last one first."""
        self.api.close()
        while self._programs:
            self._programs.pop().end()

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _apiserver_command(self, binary: Path, etcd_port: int, port: int) -> list[str | Path]:
        shown = self._authority.sign_server()
        account_key = self._authority.service_account_key()
        return [
            binary,
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={port}",
            f"--cert-dir={self.folder}",
            f"--tls-cert-file={shown.certificate}",
            f"--tls-private-key-file={shown.key}",
            f"--client-ca-file={self._authority.certificate}",
            f"--service-account-signing-key-file={account_key}",
            f"--service-account-key-file={account_key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=Node,RBAC",
            # Debian's etcd is 3.4, which lacks what the streamed lists need.
            "--feature-gates=WatchList=false",
        ]

    def _write_kubeconfig(
        self, name: str, user: str, credentials: Credentials, *, namespace: str = "default"
    ) -> Path:
        content: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "shoal",
            "clusters": [
                {
                    "name": "shoal",
                    "cluster": {
                        "server": self.url,
                        "certificate-authority": str(self._authority.certificate),
                    },
                }
            ],
            "users": [
                {
                    "name": user,
                    "user": {
                        "client-certificate": str(credentials.certificate),
                        "client-key": str(credentials.key),
                    },
                }
            ],
            "contexts": [
                {
                    "name": "shoal",
                    "context": {"cluster": "shoal", "user": user, "namespace": namespace},
                }
            ],
        }
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(content))
        return path


def _etcd_command(binary: Path, folder: Path, port: int, peer_port: int) -> list[str | Path]:
    clients, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        binary,
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        "--logger=zap",
        "--log-outputs=stderr",
    ]
