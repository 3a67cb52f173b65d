from __future__ import annotations

import numpy as np
import torch

from autoscale_ray.config import PlannerConfig
from autoscale_ray.planning.anchors import anchor_trajectories, num_modes

CONFIG = PlannerConfig(anchor_accelerations_mps2=(-4.0, 0.0, 1.0), anchor_offsets_m=(-2.0, 0.0))


def test_anchors_integrate_their_acceleration_and_stop():
    state = torch.tensor([[0.3, 1.0, 0.1, 6.0], [0.0, -0.5, 0.0, 0.0]])
    anchors = anchor_trajectories(state, CONFIG).numpy()
    assert anchors.shape == (2, num_modes(CONFIG), 8, 3)
    for scene, (s0, _, _, speed) in enumerate(state.tolist()):
        for mode in range(6):
            acceleration = CONFIG.anchor_accelerations_mps2[mode // 2]
            s, v, found = s0, speed, []
            for tick in range(1, 4001):  # 1 ms Euler steps
                s, v = s + v * 1e-3, max(v + acceleration * 1e-3, 0.0)
                if tick % 500 == 0:
                    found.append(s)
            np.testing.assert_allclose(anchors[scene, mode, :, 0], found, atol=0.01)


def test_anchors_start_at_the_ego_and_end_at_their_offset():
    state = torch.tensor([[0.0, 1.0, 0.2, 5.0]])
    anchors = anchor_trajectories(state, CONFIG)[0]
    np.testing.assert_allclose(anchors[:, -1, 1], [-2.0, 0.0] * 3, atol=1e-6)
    # The first half second continues the present heading: d0 + v sin(psi) t to within what the blend takes back.
    assert (anchors[:, 0, 1] > 1.0).all()
    np.testing.assert_allclose(anchors[:, -1, 2], 0.0, atol=1e-6)
