"""Protocol package `pdserve`."""
