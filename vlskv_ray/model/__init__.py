"""SwiftKV text backbones, the small presets, and how a teacher's checkpoint becomes a student."""
