"""The command line of every recipe, and what a run leaves."""
