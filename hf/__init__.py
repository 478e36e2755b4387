"""A trained model for other people's tools: a Hugging Face folder."""
