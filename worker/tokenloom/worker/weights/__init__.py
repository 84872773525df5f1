"""Weights from a checkpoint's files to memory, in the form in which they are kept."""
