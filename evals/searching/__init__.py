"""Schedules that are found: what a search changes, what it minimises, and how it goes about it."""
