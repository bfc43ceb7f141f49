"""The one shared library of the mesh: what every process needs and no service owns.

It knows no service. Import the modules directly (`from meshkit.errors import NotFoundError`); this package
re-exports nothing, so that a process pays only for what it uses.
"""

import os

# gRPC reads it when it is first imported, so it stands here. With the older client engine a stream's reader
# costs a third less a message (`python -m bench.grpc_cost` prints it). Whoever sets the variable decides.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")
