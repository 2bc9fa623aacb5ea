"""What steering costs where nothing is toxic."""
