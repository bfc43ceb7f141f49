"""The HTTP edge: REST, SSE, WebSocket, OpenAI's Chat Completions and the chat page, over the mesh's gRPC."""
