"""Where samples come from: files, labelled samples, tables, text."""

from common.sources.files import IDX, Digits, ImageTable, Labelled, Source, TextTable

__all__ = ["IDX", "Digits", "ImageTable", "Labelled", "Source", "TextTable"]
