"""Masks that are read once, for all layers and both passes."""
