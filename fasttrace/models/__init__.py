"""Models of Hugging Face: how they are loaded, where their parts are, how they are hooked."""
