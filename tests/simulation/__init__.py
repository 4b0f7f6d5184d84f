"""Deterministic simulation of the data path: see README.md."""
