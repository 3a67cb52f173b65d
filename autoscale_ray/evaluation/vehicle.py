"""The vehicle whose footprint and wheel base the scorer uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VehicleParameters:
    """Sizes of one vehicle in metres, all positive; lengths are measured from the rear axle."""

    width_m: float
    front_length_m: float
    rear_length_m: float
    wheel_base_m: float

    @property
    def half_length_m(self) -> float:
        """Return half of the bumper-to-bumper length."""
        return (self.front_length_m + self.rear_length_m) / 2.0

    @property
    def half_width_m(self) -> float:
        """Return half of the width."""
        return self.width_m / 2.0

    @property
    def rear_axle_to_centre_m(self) -> float:
        """Return the distance from the rear axle forward to the centre of the footprint."""
        return self.half_length_m - self.rear_length_m


PACIFICA = VehicleParameters(
    width_m=1.1485 * 2.0, front_length_m=4.049, rear_length_m=1.127, wheel_base_m=3.089
)
"""NAVSIM's ego vehicle (docs/scoring.md, Vehicle)."""
