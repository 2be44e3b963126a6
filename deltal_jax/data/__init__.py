"""Text to tokens, and problems to prompts."""
