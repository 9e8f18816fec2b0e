"""Submitting jobs to a Ray cluster."""
