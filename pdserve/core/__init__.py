"""What every part of pdserve shares, without torch: ids, lifecycle, layout, config, errors, messages."""
