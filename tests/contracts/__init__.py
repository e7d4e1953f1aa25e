"""Suites that every part of a kind must pass."""
