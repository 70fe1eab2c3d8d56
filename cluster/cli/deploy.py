"""`shoal deploy`: look at the cluster, install the chart, follow until it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .chart_options import (
    DEFAULT_NAME,
    DEFAULT_TIMEOUT_S,
    ConfigFile,
    Context,
    HardwarePreset,
    IgnoreCapacity,
    ModelPreset,
    Namespace,
    NoWait,
    ReleaseName,
    Sets,
    Timeout,
    ValuesFiles,
    Yes,
    compose_values,
)

if TYPE_CHECKING:
    from cluster.helm import HelmEngine


def deploy(
    config: ConfigFile = None,
    values: ValuesFiles = None,
    sets: Sets = None,
    model: ModelPreset = None,
    hardware: HardwarePreset = None,
    name: ReleaseName = DEFAULT_NAME,
    namespace: Namespace = None,
    context: Context = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and change nothing.")
    ] = False,
    yes: Yes = False,
    no_wait: NoWait = False,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    ignore_capacity: IgnoreCapacity = False,
) -> None:
    """Install a Shoal on a Kubernetes cluster with KubeRay, and follow it until it is ready."""
    from cluster.helm import documents, open_helm
    from cluster.kube import connect
    from cluster.rollout.addresses import addresses_of
    from cluster.rollout.changes import ray_service
    from cluster.rollout.release import Release
    from cluster.rollout.report import models_of

    from . import rollout_console as say

    written = compose_values(config, values, sets, model=model, hardware=hardware)
    kube = connect(context=context, namespace=namespace)
    helm = open_helm(context=kube.context, namespace=kube.namespace)
    objects = documents(helm.render(written, name=name, namespace=kube.namespace))
    _refuse_existing(helm, name)
    console = say.make_console()
    looked = say.look(kube, objects)
    has_warned = say.preflight(console, kube, looked, written, has_capacity=ignore_capacity)
    service = ray_service(objects)
    served = ", ".join(models_of(service))
    console.print(f"{served} as {name} in {kube.context}, namespace {kube.namespace}, by {helm}")
    if dry_run:
        helm.deploy(written, name=name, is_upgrade=False, is_dry_run=True)
        checked = "It would be installed" if has_warned else "Everything that was checked is fine"
        console.print(f"{checked}. Nothing was changed.")
        return
    if has_warned:
        say.confirm(question="Go on?", is_sure=yes)
    release = Release(kube, helm, name=name, service=service["metadata"]["name"])
    with say.following(console, limit_s=timeout) as following:
        verdict = release.install(written, None if no_wait else following)
    addresses = addresses_of(objects, context=kube.context, namespace=kube.namespace)
    if no_wait:
        console.print("Installed; the cluster goes on. Once it is ready:")
        console.print("\n".join(addresses.lines()))
    else:
        say.end(verdict, kube, name)
        say.print_ready(console, kube, name, addresses)


def _refuse_existing(helm: HelmEngine, name: str) -> None:
    from cluster.errors import AlreadyRunningError, ForbiddenError

    try:
        history = helm.history(name)
    except ForbiddenError:
        return  # the preflight names this right and every other one
    if history:
        raise AlreadyRunningError(
            f"a release named {name!r} is there: revision {history[-1].number},"
            f" {history[-1].status}",
            hint="Change it with `shoal upgrade`, remove it with `shoal undeploy`, or choose"
            " another --name.",
        )
