"""One worker that can take either role, or both: prefill's and decode's schedulers over one pool."""
