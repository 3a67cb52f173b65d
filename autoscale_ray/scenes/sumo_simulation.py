"""Make a synthetic pool by running SUMO on generated or given networks; its programs run as processes of their own.

Every run draws its network, demand and drivers from one seed, so equal options give equal scenes. SUMO is the
package eclipse-sumo (EPL-2.0 or GPL-2.0-or-later), an extra of this one; nothing of it is linked or shipped.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from autoscale_ray.errors import InvalidInputError, MissingExtraError, extra
from autoscale_ray.scenes.ingest import ingest
from autoscale_ray.scenes.manifest import PoolManifest
from autoscale_ray.scenes.pool_writer import check_unused
from autoscale_ray.scenes.readers.sumo import units
from autoscale_ray.scenes.trust import parse_xml, read_file

STEP_S = 0.1
FCD_PERIOD_S = 0.5
FRINGE_PREFERENCE = 8.0
_CLASSES = {
    "passenger": (4.2, 5.2, 1.8),
    "delivery": (5.4, 6.6, 2.1),
    "truck": (7.0, 10.0, 2.4),
    "bus": (11.0, 12.5, 2.5),
}
_CLASS_SHARES = (0.82, 0.08, 0.06, 0.04)
_TYPES_PER_RUN = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class SumoOptions:
    """What is simulated; each pair of numbers is a range that every run draws from."""

    networks: tuple[str, ...] = ("grid", "spider", "rand", "roundabout")
    """Kinds of `NETWORKS`, or paths of net.xml files; run after run takes the next one."""
    num_runs: int = 4
    """Simulations, each with a network, a demand and drivers of its own, >= 1."""
    duration_s: float = 600.0
    """Simulated time of a run, 10 to 86400 s."""
    departures_per_minute: tuple[float, float] = (15.0, 60.0)
    """Vehicles that depart."""
    sigma: tuple[float, float] = (0.2, 0.8)
    """Driver imperfection of SUMO's car following models: 0 is perfect, 1 the worst."""
    speed_deviation: tuple[float, float] = (0.05, 0.2)
    """Standard deviation of the drivers' wished speed around the limit, as a share of it."""
    violation_share: tuple[float, float] = (0.0, 0.15)
    """Share of drivers with minor violations: too fast, too close, late yellow, right of way ignored now and then."""
    seed: int = 0
    """Seed of everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficCounts:
    """What SUMO says about one run."""

    name: str
    num_vehicles: int
    """Vehicles that departed."""
    num_collisions: int
    num_teleports: int


def simulate(
    out: Path | str,
    options: SumoOptions | None = None,
    *,
    keep: Path | str | None = None,
    num_processes: int = 1,
    progress: Callable[[str], None] | None = None,
) -> tuple[PoolManifest, list[TrafficCounts]]:
    """Simulate traffic and make a pool of it.

    Args:
        out: Folder of the new pool.
        options: What is simulated.
        keep: Folder that keeps SUMO's own files (network, routes, floating car data), without those of other runs; a
            temporary one by default.
        num_processes: Parts of 8 runs read side by side.
        progress: Called with one line for every step.

    Returns:
        The manifest of the pool, and the counts of each run.

    Raises:
        MissingExtraError: eclipse-sumo is not installed.
        InvalidInputError: An option out of range, a network that cannot be used, or a program of SUMO that failed.
        PoolError: The folder is in use.
    """
    options = options or SumoOptions()
    _check(options)
    check_unused(Path(out))
    program_path("sumo")
    say = progress or (lambda line: None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        own = {f"{_run_name(options, number)}.fcd.xml.gz" for number in range(options.num_runs)}
        others = sorted(set(units(folder)) - own)
        _require(not others, "keep", "must not hold floating car data of other runs", others[:1])
        counts = []
        for number in range(options.num_runs):
            say(f"simulating run {number + 1} of {options.num_runs}")
            counts.append(simulate_run(folder, number, options))
        say("reading the simulated traffic")
        return ingest("sumo", folder, out, "synthetic", num_processes=num_processes), counts


def simulate_run(folder: Path, number: int, options: SumoOptions) -> TrafficCounts:
    """Run one simulation into ``<name>.net.xml``, ``.rou.xml`` and ``.fcd.xml.gz`` of a folder; see `simulate`."""
    generator = np.random.default_rng([options.seed, number])
    network, name = _network(options, number), _run_name(options, number)
    net = folder / f"{name}.net.xml"
    seed = int(generator.integers(1 << 30))
    if network in NETWORKS:
        NETWORKS[network](net, seed, generator)
    else:
        net.write_bytes(read_file(Path(network)))
    _write_routes(folder / f"{name}.rou.xml", _edges(net), options, generator)
    return _run_traffic(folder, name, seed, options.duration_s)


def _network(options: SumoOptions, number: int) -> str:
    return options.networks[number % len(options.networks)]


def _run_name(options: SumoOptions, number: int) -> str:
    network = Path(_network(options, number)).name.removesuffix(".xml").removesuffix(".net")
    return f"{network}-{options.seed}-{number}"


def _run_traffic(folder: Path, name: str, seed: int, duration_s: float) -> TrafficCounts:
    statistics = folder / f"{name}.statistics.xml"
    arguments = {
        "net-file": folder / f"{name}.net.xml",
        "route-files": folder / f"{name}.rou.xml",
        "fcd-output": folder / f"{name}.fcd.xml.gz",
        "statistic-output": statistics,
        "end": duration_s,
        "step-length": STEP_S,
        "device.fcd.period": FCD_PERIOD_S,
        "fcd-output.acceleration": "true",
        "lanechange.duration": 3,
        "collision.action": "warn",
        "time-to-teleport": -1,  # a jam stays a jam: a car that jumps over it would be no traffic
        "ignore-route-errors": "true",
        "no-step-log": "true",
        "seed": seed,
    }
    run_program("sumo", arguments, timeout_s=60.0 + 10.0 * duration_s)
    found = parse_xml(statistics.read_bytes(), statistics.name)
    vehicles, safety, teleports = (found.find(tag) for tag in ("vehicles", "safety", "teleports"))
    return TrafficCounts(
        name=name,
        num_vehicles=0 if vehicles is None else int(vehicles.get("inserted") or 0),
        num_collisions=0 if safety is None else int(safety.get("collisions") or 0),
        num_teleports=0 if teleports is None else int(teleports.get("total") or 0),
    )


def program_path(program: str) -> Path:
    """Return the path of one of SUMO's programs.

    Raises:
        MissingExtraError: eclipse-sumo is not installed.
    """
    found = importlib.util.find_spec("sumo")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    paths = [Path(folder) / "bin" / program for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise MissingExtraError("eclipse-sumo", extra("sumo"))
    return path


def run_program(program: str, arguments: dict[str, object], *, timeout_s: float = 120.0) -> None:
    """Run one of SUMO's programs.

    Args:
        program: Name, for example ``netgenerate``.
        arguments: Long options and their values.
        timeout_s: It is ended after this time.

    Raises:
        MissingExtraError: eclipse-sumo is not installed.
        InvalidInputError: It cannot be started, fails or takes too long; with its first error line.
    """
    path = program_path(program)
    command = [str(path), *(f"--{name}={value}" for name, value in arguments.items())]
    environment = {"SUMO_HOME": str(path.parents[1]), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise InvalidInputError(program, f"must end within {timeout_s:.0f} s") from None
    except OSError as error:
        raise InvalidInputError(program, "must be a program that starts", str(error)) from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error")] or lines[-1:]
        said = errors[0][:200] if errors else f"exit status {done.returncode}"
        raise InvalidInputError(program, "must run without an error", said)


def _grid(net: Path, seed: int, generator: np.random.Generator) -> None:
    spread = float(generator.uniform(0.0, 12.0))
    _netgenerate(net, seed, generator, {
        "grid": "true",
        "grid.x-number": int(generator.integers(2, 5)),
        "grid.y-number": int(generator.integers(2, 5)),
        "grid.length": round(float(generator.uniform(110.0, 200.0)), 1),
        "grid.attach-length": 90,
        "perturb-x": f"normc(0,{spread:.1f},-25,25)",
        "perturb-y": f"normc(0,{spread:.1f},-25,25)",
    })  # fmt: skip


def _spider(net: Path, seed: int, generator: np.random.Generator) -> None:
    _netgenerate(net, seed, generator, {
        "spider": "true",
        "spider.arm-number": int(generator.integers(4, 8)),
        "spider.circle-number": int(generator.integers(2, 4)),
        "spider.space-radius": round(float(generator.uniform(80.0, 140.0)), 1),
        "spider.omit-center": "true",
    })  # fmt: skip


def _rand(net: Path, seed: int, generator: np.random.Generator) -> None:
    _netgenerate(net, seed, generator, {
        "rand": "true",
        "rand.iterations": int(generator.integers(25, 50)),
        "rand.min-distance": 90,
        "rand.max-distance": 220,
    })  # fmt: skip


def _netgenerate(net: Path, seed: int, generator: np.random.Generator, shape: dict[str, object]) -> None:
    """Generate a network of one shape; its lanes, speeds and traffic lights are drawn as well."""
    common = {
        "default.lanenumber": int(generator.integers(1, 3)),
        "default.speed": round(float(generator.uniform(8.3, 16.7)), 2),
        "default.lanewidth": round(float(generator.uniform(3.0, 3.6)), 2),
        "tls.guess": "true",
        "tls.guess.threshold": round(float(generator.uniform(40.0, 120.0)), 1),
        "turn-lanes": int(generator.integers(0, 2)),
        "no-turnarounds": "true",
        "seed": seed,
        "output-file": net,
    }
    run_program("netgenerate", shape | common)


def _roundabout(net: Path, seed: int, generator: np.random.Generator) -> None:
    """Write a roundabout with 3 to 5 two-way arms as plain nodes and edges, and let netconvert build it."""
    num_arms = int(generator.integers(3, 6))
    radius_m, arm_m = float(generator.uniform(14.0, 28.0)), float(generator.uniform(120.0, 220.0))
    turns = (np.arange(num_arms) + generator.uniform(-0.15, 0.15, num_arms)) * 2.0 * math.pi / num_arms
    num_lanes, speed = int(generator.integers(1, 3)), round(float(generator.uniform(11.1, 16.7)), 2)
    nodes, edges = etree.Element("nodes"), etree.Element("edges")
    for arm, turn in enumerate(turns):
        for kind, distance_m in (("ring", radius_m), ("end", radius_m + arm_m)):
            x, y = distance_m * math.cos(turn), distance_m * math.sin(turn)
            etree.SubElement(nodes, "node", id=f"{kind}{arm}", x=f"{x:.2f}", y=f"{y:.2f}", type="priority")
        after = (arm + 1) % num_arms
        arc = turn + ((turns[after] - turn) % (2.0 * math.pi)) * np.linspace(0.0, 1.0, 9)
        shape = " ".join(
            f"{radius_m * math.cos(angle):.2f},{radius_m * math.sin(angle):.2f}" for angle in arc
        )
        ring = {"id": f"around{arm}", "from": f"ring{arm}", "to": f"ring{after}", "shape": shape}
        etree.SubElement(edges, "edge", ring, numLanes=str(num_lanes), speed="8.33", priority="3")
        for name, start, end in (
            (f"in{arm}", f"end{arm}", f"ring{arm}"),
            (f"out{arm}", f"ring{arm}", f"end{arm}"),
        ):
            way = {"id": name, "from": start, "to": end}
            etree.SubElement(edges, "edge", way, numLanes=str(num_lanes), speed=f"{speed}", priority="1")
    node_file, edge_file = (net.with_name(f"{net.name}.{kind}.xml") for kind in ("nod", "edg"))
    for path, root in ((node_file, nodes), (edge_file, edges)):
        path.write_bytes(etree.tostring(root))
    run_program("netconvert", {
        "node-files": node_file, "edge-files": edge_file, "roundabouts.guess": "true", "no-turnarounds": "true",
        "seed": seed, "output-file": net,
    })  # fmt: skip


NETWORKS: dict[str, Callable[[Path, int, np.random.Generator], None]] = {
    "grid": _grid,
    "spider": _spider,
    "rand": _rand,
    "roundabout": _roundabout,
}


@dataclass(frozen=True, slots=True)
class _Edges:
    """Roads that cars may use, with the weight of starting and of ending a trip there."""

    ids: tuple[str, ...]
    origin_weights: np.ndarray
    goal_weights: np.ndarray


def _edges(net: Path) -> _Edges:
    root = parse_xml(net.read_bytes(), net.name)
    if root.tag != "net":
        raise InvalidInputError(net.name, "must be a SUMO net", str(root.tag))
    ends = {node.get("id") for node in root.iterchildren("junction") if node.get("type") == "dead_end"}
    roads = [
        edge for edge in root.iterchildren("edge") if edge.get("function") is None and _has_car_lane(edge)
    ]
    if len(roads) < 2:
        raise InvalidInputError(net.name, "must have at least two roads for cars", len(roads))
    from_outside = np.array([1.0 + FRINGE_PREFERENCE * (edge.get("from") in ends) for edge in roads])
    to_outside = np.array([1.0 + FRINGE_PREFERENCE * (edge.get("to") in ends) for edge in roads])
    return _Edges(
        tuple(edge.get("id") or "" for edge in roads),
        from_outside / from_outside.sum(),
        to_outside / to_outside.sum(),
    )


def _has_car_lane(edge: etree._Element) -> bool:
    """Tell whether some lane is open to all, or names passenger cars as allowed and not as forbidden."""
    for lane in edge.iterchildren("lane"):
        allowed, forbidden = (lane.get("allow") or "").split(), (lane.get("disallow") or "").split()
        if (not allowed or {"all", "passenger"} & set(allowed)) and not {"all", "passenger"} & set(forbidden):
            return True
    return False


def _write_routes(path: Path, edges: _Edges, options: SumoOptions, generator: np.random.Generator) -> None:
    """Write vehicle types and trips; SUMO finds the routes."""
    root = etree.Element("routes")
    violations = float(generator.uniform(*options.violation_share))
    for number in range(_TYPES_PER_RUN):
        violates = number < round(violations * _TYPES_PER_RUN)
        etree.SubElement(root, "vType", _vehicle_type(f"type{number}", options, violates, generator))
    rate = float(generator.uniform(*options.departures_per_minute))
    times = np.sort(
        generator.uniform(0.0, options.duration_s, generator.poisson(rate * options.duration_s / 60.0))
    )
    origins = generator.choice(len(edges.ids), len(times), p=edges.origin_weights)
    goals = generator.choice(len(edges.ids), len(times), p=edges.goal_weights)
    kinds = generator.integers(_TYPES_PER_RUN, size=len(times))
    for number, (time, origin, goal, kind) in enumerate(zip(times, origins, goals, kinds, strict=True)):
        if origin != goal:
            trip = {"id": f"{number}", "type": f"type{kind}", "depart": f"{time:.1f}"}
            trip |= {
                "from": edges.ids[origin],
                "to": edges.ids[goal],
                "departLane": "best",
                "departSpeed": "max",
            }
            etree.SubElement(root, "trip", trip)
    path.write_bytes(etree.tostring(root))


def _vehicle_type(
    name: str, options: SumoOptions, violates: bool, generator: np.random.Generator
) -> dict[str, str]:
    """Draw one vehicle type; violations are attributes of SUMO's junction and car following models."""
    kind = list(_CLASSES)[int(generator.choice(len(_CLASSES), p=_CLASS_SHARES))]
    shortest_m, longest_m, width_m = _CLASSES[kind]
    deviation = float(generator.uniform(*options.speed_deviation))
    values = {
        "id": name,
        "vClass": kind,
        "length": f"{generator.uniform(shortest_m, longest_m):.2f}",
        "width": f"{width_m}",
        "sigma": f"{generator.uniform(*options.sigma):.3f}",
        "speedFactor": f"normc({1.2 if violates else 1.0},{deviation:.3f},0.6,1.6)",
        "tau": f"{generator.uniform(0.6, 0.9) if violates else generator.uniform(0.9, 1.6):.2f}",
        "accel": f"{generator.uniform(1.2, 2.8):.2f}",
        "decel": f"{generator.uniform(3.0, 5.0):.2f}",
    }
    if violates:
        values |= {"jmDriveAfterYellowTime": "3", "jmIgnoreFoeProb": "0.1", "jmIgnoreFoeSpeed": "5"}
        values |= {"lcAssertive": "1.5", "impatience": "0.5"}
    return values


def _check(options: SumoOptions) -> None:
    """Refuse options out of range, before anything is written."""
    _require(options.num_runs >= 1, "num_runs", "must be >= 1", options.num_runs)
    _require(10.0 <= options.duration_s <= 86400.0, "duration_s", "must be 10 to 86400 s", options.duration_s)
    _require(options.seed >= 0, "seed", "must be >= 0", options.seed)
    ranges: Sequence[tuple[str, tuple[float, float], float]] = (
        ("departures_per_minute", options.departures_per_minute, 1000.0),
        ("sigma", options.sigma, 1.0),
        ("speed_deviation", options.speed_deviation, 0.5),
        ("violation_share", options.violation_share, 1.0),
    )
    for name, (low, high), limit in ranges:
        _require(0.0 <= low <= high <= limit, name, f"must be a range within 0 to {limit:g}", (low, high))
    _require(bool(options.networks), "networks", "must name at least one", options.networks)
    for network in options.networks:
        known = f"{', '.join(NETWORKS)} or a net.xml file"
        _require(network in NETWORKS or Path(network).is_file(), "network", f"must be {known}", network)


def _require(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise InvalidInputError(f"simulate sumo: {name}", rule, value)
