"""How many workers of each role the load wants: forecast, one cost model, proposals with gain and error bar.

    demand -> forecast -> capacity of (prefill, decode) -> proposal, if it is worth more than it may be wrong

Pure: what arrives and ends is told, time is an argument. Who performs a proposal is somebody else's business.
"""
