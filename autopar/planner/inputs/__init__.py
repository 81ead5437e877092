"""Readers of the published planners' own input files, and problems made of what they read."""
