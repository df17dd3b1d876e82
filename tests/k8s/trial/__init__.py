"""By hand, as root: pods of an overlay on this machine, as near to real ones as it gets without a
cluster. Not part of the test suite. `python -m tests.k8s.trial` says what it does."""
