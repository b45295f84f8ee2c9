"""What a run leaves for people: plots, tables and one self-contained HTML page."""
