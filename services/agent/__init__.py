"""The agent service: claims runs, reasons step by step, and keeps nothing that only it knows."""
