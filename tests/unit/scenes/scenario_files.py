"""Write small CommonRoad documents for tests."""

from __future__ import annotations

import numpy as np


def obstacle(
    key: int, frames: range, start: float, speed: float, *, tag: str = "obstacle", kind: str = "car"
) -> str:
    states = []
    for frame in frames:
        x = start + speed * 0.1 * frame
        states.append(
            f"<position><point><x>{x:.4f}</x><y>0.0</y></point></position><orientation><exact>0.0</exact></orientation>"
            f"<time><exact>{frame}</exact></time><velocity><exact>{speed + 0.01 * (frame % 12):.4f}</exact></velocity>"
            f"<acceleration><exact>0.0</exact></acceleration>"
        )
    role = "<role>dynamic</role>" if tag == "obstacle" else ""
    rest = "".join(f"<state>{state}</state>" for state in states[1:])
    return (
        f'<{tag} id="{key}">{role}<type>{kind}</type><shape><rectangle>'
        f"<length>4.5</length><width>1.8</width></rectangle>"
        f"</shape><initialState>{states[0]}</initialState><trajectory>{rest}</trajectory></{tag}>"
    )


def lanelet(key: int, low: float, high: float, y: float, extra: str = "") -> str:
    def border(name: str, side: float) -> str:
        points = "".join(f"<point><x>{x}</x><y>{y + side}</y></point>" for x in np.linspace(low, high, 5))
        return f"<{name}>{points}</{name}>"

    return f'<lanelet id="{key}">{border("leftBound", 2.0)}{border("rightBound", -2.0)}{extra}</lanelet>'


def scenario(body: str, version: str = "2018b", step: str = "0.1") -> bytes:
    head = f'<commonRoad commonRoadVersion="{version}" timeStepSize="{step}" tags="urban" benchmarkID="X">'
    return f"<?xml version='1.0' encoding='UTF-8'?>{head}{body}</commonRoad>".encode()


def straight_drive(key: int = 5, num_frames: int = 100, start: float = 0.0) -> bytes:
    limit = "<speedLimit>13.89</speedLimit>"
    return scenario(lanelet(1, -50.0, 300.0, 0.0, limit) + obstacle(key, range(num_frames), start, 8.0))
