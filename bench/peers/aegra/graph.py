"""A graph of one node that asks the model: the least that this server can stream a reply from."""

from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

# Key and address come from OPENAI_API_KEY and OPENAI_BASE_URL.
model = ChatOpenAI(model="scripted")


async def chat(state: MessagesState) -> dict[str, Any]:
    """Asks the model with the whole conversation."""
    return {"messages": [await model.ainvoke(state["messages"])]}


graph = (
    StateGraph(MessagesState).add_node("chat", chat).add_edge(START, "chat").add_edge("chat", END).compile()
)
