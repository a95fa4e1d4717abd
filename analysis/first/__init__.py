"""The first run on a device: `python -m analysis.first --help`."""
