"""What `evals.bench` and `evals.profile` share."""
