"""What to steer away from. Knows files and cards of detoxifiers; knows no decoding."""
