"""The HTTP routes, one module a resource; each exports `endpoints`."""
