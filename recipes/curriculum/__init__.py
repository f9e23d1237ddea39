"""Curriculum learning of a language model."""
