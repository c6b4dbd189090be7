"""Prompts: from a text to token ids, the tokens of the subject, and the token whose probability is scored."""
