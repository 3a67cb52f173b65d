"""The experts under the full score: faithful ones must do well, harmful ones badly where it matters."""

import numpy as np
import pytest

from autoscale_ray.world.families import FAMILIES
from autoscale_ray.world.judging import score_experts
from autoscale_ray.world.pools import generate


@pytest.mark.parametrize("family", list(FAMILIES))
def test_faithful_experts_score_well(family):
    scores = score_experts(generate(family, 3, seed=21, side="synthetic"))
    assert np.isfinite(scores["epdms"]).all()
    assert (scores["drivable_area_compliance"] == 1).all()
    assert (scores["driving_direction_compliance"] == 1).all()
    assert np.median(scores["epdms"]) > 0.8


def test_harmful_experts_run_red_lights_and_hit_leaders():
    red = score_experts(generate("red_light", 5, seed=4, quality="H", side="synthetic"))
    assert red["traffic_light_compliance"].mean() < 0.7
    leader = score_experts(generate("queue", 3, seed=4, quality="H", side="synthetic"))
    assert leader["no_at_fault_collisions"].mean() < 0.5
