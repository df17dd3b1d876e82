"""The live web page: static files, one poll of the controller for all who look, events over SSE."""
