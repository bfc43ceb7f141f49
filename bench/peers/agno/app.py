"""An AgentOS with one agent, as Agno's own pages start one.

With a database and Redis it has their durable queue. Of its own accord that caps runs at 32 at once; the cap
is lifted above what the bench asks for. Without, it keeps nothing.
"""

import os

from agno.agent import Agent
from agno.db.postgres import PostgresDb
from agno.models.openai.like import OpenAILike
from agno.os import AgentOS, QueueConfig

db = PostgresDb(db_url=os.environ["DATABASE_URL"]) if "DATABASE_URL" in os.environ else None
redis = os.environ.get("REDIS_URL")
agent = Agent(
    id="bench",
    name="bench",
    model=OpenAILike(
        id="scripted", base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
    ),
    db=db,
    telemetry=False,
)
agent_os = AgentOS(
    id="bench",
    agents=[agent],
    db=db,
    queue=QueueConfig(durable=True, redis=redis, max_concurrency=128) if redis else None,
    telemetry=False,
)
app = agent_os.get_app()

if __name__ == "__main__":
    agent_os.serve(app="app:app", host="127.0.0.1", port=int(os.environ["PORT"]))
