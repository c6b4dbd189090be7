"""Facts: sets of prompts with subjects and answers, from people's files."""
