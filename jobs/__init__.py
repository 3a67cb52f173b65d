"""Jobs for `ray job submit`, one script each with choices and no logic, and the program of `make demo-real`."""
