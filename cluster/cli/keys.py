"""`shoal keys`: make, list and revoke API keys, in a local file or in a Secret of a cluster.

A new key alone goes to standard output, so that `KEY=$(shoal keys create me)` works.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.keys import KeyStore
    from serve.keys import ApiKey

app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key: who uses it.")]
File = Annotated[
    Path | None,
    typer.Option("--file", help="File of keys (default: ~/.config/shoal/keys.yaml)."),
]
SecretName = Annotated[
    str | None, typer.Option("--secret", help="Secret of a cluster, instead of a file.")
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace of the Secret.")
]
Context = Annotated[
    str | None, typer.Option("--context", help="Context of the kubeconfig (default: current).")
]


@app.command("create")
def create(
    name: KeyName,
    expires: Annotated[
        str | None, typer.Option("--expires", help="Lifetime as 12h, 30d or 8w (default: none).")
    ] = None,
    file: File = None,
    secret: SecretName = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Make a key and print it, this once: what is kept is its hash."""
    from cluster.keys import create_key, parse_lifetime

    lifetime = None if expires is None else parse_lifetime(expires)
    store = _store(file, secret, namespace, context)
    key = create_key(store, name, lifetime=lifetime)
    _say(f"Key {name!r} is in {store.place}, as a hash. It is shown only now:")
    print(key, flush=True)
    _say(
        "Clients send it as `Authorization: Bearer KEY`. `shoal chat` takes it from SHOAL_API_KEY."
    )


@app.command("list")
def list_(
    file: File = None,
    secret: SecretName = None,
    namespace: Namespace = None,
    context: Context = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON array.")] = False,
) -> None:
    """Show every key's name and times; keys themselves are kept nowhere."""
    from cluster.keys import list_keys

    store = _store(file, secret, namespace, context)
    reports = [_describe(key) for key in list_keys(store)]
    if as_json:
        print(json.dumps(reports, indent=2))
        return
    if not reports:
        _say(
            f"There is no key in {store.place}. Make one with: shoal keys create NAME"
            f"{store.options}"
        )
        return
    rows = [("NAME", "CREATED", "EXPIRES"), *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, created, expiry in rows:
        print(f"{name:<{widths[0]}}  {created:<{widths[1]}}  {expiry}")


@app.command("revoke")
def revoke(
    name: KeyName,
    file: File = None,
    secret: SecretName = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Remove a key: servers refuse it as soon as they see the change."""
    from cluster.keys import revoke_key

    store = _store(file, secret, namespace, context)
    revoke_key(store, name)
    when = "within seconds" if secret is None else "within about a minute, as the kubelet syncs it"
    _say(f"Key {name!r} is no longer in {store.place}; running servers see that {when}.")


def _store(
    file: Path | None, secret: str | None, namespace: str | None, context: str | None
) -> KeyStore:
    from cluster.errors import UsageError
    from cluster.keys import SECRET_KEY, FileStore, default_path

    if secret is None:
        if namespace is not None or context is not None:
            raise UsageError("--namespace and --context go with --secret NAME")
        return FileStore(file or default_path())
    if file is not None:
        raise UsageError("--file and --secret exclude each other")
    from cluster.kube import SecretStore

    return SecretStore(context, namespace, secret, SECRET_KEY)


def _describe(key: ApiKey) -> dict[str, str | bool | None]:
    return {
        "name": key.name,
        "created": key.created.isoformat(),
        "expires": None if key.expires is None else key.expires.isoformat(),
        "is_expired": key.is_expired(time.time()),
    }


def _row(report: dict[str, str | bool | None]) -> tuple[str, str, str]:
    expires = str(report["expires"] or "never")
    if report["is_expired"]:
        expires += " (expired)"
    return str(report["name"]), str(report["created"]), expires


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
