"""Optimizers beside torch's Adam, one to a file, in a form that steps, skips and resumes as Adam does."""
