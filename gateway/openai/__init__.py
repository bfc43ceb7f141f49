"""OpenAI-compatible routes: each a pure, versioned fold of the event log."""
