"""Many SAEs from one command: which runs they make, how these are driven, and what they came to."""
