"""Using a trained learner: evaluate, adapt, figures."""
