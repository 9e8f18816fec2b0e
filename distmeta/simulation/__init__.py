"""What a step would take on a cluster that is not there: a discrete-event model, fed with costs measured here."""
