"""Fitting the shipped scorers, and measuring them."""
