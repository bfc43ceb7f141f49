"""The other services as the agent sees them; all calls go through the mesh's Envoy."""
