"""An AgentOS with one agent and a durable queue in PostgreSQL and Redis, as Agno's own pages start one.

Of its own accord it caps runs at 32 at once; the cap is lifted above what the bench asks for.
"""

import os

from agno.agent import Agent
from agno.db.postgres import PostgresDb
from agno.models.openai.like import OpenAILike
from agno.os import AgentOS, QueueConfig

db = PostgresDb(db_url=os.environ["DATABASE_URL"])
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
    queue=QueueConfig(durable=True, redis=os.environ["REDIS_URL"], max_concurrency=128),
    telemetry=False,
)
app = agent_os.get_app()

if __name__ == "__main__":
    agent_os.serve(app="app:app", host="127.0.0.1", port=int(os.environ["PORT"]))
