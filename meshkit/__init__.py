"""The one shared library of the mesh: what every process needs and no service owns.

It knows no service. Import the modules directly (`from meshkit.errors import NotFoundError`); this package
re-exports nothing, so that a process pays only for what it uses.
"""
