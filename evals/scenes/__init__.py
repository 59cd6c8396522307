"""The embedded benchmark: rendered scenes with referring expressions and questions, all made from a seed."""
