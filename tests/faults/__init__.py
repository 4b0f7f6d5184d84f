"""Faults injected into whole processes on real sockets, and the figures that come of it. See README.md."""
