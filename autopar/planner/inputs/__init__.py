"""Readers of the published planners' own input files."""
