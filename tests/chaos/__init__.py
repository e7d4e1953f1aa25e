"""Crash tests: runs that are killed with -9 at chosen moments, and compared with runs that nothing happened to."""
