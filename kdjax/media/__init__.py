"""Pictures and videos as users have them: any bit depth, transparency, colour profiles, EXIF; frames and sound."""
