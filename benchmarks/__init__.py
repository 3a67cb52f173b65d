"""Programs that measure and compare; each writes a dated result file."""
