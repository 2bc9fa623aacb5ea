"""The server under load. Knows HTTP and clocks; knows no quality."""
