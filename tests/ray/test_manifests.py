"""Every cluster manifest, checked without a cluster: Ray's own validators, the KubeRay schemas, rules by hand."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

from autoscale_ray import __version__

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
SCHEMAS = Path(__file__).parents[3] / "shared" / "schemas"
UP = sorted(path.name for path in CONFIGS.glob("*.yaml"))
KUBERAY = ("raycluster.yaml", "rayjob.yaml", "rayjob-kueue.yaml")
needs_schemas = pytest.mark.skipif(
    not SCHEMAS.is_dir(), reason="the KubeRay schemas are not in ../shared/schemas"
)

pytestmark = pytest.mark.timeout(60)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / name).read_text())


def check_up(config: dict[str, Any]) -> None:
    config = copy.deepcopy(config)
    local = config["provider"]["type"] == "local"
    validate_config(prepare_config(config) if local else fillout_defaults(config))


@pytest.mark.parametrize("name", UP)
def test_ray_up_accepts_it(name: str) -> None:
    check_up(load(name))


def test_all_four_places_are_there() -> None:
    assert {"laptop.yaml", "onprem.yaml", "aws.yaml", "gcp.yaml"} == set(UP)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize("damage", [{"max_worker": 3}, {"max_workers": "4"}])
def test_ray_up_refuses_a_slip(name: str, damage: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(damage))):
        check_up(load(name) | damage)


@pytest.mark.parametrize("name", UP)
def test_started_nodes_are_closed_to_strangers(name: str) -> None:
    config = load(name)
    head = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert all("--dashboard-host=127.0.0.1" in line for line in head)
    starts = [*head, *(line for line in config["worker_start_ray_commands"] if "ray start" in line)]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_cloud_clusters_have_gpu_workers_and_an_idle_head(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert head["resources"]["trial_slot"] >= 1
    assert any(kind["resources"].get("GPU", 0) >= 1 and kind["max_workers"] >= 1 for kind in types.values())
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]


def test_the_head_of_ones_own_machines_is_idle_and_state_lies_on_shared_storage() -> None:
    config = load("onprem.yaml")
    (head,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--num-cpus=0 --num-gpus=0" in head
    assert re.search(r"""--resources='\{"trial_slot":[1-9]\d*\}'""", head)
    for name in ("onprem.yaml", "aws.yaml", "gcp.yaml"):
        config = load(name)
        assert any("/data/autoscale" in line for line in config["initialization_commands"]), name
        assert any("auth_token" in target for target in config["file_mounts"]), name
        wheel = f"/data/autoscale/autoscale_ray-{__version__}-py3-none-any.whl[gpu"
        assert any(wheel in line for line in config["setup_commands"]), name


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_images_of_the_cloud_are_to_be_filled_in(name: str) -> None:
    """One was named that has Python 3.10, on which pip refuses the wheel."""
    text = (CONFIGS / name).read_text()
    images = re.findall(r"^ *(?:ImageId|sourceImage): (\S+)", text, flags=re.MULTILINE)
    assert images
    assert all("<" in image or image == "ami-0123456789abcdef0" for image in images)


def strict(schema: Any) -> Any:
    """Turn a structural schema of Kubernetes into a JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(item) for key, item in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get(
        "x-kubernetes-embedded-resource"
    )
    if "properties" in schema and "additionalProperties" not in schema and not is_open:
        made["additionalProperties"] = False
    return made


def errors(manifest: dict[str, Any]) -> list[str]:
    kind = manifest["kind"].lower()
    schema = strict(json.loads((SCHEMAS / f"ray.io_v1_{kind}s.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    found = Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


@needs_schemas
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_schema_accepts_it(name: str) -> None:
    assert errors(load(f"kuberay/{name}")) == []


@needs_schemas
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "shutdownAfterJobFinishes"), "yes"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplica"), 1),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resourcez"), {}),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "maybe"),
    ],
)
def test_kuberay_schema_refuses_a_slip(path: tuple[Any, ...], value: Any) -> None:
    manifest = load("kuberay/rayjob.yaml")
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(str(path[-1]) in error for error in errors(manifest))


def cluster_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in KUBERAY:
        spec = load(f"kuberay/{name}")["spec"]
        yield name, spec.get("rayClusterSpec", spec)


