"""AutoScale (driving data mixture): closed-loop choice of synthetic driving scenes, on Ray."""

__version__ = "0.1.0"
