"""Other servers of agents under the same load: how each is installed, started, asked and read."""
