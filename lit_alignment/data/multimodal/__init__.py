"""Files of images and sounds, and their cached features."""
