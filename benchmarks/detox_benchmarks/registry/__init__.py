"""Which of transformers' types of model can be steered, tried on a tiny random model of each."""
