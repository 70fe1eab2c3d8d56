"""A certificate authority of its own: the server's identity, and users who sign in with theirs.

In Kubernetes a client certificate is a user: its common name is the user, its organisations are
the groups. Keys live in a folder that goes away with the server, and are good for a day.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_LIFETIME = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates into `folder`; `certificate` is what clients trust."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal-test")])
        builder = _builder(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.certificate = folder / "ca.crt"
        self.certificate.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))

    def sign_server(self) -> Credentials:
        """What a server on loopback shows."""
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        return self._sign("kube-apiserver", names=names)

    def sign_user(self, user: str, groups: Sequence[str] = ()) -> Credentials:
        """What a client shows to be `user` in `groups`."""
        return self._sign(user, groups)

    def service_account_key(self) -> Path:
        """A key pair that signs and checks service account tokens."""
        path = self._folder / "service-account.key"
        _write_key(path, ec.generate_private_key(ec.SECP256R1()))
        return path

    def _sign(
        self,
        user: str,
        groups: Sequence[str] = (),
        *,
        names: x509.SubjectAlternativeName | None = None,
    ) -> Credentials:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups),
                x509.NameAttribute(NameOID.COMMON_NAME, user),
            ]
        )
        builder = _builder(subject, self._name, key)
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        stem = f"{user.replace(':', '-')}-{next(self._numbers)}"
        credentials = Credentials(self._folder / f"{stem}.crt", self._folder / f"{stem}.key")
        credentials.certificate.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        _write_key(credentials.key, key)
        return credentials


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,  # the API server reads no other
            serialization.NoEncryption(),
        )
    )
