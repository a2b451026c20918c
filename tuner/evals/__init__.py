"""What a model is worth: scores of its text, and how sure they are."""
