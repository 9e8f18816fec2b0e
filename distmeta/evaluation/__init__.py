"""Use a trained learner: evaluate it, adapt it to a task, draw figures."""
