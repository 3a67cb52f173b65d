"""The run store on a local S3 server behind a proxy that injects faults (P1-P5)."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time

import numpy as np
import pytest
import ray
from rich.console import Console

from autoscale_ray.artifacts import RunStore, StaleWriterError
from autoscale_ray.cli import main
from autoscale_ray.distributed.session import run_on_ray
from autoscale_ray.distributed.status import status_lines
from autoscale_ray.errors import ArtifactError, StorageUnavailableError
from autoscale_ray.journal import read_rounds
from autoscale_ray.run_folder import work_dir
from tests.ray.conftest import ENVIRONMENT
from tests.ray.fault_proxy import FAULTS, SILENT, FaultProxy
from tests.ray.small_run import config_of
from tests.unit.storage_shims import IDENTITY, play

pytest.importorskip("obstore", reason="needs the extra s3")
moto_server = pytest.importorskip("moto.server", reason="needs moto[server,s3]")

BUCKETS = (f"bucket{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def s3_port():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxied(s3_port, monkeypatch, tmp_path):
    """Return a function that makes a bucket behind a proxy with given faults: (proxy, run URL).

    The client for gs is the one that Google's servers would see; the proxy tells the S3 server what it asks for.
    """
    proxy = FaultProxy(s3_port, lambda call: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    key = {"gcs_base_url": proxy.url, "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "key.json").write_text(json.dumps(key))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
    monkeypatch.setattr("autoscale_ray.object_storage.TIMEOUT_S", 1)

    def make(choose=lambda call: None, scheme: str = "s3") -> tuple[FaultProxy, str]:
        bucket = next(BUCKETS)
        request(s3_port, "PUT", f"/{bucket}")
        proxy.restart(choose)
        return proxy, f"{scheme}://{bucket}/runs/one"

    yield make
    proxy.close()


def request(port: int, method: str, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path)
    content = connection.getresponse().read()
    connection.close()
    return content


def digests(url: str) -> list[str]:
    return [record.sha256 for record in read_rounds(url)]


@pytest.fixture
def reference(tmp_path) -> list[str]:
    return [record.sha256 for record in finished(str(tmp_path / "reference"), 2)]


def finished(run_dir: str, num_rounds: int):
    store = RunStore.open(run_dir, IDENTITY)
    play(store, num_rounds)
    return store.rounds()


def check_faults(fault: str, step: int, proxied, reference: list[str], scheme: str = "s3") -> int:
    """Inject a fault at every step-th call until none is left; return how many were injected."""
    for number in itertools.count():
        at = 1 + number * step
        proxy, url = proxied(lambda call, at=at: fault if call == at else None, scheme)
        finished(url, 2)
        if not proxy.num_faults:
            return number
        proxy.restart(lambda call: None)
        assert digests(url) == reference, (fault, at)
    raise AssertionError


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_tenth_call_gives_the_same_chain(fault: str, proxied, reference) -> None:
    assert check_faults(fault, 10, proxied, reference) >= 3


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["throttled", "answer lost", "own retry refused"])
def test_the_client_for_gs_gives_the_same_chain(fault: str, proxied, reference) -> None:
    assert check_faults(fault, 10, proxied, reference, "gs") >= 3


@pytest.mark.timeout(120)
def test_a_bucket_that_never_answers_is_named_in_time_and_changes_nothing(
    proxied, reference, monkeypatch
) -> None:
    """P8: connections stay open and no byte comes; less patience and shorter deadlines than by default."""
    monkeypatch.setattr("autoscale_ray.object_storage.PATIENCE_S", 1.0)
    proxy, url = proxied()
    run = RunStore.open(url, IDENTITY)
    play(run, 1)
    proxy.restart(lambda call: SILENT)
    started_s = time.monotonic()
    with pytest.raises(StorageUnavailableError, match="no answer after"):
        play(run, 2)
    assert time.monotonic() - started_s < 60
    proxy.restart(lambda call: None)
    assert digests(url) == reference[:1]
    assert [record.sha256 for record in finished(url, 2)] == reference


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_outage_of_half_a_minute_is_survived(proxied, reference) -> None:
    proxy, url = proxied()
    run = RunStore.open(url, IDENTITY)
    play(run, 1)
    back_s = time.monotonic() + 30
    proxy.restart(lambda call: "throttled" if time.monotonic() < back_s else None)
    play(run, 2)
    assert proxy.num_faults > 5
    assert digests(url) == reference


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_does_not_exist_is_one_line_at_once(scheme: str, proxied) -> None:
    proxy, url = proxied(scheme=scheme)
    url = url.replace("/runs/", "-not-there/runs/")
    for reach in (read_rounds, lambda url: RunStore.open(url, IDENTITY)):
        with pytest.raises(ArtifactError, match="no such bucket"):
            reach(url)
    assert proxy.num_calls < 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_once_at_each_call_gives_the_same_chain(fault: str, proxied, reference) -> None:
    print(f"{fault}: {check_faults(fault, 1, proxied, reference)} calls, same chain every time")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_writer_on_a_bucket_supersedes_another(scheme: str, proxied) -> None:
    _, url = proxied(scheme=scheme)
    first = RunStore.open(url, IDENTITY)
    first.commit_round(0, {"by": 1})
    second = RunStore.open(url, IDENTITY)
    with pytest.raises(StaleWriterError, match="writer 1 was superseded by writer 2"):
        first.commit_round(1, {"by": 1})
    second.commit_round(1, {"by": 2})
    assert [record.payload["by"] for record in read_rounds(url)] == [1, 2]


@pytest.mark.timeout(60)
def test_four_writers_at_once_never_fork_a_run(proxied) -> None:
    _, url = proxied()
    told: list[tuple[int, int]] = []

    def drive(driver: int) -> None:
        try:
            store = RunStore.open(url, IDENTITY)
            for index in range(len(store.rounds()), 5):
                store.commit_round(index, {"driver": driver})
                told.append((index, driver))
        except StaleWriterError:
            return

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    writers = [record.payload["driver"] for record in read_rounds(url)]
    assert len(writers) == 5
    assert all(writers[index] == driver for index, driver in told)
    assert len({index for index, _ in told}) == len(told)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_hundred_rounds_with_a_sixth_of_the_calls_faulty(proxied, tmp_path) -> None:
    reference = [record.sha256 for record in finished(str(tmp_path / "long"), 500)]
    generator = np.random.default_rng(21)
    kinds = ("throttled", "reset", "answer lost", "conflict", "own retry refused")
    shares = np.array([10, 2, 2, 1, 1]) / 16

    def choose(call: int) -> str | None:
        return str(generator.choice(kinds, p=shares)) if generator.random() < 0.16 else None

    proxy, url = proxied(choose)
    finished(url, 500)
    assert digests(url) == reference
    print(f"500 rounds, {proxy.num_calls} calls, {proxy.num_faults} faults: 0 lost, 0 duplicate")


@pytest.mark.timeout(300)
def test_a_run_on_ray_in_a_bucket_behind_faults_has_the_chain_of_one_in_a_folder(
    head, reference_run, s3_port, monkeypatch, tmp_path
) -> None:
    """Every fiftieth call is answered with 503, and the answer of every 53rd is lost."""
    faults = {50: "throttled", 53: "answer lost"}
    proxy = FaultProxy(s3_port, lambda call: next((f for n, f in faults.items() if call % n == 0), None))
    bucket = next(BUCKETS)
    request(s3_port, "PUT", f"/{bucket}")
    url = f"s3://{bucket}/runs/small"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    where = {"AWS_ENDPOINT_URL": proxy.url, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name, value in {**keys, **where, **ENVIRONMENT}.items():
        monkeypatch.setenv(name, value)
    config = config_of(tmp_path, f"placement.run_dir={url}")
    work_dir(config).mkdir(parents=True)
    (work_dir(config) / "pools").symlink_to(reference_run / "pools")
    environment = {"env_vars": {**keys, **where}}
    ray.init(address=head["address"], namespace="autoscale", log_to_driver=False, runtime_env=environment)
    try:
        assert run_on_ray(config, Console(quiet=True))["state"] == "finished"
    finally:
        ray.shutdown()
    assert proxy.num_faults > 3
    proxy.restart(lambda call: None)
    assert read_rounds(url) == read_rounds(str(reference_run))
    assert (work_dir(config) / "report.html").is_file()
    told = status_lines(url)
    assert told[0] == f"{url}: {len(read_rounds(url))} rounds published"
    assert "last event: driver ended (finished)" in "\n".join(told)
    assert "final comparison is done" in "\n".join(told)
    assert told[-1].startswith("driver: none on the cluster at ")
    main(["report", url])
    proxy.close()
