"""NAVSIM's scores, PDMS (v1) and EPDMS (v2): exact, batched over scenes and trajectories, usable on plain arrays."""

from autoscale_ray.evaluation.aggregate import (
    StageFrames,
    TwoStageScores,
    aggregate_one_stage,
    aggregate_two_stage,
)
from autoscale_ray.evaluation.epdms import epdms, two_frame_extended_comfort, with_extended_comfort
from autoscale_ray.evaluation.metrics import RULES_V1, RULES_V2, Rules
from autoscale_ray.evaluation.pdm_closed import ReferenceDrive, pdm_closed
from autoscale_ray.evaluation.pdms import pdms
from autoscale_ray.evaluation.prepare import PreparedScene, prepare, prepare_all
from autoscale_ray.evaluation.scene import ScoringScene, make_scene, pack_rings, validate_scene
from autoscale_ray.evaluation.scoring import Metric, ScoreResult
from autoscale_ray.evaluation.simulate import simulate
from autoscale_ray.evaluation.vehicle import PACIFICA, VehicleParameters

__all__ = [
    "PACIFICA",
    "RULES_V1",
    "RULES_V2",
    "Metric",
    "PreparedScene",
    "ReferenceDrive",
    "Rules",
    "ScoreResult",
    "ScoringScene",
    "StageFrames",
    "TwoStageScores",
    "VehicleParameters",
    "aggregate_one_stage",
    "aggregate_two_stage",
    "epdms",
    "make_scene",
    "pack_rings",
    "pdm_closed",
    "pdms",
    "prepare",
    "prepare_all",
    "simulate",
    "two_frame_extended_comfort",
    "validate_scene",
    "with_extended_comfort",
]
