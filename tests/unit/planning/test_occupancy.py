from __future__ import annotations

import numpy as np
import shapely
import torch
from conftest import make_batch

from autoscale_ray.planning.occupancy import (
    AGENT_FRAMES,
    CELL_M,
    NUM_CELLS,
    ORIGIN_X_M,
    ORIGIN_Y_M,
    mean_iou,
    occupancy_targets,
    polygon_rasters,
)

CENTRES = np.stack(
    np.meshgrid(
        ORIGIN_X_M + CELL_M * (np.arange(NUM_CELLS) + 0.5),
        ORIGIN_Y_M + CELL_M * (np.arange(NUM_CELLS) + 0.5),
        indexing="ij",
    ),
    -1,
)


def test_polygon_rasters_agree_with_shapely():
    rng = np.random.default_rng(3)
    rings = []
    for count in rng.integers(3, 9, 30):
        angles = np.sort(rng.uniform(0, 2 * np.pi, count))
        radius = rng.uniform(5, 40, (count, 1))
        rings.append(rng.uniform(-20, 40, 2) + radius * np.stack([np.cos(angles), np.sin(angles)], 1))
    offsets = torch.tensor(np.concatenate([[0], np.cumsum([len(ring) for ring in rings])]))
    found = polygon_rasters(torch.tensor(np.concatenate(rings)).float(), offsets)
    for raster, ring in zip(found, rings, strict=True):
        inside = shapely.contains_xy(shapely.Polygon(ring), CENTRES[..., 0], CENTRES[..., 1])
        assert (raster.numpy() != inside).sum() == 0


def test_agent_cells_are_those_the_box_touches():
    batch = make_batch(6)
    found = occupancy_targets(batch)[:, 1:]
    half = CELL_M / 2
    cells = shapely.box(
        CENTRES[..., 0] - half, CENTRES[..., 1] - half, CENTRES[..., 0] + half, CENTRES[..., 1] + half
    )
    for scene in range(6):
        for channel, frame in enumerate(AGENT_FRAMES):
            agents = slice(int(batch.agent_offsets[scene]), int(batch.agent_offsets[scene + 1]))
            boxes = [box_polygon(state, size) for state, size in
                     zip(batch.agent_states_AT5[agents, frame], batch.agent_size_A2[agents], strict=True)]  # fmt: skip
            overlap = shapely.area(shapely.intersection(cells, shapely.union_all(boxes)))
            raster = found[scene, channel].numpy().astype(bool)
            assert raster[overlap > 0.3].all()  # a corner smaller than that can lie between the sample points
            assert not raster[overlap == 0].any()


def box_polygon(state: torch.Tensor, size: torch.Tensor) -> shapely.Polygon:
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2 * size.numpy()
    yaw = float(state[2])
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    return shapely.Polygon(corners @ turn.T + state[:2].numpy())


def test_drivable_area_is_the_union_of_drivable_layers_only():
    batch = make_batch(3)
    found = occupancy_targets(batch)[:, 0].bool().numpy()
    for scene in range(3):
        ring = batch.polygon_points_W2[124 * scene : 124 * scene + 120].numpy()
        inside = shapely.contains_xy(shapely.Polygon(ring), CENTRES[..., 0], CENTRES[..., 1])
        np.testing.assert_array_equal(found[scene], inside)


def test_mean_iou_of_hand_made_rasters():
    target = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    logits = torch.full((3, 2, 4, 4), -1.0)
    target[0, 0, 0, :4] = 1
    logits[0, 0, 0, 2:] = 1.0
    logits[0, 0, 1, :2] = 1.0  # channel 0: 2 of 6; channel 1 empty on both sides: left out
    target[1, 0, 0, 0] = 1
    logits[1, 0, 0, 0] = 1.0
    logits[1, 1, 3, 3] = 1.0  # channel 0: 1; channel 1: false alarm, 0
    value, valid = mean_iou(logits, target)
    np.testing.assert_allclose(value, [2 / 6, 0.5, 0.0])
    assert valid.tolist() == [True, True, False]
