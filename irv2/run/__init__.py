"""One run at work in its directory: what it writes, and how it resumes from there."""
