"""The command line: compose a configuration, turn it into dataclasses, wire the parts, run."""
