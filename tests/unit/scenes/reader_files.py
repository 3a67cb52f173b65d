"""Small sources in every format that is no other test's own, each one car on one road, as files by relative name."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from scenes.scenario_files import straight_drive

Files = dict[str, bytes]
NUM_FRAMES = 70


def commonroad() -> Files:
    return {"USA_One-1_1_T-1.xml": straight_drive(num_frames=NUM_FRAMES)}


def sumo() -> Files:
    lane = '<lane id="a_0" index="0" speed="13.9" width="3.2" shape="0,0 50,0 110,0"/>'
    after = '<lane id="b_0" index="0" speed="13.9" shape="110,0 400,0"/>'
    inside = '<lane id=":J_0_0" index="0" speed="10" shape="110,0 111,0"/>'
    phases = '<phase duration="4" state="G"/><phase duration="6" state="r"/>'
    light = f'<tlLogic id="T" type="static" offset="0">{phases}</tlLogic>'
    net = (
        f'<net><edge id=":J_0" function="internal">{inside}</edge><edge id="a">{lane}</edge><edge id="b">{after}</edge>'
        f'{light}<junction id="J" type="traffic_light" shape="109,-2 112,-2 112,2 109,2" intLanes=":J_0_0"/>'
        '<connection from="a" to="b" fromLane="0" toLane="0" via=":J_0_0" tl="T" linkIndex="0"/></net>'
    )
    car = 'y="0" angle="90" type="t" speed="10"'
    steps = "".join(
        f'<timestep time="{0.5 * n:.2f}"><vehicle id="v" x="{20 + 5 * n}" {car}/></timestep>'
        for n in range(20)
    )
    return {
        "x.net.xml": net.encode(),
        "x.rou.xml": b'<routes><vType id="t" length="4.0" width="1.9"/></routes>',
        "x.fcd.xml": f"<fcd-export>{steps}</fcd-export>".encode(),
        "y.fcd.xml.gz": gzip.compress(f"<fcd-export>{steps}</fcd-export>".encode(), mtime=0),
    }


def scenarionet() -> Files:
    def state(start: float, y: float) -> dict[str, np.ndarray]:
        x = start + 0.8 * np.arange(NUM_FRAMES)
        return {
            "position": np.column_stack([x, np.full(NUM_FRAMES, y), np.zeros(NUM_FRAMES)]),
            "heading": np.zeros(NUM_FRAMES),
            "velocity": np.tile([8.0, 0.0], (NUM_FRAMES, 1)),
            "length": np.full(NUM_FRAMES, 4.5),
            "width": np.full(NUM_FRAMES, 1.9),
            "valid": np.ones(NUM_FRAMES, dtype=bool),
        }

    lane = {"type": "LANE_SURFACE_STREET", "polyline": np.array([[-30.0, 0.0], [150.0, 0.0]]),
            "polygon": np.array([[-30.0, -2.0], [150.0, -2.0], [150.0, 2.0], [-30.0, 2.0]])}  # fmt: skip
    scenario = {
        "id": "one",
        "length": NUM_FRAMES,
        "metadata": {"sdc_id": "ego", "sample_rate": 0.1, "dataset": "waymo", "map": "town"},
        "tracks": {
            "ego": {"type": "VEHICLE", "state": state(0.0, 0.0)},
            "7": {"type": "PEDESTRIAN", "state": state(9.0, 5.0)},
        },
        "map_features": {"1": lane},
        "dynamic_map_states": {
            "1": {"lane": "1", "state": {"object_state": ["LANE_STATE_STOP"] * NUM_FRAMES}}
        },
    }
    return {"one.pkl": pickle.dumps(scenario, protocol=4)}


def _map_json() -> bytes:
    def line(y: float) -> list[dict[str, float]]:
        return [{"x": float(x), "y": y, "z": 0.0} for x in (-40, 60, 160)]

    lane = {"id": 1, "lane_type": "VEHICLE", "left_lane_boundary": line(2.0), "right_lane_boundary": line(-2.0),
            "successors": [], "left_neighbor_id": None, "right_neighbor_id": None,
            "is_intersection": False}  # fmt: skip
    area = [{"x": float(x), "y": float(y)} for x, y in ((-40, -3), (160, -3), (160, 3), (-40, 3))]
    crossing = {"edge1": line(2.0)[:2], "edge2": line(-2.0)[:2]}
    return json.dumps({
        "lane_segments": {"1": lane}, "drivable_areas": {"2": {"area_boundary": area}},
        "pedestrian_crossings": {"3": crossing},
    }).encode()  # fmt: skip


def av2_sensor() -> Files:
    times = 315_000_000_000_000_000 + 100_000_000 * np.arange(NUM_FRAMES)
    ones, zeros = np.ones(NUM_FRAMES), np.zeros(NUM_FRAMES)
    turn = {"qw": ones, "qx": zeros, "qy": zeros, "qz": zeros}
    ego = {"timestamp_ns": times, **turn, "tx_m": 0.8 * np.arange(NUM_FRAMES), "ty_m": zeros, "tz_m": zeros}
    boxes = {"timestamp_ns": times, "track_uuid": ["u"] * NUM_FRAMES, "category": ["REGULAR_VEHICLE"] * NUM_FRAMES,
             "length_m": 4.5 * ones, "width_m": 1.9 * ones, **turn, "tx_m": 12.0 * ones, "ty_m": zeros,
             "tz_m": zeros}  # fmt: skip
    files = {"log/map/log_map_archive_x.json": _map_json()}
    for name, columns in (("annotations", boxes), ("city_SE3_egovehicle", ego)):
        sink = io.BytesIO()
        pa.feather.write_feather(pa.table(columns), sink, compression="uncompressed")
        files[f"log/{name}.feather"] = sink.getvalue()
    return files


def av2_forecasting() -> Files:
    zeros = np.zeros(NUM_FRAMES)
    table = pa.table({
        "track_id": ["AV"] * NUM_FRAMES, "object_type": ["vehicle"] * NUM_FRAMES, "timestep": np.arange(NUM_FRAMES),
        "position_x": 0.8 * np.arange(NUM_FRAMES), "position_y": zeros, "heading": zeros, "velocity_x": zeros + 8.0,
        "velocity_y": zeros,
    })  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return {"s/scenario_s.parquet": sink.getvalue(), "s/log_map_archive_s.json": _map_json()}


def kitti() -> Files:
    oxts = [f"49.0 {8.4 + 1.1e-5 * n:.9f} 112.8 0.0 0.0 0.0 0 8 8 0 0" for n in range(NUM_FRAMES)]
    labels = [f"{n} 3 Car 0 0 -1.5 1 2 3 4 1.5 1.7 4.2 2.0 1.5 15.0 -1.57" for n in range(NUM_FRAMES)]
    calib = "R_rect 1 0 0 0 1 0 0 0 1\nTr_velo_cam 0 -1 0 0 0 0 -1 0 1 0 0 0\nTr_imu_velo 1 0 0 0 0 1 0 0 0 0 1 0\n"
    return {
        "oxts/0000.txt": "\n".join(oxts).encode(),
        "label/0000.txt": "\n".join(labels).encode(),
        "calib/0000.txt": calib.encode(),
    }


def interaction() -> Files:
    head = "track_id,frame_id,timestamp_ms,agent_type,x,y,vx,vy,psi_rad,length,width"
    rows = [f"1,{n},{100 * n},car,{0.8 * n:.3f},0.0,8.0,0.0,0.0,4.5,1.8" for n in range(NUM_FRAMES)]
    per_m = 1.0 / 111_319.49
    nodes = "".join(
        f'<node id="{key}" lat="{49.0 + y * per_m * 0.65606:.9f}" lon="{8.4 + x * per_m / 0.65606:.9f}"/>'
        for key, x, y in ((1, -40, 2), (2, 160, 2), (3, -40, -2), (4, 160, -2))
    )
    ways = '<way id="10"><nd ref="1"/><nd ref="2"/></way><way id="11"><nd ref="3"/><nd ref="4"/></way>'
    members = '<member type="way" ref="10" role="left"/><member type="way" ref="11" role="right"/>'
    tags = '<tag k="type" v="lanelet"/><tag k="subtype" v="road"/><tag k="speed_limit" v="50 km/h"/>'
    place = "recorded_trackfiles/town"
    return {
        f"{place}/vehicle_tracks_000.csv": "\n".join([head, *rows]).encode(),
        f"{place}/meta_data.csv": b"frameRate_hz,originLat,originLon\n10,49.0,8.4\n",
        "maps/town.osm": f"<osm>{nodes}{ways}<relation id='20'>{members}{tags}</relation></osm>".encode(),
    }


SOURCES: dict[str, Callable[[], Files]] = {
    "commonroad": commonroad,
    "sumo": sumo,
    "scenarionet": scenarionet,
    "av2-sensor": av2_sensor,
    "av2-forecasting": av2_forecasting,
    "kitti": kitti,
    "interaction": interaction,
}


def write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
