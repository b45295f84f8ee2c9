"""The trainer: members in lockstep over one stream of rows, each with its own recipe."""
