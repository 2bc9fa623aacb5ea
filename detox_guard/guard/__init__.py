"""Checking text before anyone reads it. Knows units, scores and policies; knows no rows and no framework."""
