"""Speed beside other ways of decoding, and of shapes that no hub has to be reached for."""
