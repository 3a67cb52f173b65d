"""Jobs for `ray job submit`: one script each, choices only, no logic."""
