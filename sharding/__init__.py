"""Meshes, plans and logical axis rules: where every array lives."""
