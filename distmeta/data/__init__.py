"""Builders of task stores (`distmeta data`)."""