def containers(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]["spec"], group["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("name", "spec"), list(cluster_specs()), ids=KUBERAY)
def test_kuberay_clusters_keep_the_rules_that_no_schema_says(name: str, spec: dict[str, Any]) -> None:
    head = spec["headGroupSpec"]["rayStartParams"]
    assert head["num-cpus"] == "0"
    assert json.loads(json.loads(head["resources"]))["trial_slot"] >= 1
    assert spec["authOptions"]["mode"] == "token"
    assert spec["rayVersion"] == "2.60.0"
    assert any("nvidia.com/gpu" in container["resources"]["limits"] for _, container in containers(spec))
    for pod, container in containers(spec):
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits["memory"] == requests["memory"], "Ray's object store is sized by the limit"
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["image"].rpartition(":")[2] != "latest"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_image_has_the_ray_and_the_jobs_of_the_manifests() -> None:
    lines = (CONFIGS / "kuberay" / "Dockerfile").read_text().splitlines()
    (base,) = [line for line in lines if line.startswith("FROM")]
    for name, spec in cluster_specs():
        assert f":{spec['rayVersion']}-" in base
        (tag,) = {container["image"].rpartition(":")[2] for _, container in containers(spec)}
        assert tag == version("autoscale-ray")
        entrypoint = load(f"kuberay/{name}")["spec"].get("entrypoint", "")
        for script in re.findall(r"jobs/\w+\.py", entrypoint):
            assert (CONFIGS.parent / script).is_file()
    assert f"ray=={ray.__version__}" in (CONFIGS.parent / "constraints.txt").read_text().splitlines()
    assert base.startswith(f"FROM rayproject/ray:{ray.__version__}-")


def test_the_readme_names_every_file_and_every_job() -> None:
    text = (CONFIGS / "README.md").read_text()
    files = [path for path in CONFIGS.rglob("*") if path.is_file() and path.name != "README.md"]
    unnamed = [path.name for path in files if path.suffix != ".json" and path.name not in text]
    jobs = [
        path.name
        for path in (CONFIGS.parent / "jobs").glob("*_*.py")
        if path.stem not in ("__init__", "demo_real")
    ]
    assert unnamed == []
    assert [name for name in jobs if name not in text] == []


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayjob-kueue.yaml"])
def test_jobs_clean_up_and_can_be_retried(name: str) -> None:
    spec = load(f"kuberay/{name}")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in spec
    assert "suspend" not in spec, "Kueue owns it"
    assert "deletionStrategy" not in spec, "excludes shutdownAfterJobFinishes"
    assert "placement.run_dir=/data/autoscale/" in spec["entrypoint"], "the state must outlive the cluster"
    assert spec["activeDeadlineSeconds"] >= 14 * 86_400, "runs of a week were ended after two days"


def test_the_queued_job_has_a_queue_and_fixed_sizes() -> None:
    manifest = load("kuberay/rayjob-kueue.yaml")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    cluster = manifest["spec"]["rayClusterSpec"]
    assert not cluster.get("enableInTreeAutoscaling", False)
    assert all(group["minReplicas"] == group["maxReplicas"] for group in cluster["workerGroupSpecs"][:1])


def test_jobs_run_with_what_their_entrypoint_asks_of_the_cluster() -> None:
    from autoscale_ray.config_file import load_config
    from autoscale_ray.distributed.resources import needs_of, shortage

    for name in ("rayjob.yaml", "rayjob-kueue.yaml"):
        spec = load(f"kuberay/{name}")["spec"]
        overrides = [word for word in spec["entrypoint"].split() if "=" in word]
        config = load_config(None, overrides).placement.ray
        assert config.start_timeout_s >= 600, "pods and nodes take minutes to come"
        needs = needs_of(config)
        groups = spec["rayClusterSpec"]["workerGroupSpecs"]
        total: dict[str, float] = {"CPU": 0, "GPU": 0}
        for group in groups:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            total["CPU"] += group["maxReplicas"] * float(limits["cpu"])
            total["GPU"] += group["maxReplicas"] * float(limits.get("nvidia.com/gpu", 0))
        assert shortage(needs, total) is None, name


def test_the_network_policy_lets_only_the_cluster_and_its_operator_in() -> None:
    documents = list(yaml.safe_load_all((CONFIGS / "kuberay" / "support.yaml").read_text()))
    (policy,) = [item for item in documents if item["kind"] == "NetworkPolicy"]
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    sources = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
    assert len(sources) == 3
    assert all(source.keys() <= {"podSelector", "namespaceSelector"} for source in sources)
    assert not any(
        source.get("podSelector") == {} or source.get("namespaceSelector") == {} for source in sources
    )
    (claim,) = [item for item in documents if item["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for _, spec in cluster_specs()
        for pod, _ in containers(spec)
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {claim["metadata"]["name"]}
