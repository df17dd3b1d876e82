"""Output that follows a grammar: JSON of a schema, a regular expression, one of some choices.

The gateway turns what a client asks for into a grammar's text (`build`), which travels with the
request; the router follows it token by token (`state`).
"""
