"""What Helm says when it fails, in Shoal's words: both engines use the same sentences."""

from __future__ import annotations

import re

from cluster.errors import AlreadyRunningError, ClusterError, CommandError, UsageError
from cluster.permissions import forbidden

_SCHEMA_LINE = re.compile(r"^- at '([^']*)': (.*)$", re.MULTILINE)
_FAIL = re.compile(r"execution error at \(([^)]*)\): (.*)", re.DOTALL)
_DEBUG = "Use --debug flag to render out invalid YAML"
NOTHING_DONE = "Nothing was changed."


def is_not_found(text: str) -> bool:
    """Whether Helm says that there is no such release."""
    return "release: not found" in text or "has no deployed releases" in text


def explain(text: str, *, namespace: str) -> CommandError:
    """The error for what Helm wrote on its standard error, or raised."""
    text = text.replace(_DEBUG, "").removeprefix("Error: ").strip()
    refused = _SCHEMA_LINE.findall(text)
    if refused:
        lines = [f"{_key(path)}: {reason}" for path, reason in refused]
        quote = [f"{_key(path)}=" for path, reason in refused if reason.endswith("want string")]
        hint = f"Quote text that looks like a number: --set '{quote[0]}\"2\"'\n" if quote else ""
        message = "the values cannot be used\n" + "\n".join(lines)
        return UsageError(message, hint=hint + NOTHING_DONE)
    failed = _FAIL.search(text)
    if failed is not None:
        return UsageError(f"the values cannot be used\n{failed[2].strip()}", hint=NOTHING_DONE)
    if "invalid release name" in text:
        limit = "lower-case letters, digits and hyphens, at most 53 of them"
        return UsageError(f"--name: must be {limit}: {text}", hint=NOTHING_DONE)
    if "cannot reuse a name" in text or "cannot re-use a name" in text:
        return AlreadyRunningError(text, hint="Change it with: shoal upgrade")
    if "asked for the client to provide credentials" in text:
        return ClusterError(
            "the Kubernetes API does not accept the kubeconfig's credentials",
            hint="They may have expired: log in again with your provider's tool.",
        )
    if "cluster unreachable" in text:
        return ClusterError(
            f"the Kubernetes API does not answer: {text}",
            hint="Is it the right context? See: kubectl config get-contexts; kubectl cluster-info",
        )
    if "another operation" in text:
        return ClusterError(
            "another Helm operation on this release is in progress, or was killed in the middle",
            hint="If nothing else runs: shoal rollback, or shoal undeploy where it was the first.",
        )
    return forbidden(text, namespace=namespace) or ClusterError(f"Helm: {text}")


def _key(path: str) -> str:
    return path.strip("/").replace("/", ".") or "values"
