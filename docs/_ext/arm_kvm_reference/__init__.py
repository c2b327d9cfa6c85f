"""The reference part of the documentation, made from the code.

source       what the running code does not keep: comments of members, docstrings of fixtures
pages        each generated part, as Markdown
directives   the Sphinx directives that stand for them
"""
