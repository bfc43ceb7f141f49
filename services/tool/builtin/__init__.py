"""The tools that come with Hermesh; `builtin_tools` in `services.tool.app` lists them."""
