"""Every published mixture rule, behind the interface of our own; see docs/baselines.md."""

from __future__ import annotations

from autoscale_ray.mixture.baselines import fixed, laws, online, regression, selection, skills
from autoscale_ray.mixture.problem import Method

BASELINES: dict[str, Method] = {
    "pool_proportional": fixed.POOL_PROPORTIONAL,
    "uniform": fixed.UNIFORM,
    "dev_proportional": fixed.DEV_PROPORTIONAL,
    "k_center": selection.K_CENTER,
    "uncertainty": selection.UNCERTAINTY,
    "chameleon": selection.CHAMELEON,
    "group_dro": online.GROUP_DRO,
    "doremi": online.DOREMI,
    "remix": online.REMIX,
    "doge": online.DOGE,
    "odm": online.ODM,
    "skill_it": skills.SKILL_IT,
    "aioli": skills.AIOLI,
    "ado": laws.ADO,
    "mosaic": laws.MOSAIC,
    "mosaic_ladder": laws.MOSAIC_LADDER,
    "regmix": regression.REGMIX,
    "climb": regression.CLIMB,
}
"""Methods by name; `pool_proportional` is the vanilla co-training arm."""
