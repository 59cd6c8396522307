"""Which visual tokens run in which decoder layers: schedules, the methods that make them, and their operations."""
