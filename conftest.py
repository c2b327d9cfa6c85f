"""Options, fixtures and judgement of the lab: see framework/plugin.py."""

pytest_plugins = ["framework.plugin"]
