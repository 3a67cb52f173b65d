"""One module for each data format; `READERS` lists them by the name used on the command line."""

from autoscale_ray.scenes.readers import commonroad, scenarionet, sumo
from autoscale_ray.scenes.readers.reader import Reader

READERS: dict[str, Reader] = {
    "commonroad": commonroad.READER,
    "sumo": sumo.READER,
    "scenarionet": scenarionet.READER,
}
