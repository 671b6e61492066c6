"""Pictures and videos as users have them: every bit depth, transparency, colour profiles, EXIF; frames and sound."""
