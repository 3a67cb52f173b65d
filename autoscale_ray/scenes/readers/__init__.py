"""One module for each data format; `READERS` lists them by the name used on the command line."""

from autoscale_ray.scenes.readers import (
    argoverse2,
    commonroad,
    interaction,
    kitti,
    navhard,
    navsim,
    scenarionet,
    simscale,
    sumo,
    waymo,
)
from autoscale_ray.scenes.readers.reader import Reader

READERS: dict[str, Reader] = {
    "navsim": navsim.READER,
    "simscale": simscale.READER,
    "navhard": navhard.READER,
    "commonroad": commonroad.READER,
    "sumo": sumo.READER,
    "scenarionet": scenarionet.READER,
    "av2-sensor": argoverse2.SENSOR_READER,
    "av2-forecasting": argoverse2.FORECASTING_READER,
    "kitti": kitti.READER,
    "interaction": interaction.READER,
    "waymo": waymo.READER,
}
