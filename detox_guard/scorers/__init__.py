"""How toxic a text is. Knows text and classifiers; knows no engine, and not what a score is used for."""
