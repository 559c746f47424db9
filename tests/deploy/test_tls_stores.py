"""External stores as in production: PostgreSQL and Redis over TLS with a private authority, Redis by Sentinel."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.deploy.engine import Engine, EngineMissingError, Image, wait_until
from tests.support.ports import free_port

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(700)]

CA = "/etc/mayfly/ca/ca.crt"
REDIS_TLS = (
    "--port 0 --tls-cert-file /tls/stores.crt --tls-key-file /tls/stores.key --tls-ca-cert-file /tls/ca.crt "
    "--tls-auth-clients no --tls-replication yes --protected-mode no"
)
SENTINEL = "sentinel resolve-hostnames yes\nsentinel announce-hostnames yes\nsentinel monitor mymaster redis 6379 1\n"
DATABASE_URL = "postgresql://mayfly:mayfly@postgres/mayfly?sslmode=verify-full"


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores on *network*; *authority* is the file of the authority that signed their certificates."""

    engine: Engine
    image: Image
    network: str
    authority: Path

    def options(self, more: dict[str, str], authority: Path | None = None) -> list[str]:
        """Return the options for a Mayfly container beside the stores, as the production overlay starts it."""
        given = {
            "MAYFLY_DATABASE_URL": DATABASE_URL,
            "PGSSLROOTCERT": CA,
            "SYNC_WEBHOOK_SECRET": "whsec_0123456789abcdef",
            **more,
        }
        variables = [part for name, value in given.items() for part in ("--env", f"{name}={value}")]
        mount = f"{authority or self.authority}:{CA}:ro"
        return ["--network", self.network, "--read-only", "--tmpfs", "/data:mode=1777", "--volume", mount, *variables]

    def mayfly(self, command: str, authority: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a Mayfly command to its end."""
        options = self.options({}, authority)
        return self.engine.run("run", "--rm", "--pull=never", *options, self.image.tag, command, check=False)


@pytest.fixture(scope="module")
def stores(engine: Engine, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """Start PostgreSQL, Redis and a Sentinel that speak TLS only, each with a certificate for its name."""
    try:
        engine.have("redis:7-alpine", "postgres:16")
    except EngineMissingError as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("tls")
    _make_certificates(folder)
    network = f"mayfly-test-tls-{os.getpid()}"
    engine.run("network", "create", network)
    postgres = "POSTGRES_USER=mayfly POSTGRES_DB=mayfly POSTGRES_PASSWORD=mayfly"
    variables = [part for pair in postgres.split() for part in ("--env", pair)]
    # The key must belong to whoever reads it, and that is another user in each image: each makes its own copy.
    start_postgres = (
        "cp /tls/stores.key /tmp/key && chmod 600 /tmp/key && PATH=/usr/local/bin:$PATH exec docker-entrypoint.sh "
        "postgres -c ssl=on -c ssl_cert_file=/tls/stores.crt -c ssl_key_file=/tmp/key"
    )
    start_sentinel = (
        f"printf '{SENTINEL}' > /tmp/sentinel.conf && exec redis-server /tmp/sentinel.conf --sentinel {REDIS_TLS} "
        "--tls-port 26379"
    )
    start_redis = f"exec redis-server {REDIS_TLS} --tls-port 6379"

    def service(name: str, image: str, script: str, *options: str) -> contextlib.AbstractContextManager[str]:
        place = f"--network {network} --network-alias {name} --volume {folder}:/tls:ro --entrypoint sh"
        return engine.container(image, "-c", script, options=[*place.split(), *options])

    try:
        with (
            service("redis", "redis:7-alpine", start_redis),
            service("sentinel", "redis:7-alpine", start_sentinel),
            service("postgres", "postgres:16", start_postgres, *variables, "--user", "999"),
        ):
            yield Stores(engine, image, network, folder / "ca.crt")
    finally:
        engine.run("network", "rm", "--force", network, check=False)


def _make_certificates(folder: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    (folder / "names").write_text("subjectAltName=DNS:redis,DNS:sentinel,DNS:postgres")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=authority",
        "req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.crt -days 2 -subj /CN=other",
        "req -newkey rsa:2048 -nodes -keyout stores.key -out stores.csr -subj /CN=stores",
        "x509 -req -in stores.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out stores.crt -days 2 -extfile names",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    for file in (folder, *folder.iterdir()):
        file.chmod(0o755)


def test_postgresql_is_reached_over_tls_by_its_name_and_authority(stores: Stores) -> None:
    wait_until(lambda: stores.mayfly("migrate").returncode == 0, seconds=60, every=1, what="the tables are there")

    refused = stores.mayfly("migrate", authority=stores.authority.with_name("other.crt"))

    assert refused.returncode == 1
    assert "certificate" in refused.stderr.lower(), refused.stderr


@pytest.mark.parametrize(
    "redis_url",
    [
        f"rediss://redis:6379/0?ssl_ca_certs={CA}",
        f"sentinel://sentinel:26379/mymaster/0?ssl=true&ssl_ca_certs={CA}",
    ],
)
def test_redis_is_reached_over_tls(stores: Stores, redis_url: str) -> None:
    wait_until(lambda: stores.mayfly("migrate").returncode == 0, seconds=60, every=1, what="the tables are there")
    port = free_port()
    options = [*stores.options({"MAYFLY_REDIS_URL": redis_url}), "--publish", f"127.0.0.1:{port}:8080"]

    with stores.engine.container(stores.image.tag, "api", options=options) as name:

        def parts() -> dict[str, dict[str, str]]:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False)
                found: dict[str, dict[str, str]] = answer.json()["parts"]
                return found
            return {}

        wait_until(lambda: bool(parts()), seconds=20, what="/health/ready answers")
        found, logs = parts(), stores.engine.logs(name)

    assert (found["ledger"], found["redis"]) == ({"status": "ok"}, {"status": "ok"}), logs
