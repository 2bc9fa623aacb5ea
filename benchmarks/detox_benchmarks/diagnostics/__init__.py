"""What a soft prompt pushes away from, and how far into a reply and behind which context."""
