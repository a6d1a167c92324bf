"""A web page that shows a running service, and lets those who may take workers out of use."""
