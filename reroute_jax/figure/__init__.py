"""Pictures of what ran: plain functions from arrays to HTML and SVG text."""
