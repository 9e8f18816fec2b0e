"""Submit jobs to a Ray cluster and follow them."""
