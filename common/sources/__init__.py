"""Sources of samples: labelled files, tables and text."""

from common.sources.files import IDX, Digits, ImageTable, Labelled, Source, TextTable

__all__ = ["IDX", "Digits", "ImageTable", "Labelled", "Source", "TextTable"]
