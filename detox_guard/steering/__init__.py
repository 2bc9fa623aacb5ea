"""The contrast: from the logits of several views to one token. Knows no model, no cache, no text."""
