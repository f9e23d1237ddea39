"""Strategies that Lightning lacks, or that it refuses on CPUs."""
