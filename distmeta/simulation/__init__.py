"""Predict a job's step times on other clusters: a discrete-event simulation with costs measured on this machine."""
