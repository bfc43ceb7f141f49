"""Cells: whole meshes with their own stores behind one edge, and moving tenants between them."""
