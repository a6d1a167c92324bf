"""What prefill and decode workers share: channel server, inbox, heartbeats, the compute loop."""
