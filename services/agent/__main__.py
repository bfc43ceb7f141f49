"""`python -m services.agent` serves the agent."""

from __future__ import annotations

from meshkit.server import run
from meshkit.settings import load
from services.agent.app import main
from services.agent.settings import AgentSettings

if __name__ == "__main__":
    settings = load(AgentSettings)
    run(lambda: main(settings))
