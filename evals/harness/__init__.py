"""What the evaluation commands share."""
