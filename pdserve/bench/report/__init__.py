"""What a run leaves behind: results.json, requests.csv, report.html and, with matplotlib, PNGs."""
