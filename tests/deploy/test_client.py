"""The command line over TLS, with the certificate that `make secrets` creates."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

from tests.golden import TYPICAL
from tests.test_client import run, trouble

SECRETS = Path(__file__).parents[2] / "deploy/secrets.sh"


def test_a_self_signed_certificate_is_trusted_only_when_named(tmp_path: Path) -> None:
    (tmp_path / "secrets.sh").write_bytes(SECRETS.read_bytes())
    subprocess.run(["sh", tmp_path / "secrets.sh"], check=True, capture_output=True)
    certificate = tmp_path / "secrets/tls_certificate"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, tmp_path / "secrets/tls_key")
    with trouble() as (server, url):
        server.socket = context.wrap_socket(server.socket, server_side=True)
        https = url.replace("http://127.0.0.1", "https://localhost")
        assert "1 images, 0 of them not classified" in run(TYPICAL, "--url", https, "--cacert", certificate)
        assert "CERTIFICATE_VERIFY_FAILED" in run(TYPICAL, "--url", https, code=2)
