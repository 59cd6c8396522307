"""What the commands share that is no evaluation: parsing, exit codes, and the arguments that name a route."""
