"""Makes the figures of a folder of episodes: `python -m tests.chaos.report FOLDER`."""
