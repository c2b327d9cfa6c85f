"""Options, fixtures and judgement of the lab: see framework/plugin/."""

pytest_plugins = ["framework.plugin"]
