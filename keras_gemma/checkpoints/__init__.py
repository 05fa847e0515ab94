"""Presets in and out."""
