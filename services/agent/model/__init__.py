"""Language models: the port that the loop talks to, and its OpenAI-compatible adapter."""
