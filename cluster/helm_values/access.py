"""Values about who may ask, and by which way requests come in.

Not network policies, which are about pods (`chart`). The one decision: no default opens anything:
without keys, or `allowAnonymous` in so many words, the chart is refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .values import Labels, Values


class RayTokenValues(Values):
    """Ray's token: dashboard, jobs and Ray's own calls."""

    existing_secret: str = Field(
        "", description="A Secret with the key auth_token; empty: the chart makes one and keeps it."
    )


class ApiKeysValues(Values):
    """Keys of the API."""

    existing_secret: str = Field(
        "", description="The Secret with the API keys, as `shoal keys create --secret` makes it."
    )
    key: str = Field("keys", min_length=1, description="The key of that Secret.")


class HubTokenValues(Values):
    """For downloads of gated repositories."""

    existing_secret: str = Field("", description="A Secret with a token of the hub.")
    key: str = Field("token", min_length=1, description="The key of that Secret.")


class AuthValues(Values):
    """Who may ask."""

    ray_token: RayTokenValues = RayTokenValues()
    api_keys: ApiKeysValues = ApiKeysValues()
    allow_anonymous: bool = Field(
        False, description="Serve without keys, to anyone who can reach it."
    )
    hf_token: HubTokenValues = HubTokenValues()


class ServiceValues(Values):
    """The chart's own Service."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        "ClusterIP", description="Type of the chart's own Service."
    )
    port: int = Field(8080, ge=1, le=65535, description="Its port; the pods listen on 8000.")
    annotations: Labels = Field({}, description="Its annotations.")


class IngressValues(Values):
    """For ingress."""

    class_name: str = Field("", description="IngressClass; empty: the cluster's default.")
    annotations: Labels = Field(
        {
            "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600",
            "nginx.ingress.kubernetes.io/proxy-send-timeout": "3600",
            "nginx.ingress.kubernetes.io/proxy-body-size": "8m",
            "nginx.ingress.kubernetes.io/proxy-buffering": "off",
        },
        description="Controllers cut a silent stream after a minute unless told otherwise; these"
        " are for ingress-nginx, see your controller's manual for its own.",
    )
    tls_secret: str = Field("", description="Secret with the certificate of the host.")


class GatewayValues(Values):
    """The Gateway that carries it."""

    name: str = Field("", description="Name of the Gateway.")
    namespace: str = Field("", description="Its namespace; empty: the release's.")


class HttpRouteValues(Values):
    """For httproute."""

    gateway: GatewayValues = GatewayValues()
    timeout: str | None = Field(
        None,
        pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$",
        description="Longest request; null: the longest generation and a minute.",
    )


class WebValues(Values):
    """The page."""

    enabled: bool = Field(True, description="Serve the page at / beside the API.")


class ExposeValues(Values):
    """Ingress or HTTPRoute."""

    type: Literal["none", "ingress", "httproute"] = Field(
        "none", description="How the API is reached from outside the cluster."
    )
    host: str = Field("", description="Host name of the Ingress or HTTPRoute.")
    ingress: IngressValues = IngressValues()
    httproute: HttpRouteValues = HttpRouteValues()
