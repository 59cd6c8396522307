"""From prompts to answers: batches, programs, generation."""
