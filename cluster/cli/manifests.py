"""`shoal manifests`: the chart's rendering, for those without Helm."""

from __future__ import annotations

from typing import Annotated

import typer

from .chart_options import (
    DEFAULT_NAME,
    ConfigFile,
    HardwarePreset,
    ModelPreset,
    ReleaseName,
    Sets,
    ValuesFiles,
    compose_values,
)


def manifests(
    config: ConfigFile = None,
    values: ValuesFiles = None,
    sets: Sets = None,
    model: ModelPreset = None,
    hardware: HardwarePreset = None,
    name: ReleaseName = DEFAULT_NAME,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace.")] = "default",
    serve: Annotated[
        bool, typer.Option("--serve", help="Only Serve's part, for `serve deploy`.")
    ] = False,
) -> None:
    """Print the Kubernetes objects that `shoal deploy` would install."""
    from cluster.helm import documents, open_helm
    from cluster.rollout.changes import ray_service

    written = compose_values(config, values, sets, model=model, hardware=hardware)
    helm = open_helm(context=None, namespace=namespace)
    manifest = helm.render(written, name=name, namespace=namespace)
    objects = documents(manifest)
    service = ray_service(objects)
    if serve:
        print(service["spec"]["serveConfigV2"], end="")
        return
    token = service["spec"]["rayClusterConfig"]["authOptions"]["secretName"]
    print(_HEAD.format(namespace=namespace, token=token) + manifest, end="")


_HEAD = """\
# Apply it on the server's side, so that fields which KubeRay or you set later stay theirs:
#   shoal manifests ... | kubectl apply --server-side -f -
# Ray's token is yours to make, once:
#   kubectl -n {namespace} create secret generic {token} \\
#     --from-literal=auth_token="$(openssl rand -hex 24)"
"""
