"""Classifiers that withstand attacks on their inputs."""
